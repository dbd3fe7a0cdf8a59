"""Checkpoints: a folder of Hugging Face's, of a model or of peft's adapters, with the trainer's
state in a folder inside it.

A checkpoint is written under a temporary name, flushed, and renamed: a folder called step-* is
always complete. Tensors are safetensors, the rest is JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recap_fast.model.folder import STATE, TENSORS, is_checkpoint, move_trainer_state
from recap_fast.model.lora import has_adapters, save_settings
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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a checkpoint, read when it is indexed; `[...]` reads all of it."""

    file: Any  # of `safe_open`
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def __getitem__(self, index: Any) -> Tensor:
        if index is Ellipsis:
            return self.file.get_tensor(self.name)
        return self.file.get_slice(self.name)[index]


@dataclass(frozen=True, slots=True)
class StoredState:
    """A `TrainerState` on the disk, of which each process reads what it needs."""

    step: int
    data: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def small_files(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    images: ImageEncoder | None = None,
) -> dict[str, bytes]:
    """What a checkpoint has beside tensors, by name: configurations, tokenizer, processor. They are
    written into `folder` as a trial, before a run is paid, and removed.

    Args:
        images: of a vision-language model; its processor's settings are part of the model.

    Raises:
        CheckpointError: a checkpoint could not be written.
    """
    with _staging(folder, "trial") as staging:
        if has_adapters(model):
            save_settings(model, staging)
        else:
            model.save_pretrained(staging, state_dict={})
        tokenizer.save_pretrained(staging)
        if images is not None:
            images.save(staging)
        found = [path for path in staging.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(staging)): path.read_bytes()
            for path in found
            if path.suffix != ".safetensors"
        }


@contextmanager
def _staging(folder: Path, name: str) -> Iterator[Path]:
    """A folder to write into, which is gone at the end."""
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


def with_what_is_left(error: CheckpointError, folder: Path) -> CheckpointError:
    """The error that ends a run, with what is there to go on from."""
    found = list_checkpoints(folder)
    left = "there is no whole checkpoint, so nothing of what was learnt is kept"
    if found:
        left = f"the newest whole checkpoint is {found[-1]}, from which --resume goes on"
    told = CheckpointError(f"{error}; {left}")
    told.is_shared = error.is_shared
    return told


def load_state(checkpoint: Path) -> StoredState:
    """Opens the trainer's part. The weights are read by `from_pretrained`.

    Raises:
        CheckpointError: it is damaged or lacks a file.
    """
    move_trainer_state(checkpoint)
    try:
        content = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        step, data = content["step"], content["data"]
        file: Any = safe_open(checkpoint / TENSORS, framework="pt")  # stays open: it is mapped
        tensors = {name: StoredTensor(file, name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be read: {error}") from error
    return StoredState(step, data, tensors)
