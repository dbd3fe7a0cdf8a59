"""The model of a checkpoint alone, as a folder of Hugging Face's, by one process or several.

The first process looks and makes the folder, with the weights' files at their full length; then
each reads its share of the tensors' rows, converts them where asked to, and writes them to where
they belong (`recap_fast.training.safetensors_writer`). What comes out does not depend on how many
they are, and none of them holds more than `_PIECE_BYTES` at a time.

Adapters are the exception: the first process adds them to their base, which it holds whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recap_fast.model.folder import STATE, is_checkpoint, move_trainer_state
from recap_fast.model.lora import ADAPTER_SETTINGS, ADAPTERS_FILE, is_adapter
from recap_fast.model.merged import load_merged
from recap_fast.model.weight_files import find_weight_files
from recap_fast.paths import shown
from recap_fast.training.checkpoint import CheckpointError, list_checkpoints
from recap_fast.training.distributed import World, start_host_world
from recap_fast.training.safetensors_writer import (
    DTYPES,
    FILE_BYTES,
    INDEX,
    Kind,
    begin_file,
    flush,
    lay_out_weights,
    write_at,
)
from recap_fast.types import UserError

_PIECE_BYTES = 64 * 2**20
"""Of rows that a process reads, converts and writes at a time; of a single row where that is more.
"""
_TIMEOUT = 1800.0
"""Seconds that processes wait for each other: they have equal shares, but not equally fast disks,
and while one merges adapters the others wait."""


@dataclass(frozen=True, slots=True)
class _Move:
    """A tensor's way from the checkpoint into the export.

    Attributes:
        source, target: names of files in the two folders.
        begin: the tensor's first byte in the target.
        dtype: torch's name of it, as it is written.
    """

    name: str
    source: str
    target: str
    begin: int
    dtype: str
    shape: Sequence[int]

    @property
    def row_bytes(self) -> int:
        """Of an entry of dimension 0; of all of a scalar."""
        return math.prod(self.shape[1:]) * getattr(torch, self.dtype).itemsize

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1


def export_model(source: Path, output: Path | None = None, dtype: str | None = None) -> Path:
    """Writes the model of a checkpoint, without the trainer's state, and returns the new folder.
    Where torchrun has started several processes, each calls it, and writes a part.

    Adapters are added to their base.

    Args:
        source: a run's folder, for its newest checkpoint, or a checkpoint.
        output: a folder that is not there yet; RUN/export/step-NNNNNN by default. All processes
            must see it, and the source.
        dtype: torch's name of what all floating-point weights become; None leaves them as they
            are: float32 what was trained, and what was frozen as it was published, the base of
            adapters among it.

    Raises:
        CheckpointError: there is no checkpoint, or something else where it should go, or it cannot
            be read or written, or has values that `dtype` cannot hold.
        UserError: the base of the adapters cannot be loaded.
        RankError: one of these in another process.
    """
    world = start_host_world(_TIMEOUT, "the export's limit")
    world.stage = "exporting"
    try:
        with world.failures_named():
            return _export(source, output, dtype, world)
    finally:
        world.close()


def _export(source: Path, output: Path | None, dtype: str | None, world: World) -> Path:
    found = world.on_main(lambda: [str(path) for path in _find(source, output)])
    checkpoint, output = map(Path, found)
    staging = output.with_name(f".{output.name}.tmp")
    try:
        moves = [
            _Move(*values) for values in world.on_main(lambda: _prepare(checkpoint, staging, dtype))
        ]
        world.together(lambda: _write(moves, checkpoint, staging, world))
        world.on_main(lambda: _finish(staging, output))
    finally:  # no process writes any more; after the end there is no such folder
        if world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
    return output


def _find(source: Path, output: Path | None) -> tuple[Path, Path]:
    """The checkpoint, and the folder to make."""
    found = [source] if is_checkpoint(source) else list_checkpoints(source / "checkpoints")
    if not found:
        raise CheckpointError(f"{shown(source)}: wanted a run with a checkpoint, or a checkpoint")
    checkpoint = found[-1].absolute()
    if output is not None:
        if os.path.lexists(output):
            raise CheckpointError(
                f"{shown(output)}: wanted a folder that is not there yet: give --output"
            )
        return checkpoint, output.absolute()
    output = checkpoint.resolve().parents[1] / "export" / checkpoint.name
    if os.path.lexists(output):
        raise CheckpointError(
            f"{checkpoint.name} has been exported before, and is in {output}: use that folder, or "
            f"remove it to export again, or name another one with --output"
        )
    return checkpoint, output


def _prepare(checkpoint: Path, staging: Path, dtype: str | None) -> list[tuple[Any, ...]]:
    """Makes the folder, complete but for the bytes of the tensors; these as `_Move`'s values."""
    move_trainer_state(checkpoint)
    shutil.rmtree(staging, ignore_errors=True)  # of an export that was killed
    with _failures_of(staging, "written"):
        staging.mkdir(parents=True)
        for path in checkpoint.iterdir():
            _copy(path, staging)
    if is_adapter(checkpoint):
        merged = load_merged(str(checkpoint), None if dtype is None else getattr(torch, dtype))
        with _failures_of(staging, "written"):
            merged.save_pretrained(staging, max_shard_size=FILE_BYTES)
        return []
    kinds, files = _read_kinds(checkpoint, dtype)
    groups: dict[str, dict[str, Kind]] = defaultdict(dict)
    with _failures_of(staging, "written"):
        if dtype is not None:
            _set_dtype(staging / "config.json", dtype)
        for name, file in lay_out_weights(staging, kinds).items():
            groups[file][name] = kinds[name]
    moves = []
    for file, inside in groups.items():
        with _failures_of(staging / file, "written"):
            begins = begin_file(staging / file, inside)
        moves += [
            _Move(name, files[name], file, begin, *_plain(kinds[name]))
            for name, begin in begins.items()
        ]
    return [astuple(move) for move in moves]


