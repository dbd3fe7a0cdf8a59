"""Whole safetensors files that several processes write at once, each the bytes of its own shards.

A shard of dimension 0 is one run of bytes in the whole tensor, so nothing has to be gathered: the
first process lays the files out, and each writes where its shards belong. What comes out is what
one process would have written, and is read by whatever reads safetensors.

This is the storage of `torch.distributed.checkpoint`, which plans who writes what, and tells all
of an error of one. Its own storages do not serve here: `FileSystemWriter` leaves a pickled
`.metadata`, which its reader unpickles, and `HuggingFaceStorageWriter` writes everything twice,
the second time by one process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""The names that safetensors' headers have for them."""

INDEX = "model.safetensors.index.json"
"""Which file of several each weight is in."""

FILE_BYTES = 5 * 1000**3
"""Of a file of weights, as on the hub."""

Place = tuple[str, int]
"""A file's name inside the folder, and the byte where a tensor begins."""

Kind = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and whole shape."""


def size_in_bytes(kind: Kind) -> int:
    return math.prod(kind[1]) * kind[0].itemsize


def header(tensors: Mapping[str, Kind]) -> tuple[bytes, dict[str, int]]:
    """How a file begins, and the byte at which each tensor does. `len(header)` is the first's.

    Raises:
        ValueError: a dtype that safetensors does not have.
    """
    # Wide ones first, which keeps every tensor aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in names:
        dtype, shape = tensors[name]
        if dtype not in DTYPES:
            raise ValueError(f"{name}: safetensors files have no {dtype}")
        begins[name], end = end, end + size_in_bytes(tensors[name])
        offsets = [begins[name], end]
        content[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    return start, {name: len(start) + begin for name, begin in begins.items()}


class SharedFilesWriter(StorageWriter):
    """Writes the tensors of one save into whole files of a folder.

    Args:
        folder: where the files go.
        lay_out: makes the folder, and says for the tensors of the save, by key, which file each
            goes into (relative to the folder) and under which name. The first process calls it,
            before anything is written.
        finish: called by the first process when all have written and flushed their parts.
    """

    def __init__(
        self,
        folder: Path,
        lay_out: Callable[[Mapping[str, Kind]], Mapping[str, tuple[str, str]]],
        finish: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._lay_out, self._finish = lay_out, finish

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """One writer is for one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **kwargs: object) -> None:
        """There is nothing to set up before the plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Lays the files out, at their full length; every process hears where its tensors go."""
        kinds: dict[str, Kind] = {}
        for item in (item for plan in plans for item in plan.items):
            assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
            data = item.tensor_data
            kinds[item.index.fqn] = (data.properties.dtype, tuple(data.size))
        by_file: dict[str, dict[str, str]] = {}
        for key, (file, name) in self._lay_out(kinds).items():
            by_file.setdefault(file, {})[name] = key
        places: dict[str, Place] = {}
        for file, keys in by_file.items():
            inside = {name: kinds[key] for name, key in keys.items()}
            begins = begin_file(self._folder / file, inside)
            places |= {key: (file, begins[name]) for name, key in keys.items()}
        return [dataclasses.replace(plan, storage_data=places) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this process's shards, and waits until they are on the disk."""
        by_file: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            by_file.setdefault(plan.storage_data[item.index.fqn][0], []).append(item)
        results = []
        for file, items in by_file.items():
            # Not opened for reading: a client of NFS then sends just the bytes written, where it
            # would else write back whole pages, over the neighbours' shards in them.
            handle = os.open(self._folder / file, os.O_WRONLY)
            try:
                for item in items:
                    begin = plan.storage_data[item.index.fqn][1] + _offset(item)
                    data = planner.resolve_data(item)
                    assert isinstance(data, Tensor)
                    count = write_at(handle, begin, data)
                    results.append(WriteResult(item.index, count, (file, begin)))
                os.fsync(handle)
            finally:
                os.close(handle)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._finish()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def begin_file(path: Path, kinds: Mapping[str, Kind]) -> dict[str, int]:
    """Makes a file of its full length, without the tensors; where each begins."""
    start, begins = header(kinds)
    with path.open("wb") as stream:
        stream.write(start)
        stream.truncate(len(start) + sum(map(size_in_bytes, kinds.values())))
    return begins


def _offset(item: WriteItem) -> int:
    """Bytes from the beginning of the whole tensor to that of a shard."""
    assert item.tensor_data is not None
    chunk, size = item.tensor_data.chunk, item.tensor_data.size
    if chunk.sizes[1:] != size[1:]:
        raise ValueError(
            f"{item.index.fqn}: wanted shards of dimension 0, got one of {tuple(chunk.sizes)} of "
            f"{tuple(size)}"
        )
    first = chunk.offsets[0] if len(chunk.offsets) else 0
    return first * math.prod(size[1:]) * item.tensor_data.properties.dtype.itemsize


def write_at(handle: int, begin: int, tensor: Tensor) -> int:
    """Writes a tensor of the CPU at a byte of an open file; returns how many bytes it has."""
    if tensor.numel() == 0:
        return 0
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    written = 0
    while written < len(data):  # Linux takes 2 GiB at a time
        written += os.pwrite(handle, data[written:], begin + written)
    return written


def split_into_files(kinds: Mapping[str, Kind], limit: int) -> list[list[str]]:
    """Names in their order, in groups of at most `limit` bytes, or of one that is larger."""
    groups: list[list[str]] = []
    room = 0
    for name in kinds:
        size = size_in_bytes(kinds[name])
        if size > room or not groups:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def lay_out_weights(folder: Path, kinds: Mapping[str, Kind]) -> dict[str, str]:
    """The file that each of a model's weights goes into, by name; writes the index of several."""
    groups = split_into_files(kinds, FILE_BYTES)
    if len(groups) == 1:
        return dict.fromkeys(kinds, "model.safetensors")
    files = {
        name: f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        for number, names in enumerate(groups, start=1)
        for name in names
    }
    total = sum(map(size_in_bytes, kinds.values()))
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return files


def flush(paths: Iterable[Path]) -> None:
    """Waits until files and folders are on the disk, so that a rename cannot overtake them."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
