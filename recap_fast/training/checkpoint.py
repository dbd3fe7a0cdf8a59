"""Checkpoints: a Hugging Face model folder, with the trainer's state in a folder inside it.

A checkpoint is written under a temporary name, flushed, and renamed: a folder called step-* is
always complete. Tensors are safetensors, the rest is JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recap_fast.model.folder import STATE, TENSORS, is_checkpoint, move_trainer_state
from recap_fast.types import UserError

if TYPE_CHECKING:
    from recap_fast.data.images import ImageEncoder


class CheckpointError(UserError):
    """A checkpoint that is not there or cannot be continued from."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Everything beside the weights that a continued run needs to give the same numbers."""

    step: int
    data: Mapping[str, Any]  # the data stream's cursor
    tensors: Mapping[str, Tensor]  # optimizer, reweighter, generators


def save_checkpoint(
    folder: Path,
    state: TrainerState,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    keep: int,
    images: ImageEncoder | None = None,
) -> Path:
    """Writes folder/step-NNNNNN and removes all but the newest `keep`.

    Args:
        images: of a vision-language model; its processor's settings are part of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:06d}"
    if is_checkpoint(final):  # complete, of the very same step
        return final
    staging = folder / f".{final.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    if images is not None:
        images.save(staging)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    (staging / STATE).parent.mkdir()
    save_file(tensors, staging / TENSORS)
    content = {"step": state.step, "data": state.data}
    (staging / STATE).write_text(json.dumps(content), encoding="utf-8")
    _flush(staging)
    os.replace(staging, final)
    _flush_path(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _flush(folder: Path) -> None:
    """Waits until the folder's files are on the disk, so that the rename cannot overtake them."""
    for path in [*folder.rglob("*"), folder]:
        _flush_path(path)


def _flush_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if is_checkpoint(path))


def latest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint to resume from")
    return found[-1]


def load_state(checkpoint: Path) -> TrainerState:
    """Reads the trainer's part. The weights are read by `from_pretrained`.

    Raises:
        CheckpointError: it is damaged or lacks a file.
    """
    move_trainer_state(checkpoint)
    try:
        content = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be read: {error}") from error
    return TrainerState(content["step"], content["data"], tensors)