def _copy(path: Path, folder: Path) -> None:
    """What goes with the weights, as it is."""
    if path.name in (STATE.parent.name, INDEX, ADAPTER_SETTINGS, ADAPTERS_FILE):
        return
    if path.is_dir():
        shutil.copytree(path, folder / path.name)
    elif path.suffix != ".safetensors":
        shutil.copy2(path, folder)


def _plain(kind: Kind) -> tuple[str, tuple[int, ...]]:
    return str(kind[0]).removeprefix("torch."), kind[1]


def _read_kinds(checkpoint: Path, dtype: str | None) -> tuple[dict[str, Kind], dict[str, str]]:
    """Of each tensor what it will be, and the name of the file that it is in."""
    try:
        files = find_weight_files(checkpoint).files
    except UserError as error:
        raise CheckpointError(str(error).removeprefix("model.path: ")) from error
    names: dict[Path, list[str]] = defaultdict(list)
    for name, path in files.items():
        names[path].append(name)
    kinds: dict[str, Kind] = {}
    for path in sorted(names):
        with _failures_of(path, "read"), safe_open(path, framework="pt") as file:
            for name in sorted(names[path]):
                stored = file.get_slice(name)
                found = _TORCH_DTYPES[stored.get_dtype()]
                if dtype is not None and found.is_floating_point:
                    found = getattr(torch, dtype)
                kinds[name] = (found, tuple(stored.get_shape()))
    return kinds, {name: path.name for name, path in files.items()}


_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def _set_dtype(path: Path, dtype: str) -> None:
    """Has a model's configuration, and those of its parts, say what its weights are."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *config.values()):
        if isinstance(part, dict) and ("model_type" in part or part is config):
            part.pop("torch_dtype", None)  # its name in earlier releases of transformers
            part["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _pieces(moves: Sequence[_Move], rank: int, size: int) -> Iterator[tuple[_Move, int, int]]:
    """A process's share: tensors with a range of their rows. The bytes of a process lie together
    in the files, and all have as many but for a piece."""
    total = sum(move.rows * move.row_bytes for move in moves)
    first, end = total * rank // size, total * (rank + 1) // size
    at = 0
    for move in moves:
        if not move.row_bytes:
            continue
        step = max(1, _PIECE_BYTES // move.row_bytes)
        for start in range(0, move.rows, step):
            stop = min(start + step, move.rows)
            if first <= at < end:
                yield move, start, stop
            at += (stop - start) * move.row_bytes


def _write(moves: Sequence[_Move], checkpoint: Path, staging: Path, world: World) -> None:
    """Writes this process's share, and waits until it is on the disk."""
    shares: dict[str, list[tuple[_Move, int, int]]] = defaultdict(list)
    for piece in _pieces(moves, world.rank, world.size):
        shares[piece[0].target].append(piece)
    for target, pieces in shares.items():
        path = staging / target
        with _open(path) as write:
            for move, start, stop in pieces:
                rows = _read(checkpoint / move.source, move, start, stop)
                write(move.begin + start * move.row_bytes, rows)


def _read(path: Path, move: _Move, start: int, stop: int) -> Tensor:
    """Rows of a tensor, as they are written."""
    with _failures_of(path, "read"), safe_open(path, framework="pt") as file:
        stored: Tensor
        if not move.shape:
            stored = file.get_tensor(move.name)
        else:
            stored = file.get_slice(move.name)[start:stop]
        rows = stored.to(getattr(torch, move.dtype))
    if rows.dtype != stored.dtype and bool((rows.isinf() & ~stored.isinf()).any()):
        largest = float(stored[stored.isfinite()].abs().max())
        raise CheckpointError(
            f"{path}: {move.name} has values up to {largest:.3g}, which {move.dtype} cannot hold: "
            f"give another --dtype"
        )
    return rows


@contextmanager
def _open(path: Path) -> Iterator[Callable[[int, Tensor], object]]:
    """A function that writes tensors at a byte of a file; they are on the disk at the end."""
    with _failures_of(path, "written"):
        handle = os.open(path, os.O_WRONLY)  # not read: as in `SharedFilesWriter`

    def write(begin: int, tensor: Tensor) -> None:
        with _failures_of(path, "written"):
            write_at(handle, begin, tensor)

    try:
        yield write
        with _failures_of(path, "written"):
            os.fsync(handle)
    finally:
        os.close(handle)


def _finish(staging: Path, output: Path) -> None:
    with _failures_of(output, "written"):
        flush([*staging.rglob("*"), staging])
        os.replace(staging, output)
        flush([output.parent])


@contextmanager
def _failures_of(path: Path, done: str) -> Iterator[None]:
    """Names the file, or folder, that could not be read or written.

    Raises:
        CheckpointError: in the place of the errors of the system and of safetensors.
    """
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        named = getattr(error, "filename", None)
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise CheckpointError(f"{named or path}: cannot be {done}: {why}") from error
