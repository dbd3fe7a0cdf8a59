"""What a trainer tells a vLLM server of the weights that it sends, and how the server reads them.

Both sides import this file. What is told is JSON: numbers, names and handles, each checked for what
it stands for, and nothing is unpickled.
"""

from __future__ import annotations

import base64
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import torch
from torch import Tensor

from recap_fast.rollout import cuda_memory

MEMORY_NAME = "recap-fast-weights"
PIECE = 128 * 2**20
"""Bytes of a broadcast: large enough to be fast, and all that it takes of the trainer's GPU."""
_ALIGNMENT = 64
"""Bytes."""

_Result = TypeVar("_Result")


class Group(Protocol):
    """The trainer, whose rank is 0, and the processes of some servers."""

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's bytes to all: uint8[n], in the order of the device's current stream."""
        ...

    def abort(self) -> None:
        """Ends what is under way, from another thread too, and the group with it."""
        ...


@dataclass
class GroupInfo:
    """A server's place in a group that a trainer makes."""

    unique_id: str
    """That NCCL knows the group by, in base 64."""
    rank: int
    """Of the server's first process; the others follow."""
    world_size: int
    timeout: float
    """Seconds in which the group must be there, and later every version of the weights."""
    cumem: str | None
    """NCCL_CUMEM_ENABLE as the trainer has it: a group whose sides differ in it hangs."""

    def check(self) -> None:
        """Raises `RuntimeError` where this process differs from the trainer in what must agree."""
        ours = os.environ.get("NCCL_CUMEM_ENABLE")
        if ours != self.cumem:
            raise RuntimeError(
                f"NCCL_CUMEM_ENABLE is {ours or 'unset'} in the server and "
                f"{self.cumem or 'unset'} in the trainer: start both with the same"
            )


@dataclass
class SharedWeights:
    """Weights that lie in a memory file of the trainer's, on the same host.

    The file has no name in any file system, and is gone with its last user: no death of either side
    leaves memory behind.
    """

    pid: int
    descriptor: int
    index: list[list[Any]]
    """[name, dtype, shape, offset in bytes] of each weight."""

    def open(self) -> BinaryIO:
        """The file.

        Raises:
            RuntimeError: it is not there, or not a file of weights: whoever reaches this server's
                control routes shall not have it read another.
        """
        path = Path(f"/proc/{self.pid}/fd/{self.descriptor}")
        try:
            if os.readlink(path).startswith(f"/memfd:{MEMORY_NAME}"):
                return path.open("rb")
            problem = "it is another file"
        except OSError as error:
            problem = f"{error.strerror}; the trainer must run on the same host, as the same user"
        raise RuntimeError(f"the trainer's weights at {path} cannot be read: {problem}")

    def bytes(self) -> Tensor:
        """All of them, as a view of the file: uint8[n]. Nothing is copied."""
        with self.open() as file:
            if not os.fstat(file.fileno()).st_size:
                return torch.empty(0, dtype=torch.uint8)  # there is no mapping of nothing
            # Private: torch wants memory to be writable, and what it wrote would not reach the file
            view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        return torch.frombuffer(view, dtype=torch.uint8)


@dataclass
class DeviceWeights:
    """Weights that lie in the memory of a GPU of the trainer's, on the same host."""

    handle: str
    """CUDA's handle of the memory, in base 64."""
    nbytes: int
    index: list[list[Any]]

    @contextmanager
    def opened(self, device: torch.device) -> Iterator[Tensor]:
        """The memory: uint8[nbytes], until the context ends.

        Raises:
            RuntimeError: `device` cannot reach it.
        """
        raw = base64.b64decode(self.handle, validate=True)
        with cuda_memory.opened(raw, self.nbytes, device) as memory:
            yield memory


@dataclass
class BroadcastWeights:
    """Weights that the trainer sends to a group of servers, piece by piece."""

    nbytes: int
    piece: int
    """Bytes of each piece but the last."""
    index: list[list[Any]]
    version: str | None = None
    """By which servers shall know the copy that they keep for a patch to come; None: they keep
    none."""
    against: str | None = None
    """The copy that this is a patch of (`weight_patch`); None: these are all weights."""

    def receive(self, group: Group, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Takes all pieces, and gives the tensors as they are complete."""
        yield from unpacked(self.index, self._pieces(group, device), device)

    def _pieces(self, group: Group, device: torch.device) -> Iterator[Tensor]:
        buffer = torch.empty(min(self.piece, self.nbytes), dtype=torch.uint8, device=device)
        for start in range(0, self.nbytes, self.piece):
            piece = buffer[: min(self.piece, self.nbytes - start)]
            group.broadcast(piece)
            yield piece

    def send(self, weights: Tensor, group: Group, device: torch.device) -> Iterator[int]:
        """The trainer's side: sends a piece between each two numbers of bytes that are sent.

        Args:
            weights: uint8[nbytes], on the host.
        """
        buffer = torch.empty(min(self.piece, self.nbytes), dtype=torch.uint8, device=device)
        for start in range(0, self.nbytes, self.piece):
            piece = buffer[: min(self.piece, self.nbytes - start)]
            piece.copy_(weights[start : start + len(piece)])
            group.broadcast(piece)
            yield start + len(piece)


def place(index: list[list[Any]], name: str, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Gives a weight its place behind those that an index has. Returns where the next begins."""
    start = 0
    if index:
        _, last_dtype, last_shape, last_start = index[-1]
        start = last_start + _padded(_nbytes(getattr(torch, last_dtype), last_shape))
    index.append([name, str(dtype).removeprefix("torch."), list(shape), start])
    return start + _padded(_nbytes(dtype, shape))


def views(index: Sequence[Sequence[Any]], memory: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a piece of memory, uint8[n]. Nothing is copied."""
    for name, dtype_name, shape, offset in index:
        dtype = getattr(torch, dtype_name)
        yield name, memory[offset : offset + _nbytes(dtype, shape)].view(dtype).view(shape)


def shared_tensors(weights: SharedWeights) -> Iterator[tuple[str, Tensor]]:
    """The tensors, as views of the file."""
    yield from views(weights.index, weights.bytes())


def unpacked(
    index: Sequence[Sequence[Any]], pieces: Iterator[Tensor], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Tensors out of memory that comes in pieces, which may be overwritten by the next.

    Takes all pieces, also those behind the last tensor: somebody else waits to send them.
    """
    start, piece = 0, torch.empty(0, dtype=torch.uint8, device=device)
    for name, dtype_name, shape, offset in index:
        dtype = getattr(torch, dtype_name)
        whole = torch.empty(_nbytes(dtype, shape), dtype=torch.uint8, device=device)
        filled = 0
        while filled < len(whole):
            begin = offset + filled - start
            if begin >= len(piece):
                start, piece = start + len(piece), next(pieces)
                continue
            part = piece[begin : begin + len(whole) - filled]
            whole[filled : filled + len(part)] = part
            filled += len(part)
        yield name, whole.view(dtype).view(shape)
    for _ in pieces:
        pass


def in_thread(work: Callable[[], _Result], name: str) -> Future[_Result]:
    """Starts what may never return, in a thread that the process does not wait for at its end."""
    future: Future[_Result] = Future()
    future.set_running_or_notify_cancel()  # it cannot be cancelled

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (whoever asks gets it)
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
