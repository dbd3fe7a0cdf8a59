from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from recap_fast.training import safetensors_writer as writer
from recap_fast.training.safetensors_writer import header, split_into_files, write_at

DTYPES = sorted(writer.DTYPES, key=str)


def kinds_of(tensors):
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape).to(dtype)


def test_safetensors_reads_what_is_written_in_pieces(tmp_path):
    """Every dtype, a scalar, an empty tensor, and a tensor that is not contiguous."""
    tensors = {f"a/{dtype}": some(dtype, 5, 3) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    tensors["transposed"] = torch.randn(4, 6, dtype=torch.float64).T
    start, begins = header(kinds_of(tensors))
    path = tmp_path / "file.safetensors"
    path.write_bytes(start + bytes(sum(t.nbytes for t in tensors.values())))
    assert all(begin % tensors[name].itemsize == 0 for name, begin in begins.items())
    handle = os.open(path, os.O_WRONLY)
    for name, tensor in tensors.items():
        assert write_at(handle, begins[name], tensor) == tensor.nbytes
    os.close(handle)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), tensor.double()), name


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda handle, data, at: pwrite(handle, data[:7], at))
    tensor = torch.randn(5, 5)
    with (tmp_path / "file").open("wb") as file:
        assert write_at(file.fileno(), 3, tensor) == 100
    assert (tmp_path / "file").read_bytes()[3:] == tensor.numpy().tobytes()


def test_a_dtype_that_files_cannot_hold():
    with pytest.raises(ValueError, match="x: safetensors files have no torch.complex64"):
        header({"x": (torch.complex64, (2,))})


def shard(offsets: tuple[int, ...], sizes: tuple[int, ...], whole: tuple[int, ...]) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(whole))
    return WriteItem(MetadataIndex("x", offsets), WriteItemType.SHARD, tensor_data=data)


def test_where_a_shard_belongs():
    assert writer._offset(shard((3, 0, 0), (2, 4, 5), (8, 4, 5))) == 3 * 20 * 4
    assert writer._offset(shard((), (), ())) == 0
    with pytest.raises(ValueError, match=r"x: wanted shards of dimension 0, got one of \(8, 2\)"):
        writer._offset(shard((0, 2), (8, 2), (8, 4)))


def test_files_are_filled_in_order():
    kinds = {name: (torch.float32, (size,)) for name, size in [("a", 2), ("b", 9), ("c", 1)]}
    kinds |= {"d": (torch.float32, (3,)), "e": (torch.bfloat16, (1,))}
    assert split_into_files(kinds, 16) == [["a"], ["b"], ["c", "d"], ["e"]]
    assert split_into_files(kinds, 10**6) == [list(kinds)]
    assert split_into_files({}, 10) == []
