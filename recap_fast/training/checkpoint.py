"""Checkpoints: a Hugging Face model folder, with the trainer's state in a folder inside it.

A checkpoint is written under a temporary name, flushed, and renamed: a folder called step-* is
always complete. Tensors are safetensors, the rest is JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    """A checkpoint that is not there, or cannot be written or continued from."""


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

    Raises:
        CheckpointError: it cannot be written; what had been is removed.
    """
    final = folder / f"step-{state.step:06d}"
    if is_checkpoint(final):  # complete, of the very same step
        return final
    with _staging(folder, final.name) as staging:
        _save_model(staging, model, tokenizer, images)
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
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


def check_savable(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    images: ImageEncoder | None = None,
) -> None:
    """Writes what `save_checkpoint` would, less the tensors, and removes it: before a run is paid.

    Raises:
        CheckpointError: a checkpoint could not be written.
    """
    with _staging(folder, "trial") as staging:
        _save_model(staging, model, tokenizer, images, state_dict={})


def _save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    images: ImageEncoder | None,
    **options: Any,
) -> None:
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    if images is not None:
        images.save(folder)


@contextmanager
def _staging(folder: Path, name: str) -> Iterator[Path]:
    """A folder to write a checkpoint in, which is gone at the end unless it was renamed."""
    staging = folder / f".{name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield staging
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder / name}: cannot be written: {why}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
