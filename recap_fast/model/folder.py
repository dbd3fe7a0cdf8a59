"""A checkpoint's folder: the model at its top, the trainer's state in a folder of its own below.

vLLM loads every *.safetensors that it finds at the top of a folder, whatever its name.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from recap_fast.types import UserError

STATE = Path("trainer", "state.json")
TENSORS = Path("trainer", "state.safetensors")
_OLD_STATE = "trainer_state.json"
_OLD_TENSORS = "trainer_state.safetensors"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a trainer's state, in today's place or beside the weights."""
    return (folder / STATE).exists() or (folder / _OLD_STATE).exists()


def move_trainer_state(folder: Path) -> None:
    """Moves the state that earlier releases wrote beside the weights to where it belongs. Does
    nothing in any other folder.

    Whenever it is interrupted the checkpoint stays complete, and the next call goes on.

    Raises:
        UserError: the folder cannot be written.
    """
    # transformers' own trainer has a trainer_state.json too, but none of these tensors.
    if not (folder / _OLD_TENSORS).exists() and not (
        (folder / _OLD_STATE).exists() and (folder / TENSORS).exists()
    ):
        return
    try:
        (folder / TENSORS.parent).mkdir(exist_ok=True)
        for old, new in ((_OLD_TENSORS, TENSORS), (_OLD_STATE, STATE)):
            with suppress(FileNotFoundError):  # done before, or by another process just now
                os.replace(folder / old, folder / new)
    except OSError as error:
        raise UserError(
            f"{folder}: an earlier release put {_OLD_TENSORS} beside the weights, which vLLM takes "
            f"for weights, and it cannot be moved into {TENSORS.parent}/: {error.strerror}. Give a "
            f"copy of the folder without it"
        ) from error
