"""Whole tensors of a sharded model, many in one collective, for whoever takes them one by one.

A collective for each of a model's hundreds of tensors costs more in starts than in bytes. So shards
are laid end to end in a bucket, a decoder layer or several at a time, and gathered together; a
tensor larger than a bucket is gathered alone, and is then whole where it arrives. At no time is
more than a bucket whole, or the one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

BUCKET_BYTES = 2**26
"""Of whole tensors in one collective."""
_ALIGNMENT = 16
"""Bytes: where tensors of any dtype may begin in a bucket."""


def gather_whole(
    named: Iterable[tuple[str, Tensor, torch.dtype]], bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole, in the given order. All processes that share the shards consume alike.

    What is handed on may be a part of a buffer, and is there until the next is asked for. Every
    collective runs on the present stream and is complete before anything of it is handed on.

    Args:
        named: name, tensor, and the dtype in which it is to travel: a sharded tensor is cast
            before the collective; others are handed on as they are.
    """
    bucket: list[_Shard] = []
    for name, tensor, dtype in named:
        shard = _Shard(name, tensor, dtype)
        if bucket and sum(one.whole_bytes for one in [*bucket, shard]) > bucket_bytes:
            yield from _gathered(bucket)
            bucket = []
        bucket.append(shard)
    yield from _gathered(bucket)


@dataclass(frozen=True, slots=True)
class _Shard:
    """One tensor on its way, sharded or not."""

    name: str
    tensor: Tensor
    dtype: torch.dtype

    @property
    def is_spread(self) -> bool:
        return isinstance(self.tensor, DTensor) and self.count > 1

    @property
    def local(self) -> Tensor:
        """This process's part; all of it where nobody has another."""
        return self.tensor.to_local() if isinstance(self.tensor, DTensor) else self.tensor

    @property
    def count(self) -> int:
        """Into how many parts it is cut."""
        tensor = self.tensor
        assert isinstance(tensor, DTensor)
        *copies, shard = tensor.placements
        assert shard == Shard(0), f"{self.name}: wanted shards of the first dimension, got {shard}"
        assert all(isinstance(copy, Replicate) for copy in copies)
        return tensor.device_mesh.size(tensor.device_mesh.ndim - 1)

    @property
    def part_values(self) -> int:
        """Of the largest part, which the others are filled up to."""
        rows, *rest = self.tensor.shape
        return ceil(rows / self.count) * prod(rest)

    @property
    def whole_bytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize if self.is_spread else 0


def _gathered(bucket: list[_Shard]) -> Iterator[tuple[str, Tensor]]:
    spread = [shard for shard in bucket if shard.is_spread]
    if not spread:
        yield from ((shard.name, shard.local) for shard in bucket)
        return
    received, begins = _gather(spread)
    for shard in bucket:
        if not shard.is_spread:
            yield shard.name, shard.local
            continue
        begin, size = begins[shard.name], shard.part_values * shard.dtype.itemsize
        parts = received[:, begin : begin + size].view(shard.dtype)  # [processes, values]
        # Only the last parts are filled up, so the values stand together at the front. Where this
        # is all that was gathered, nothing is copied.
        values = parts.reshape(-1)[: shard.tensor.numel()]
        yield shard.name, values.view(shard.tensor.shape)


def _gather(spread: list[_Shard]) -> tuple[Tensor, dict[str, int]]:
    """All processes' parts as bytes [processes, bytes], and where each tensor's begin."""
    begins, end = {}, 0
    for shard in spread:
        begins[shard.name] = end
        end += shard.part_values * shard.dtype.itemsize
        if len(spread) > 1:
            end = ceil(end / _ALIGNMENT) * _ALIGNMENT
    first = spread[0].tensor
    assert isinstance(first, DTensor)
    mesh = first.device_mesh
    # Where masters wait on the host, their copies for the engine travel between the GPUs.
    own = torch.empty(end, dtype=torch.uint8, device=mesh.device_type)
    for shard in spread:
        local = shard.local.detach()
        begin = begins[shard.name]
        place = own[begin : begin + local.numel() * shard.dtype.itemsize].view(shard.dtype)
        place.copy_(local.reshape(-1))
    received = own.new_empty(spread[0].count, end)
    group = mesh.get_group(mesh.ndim - 1)
    # all_gather_into_tensor's name from torch 2.13 on.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(received.view(-1), own, group=group)
    if received.is_cuda:
        torch.cuda.current_stream(received.device).synchronize()
    return received, begins
