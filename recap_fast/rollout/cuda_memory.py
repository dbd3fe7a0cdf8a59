"""Memory of a GPU that two processes of a host share, by CUDA's handles.

The runtime is called as it is: torch's own sharing of tensors counts references in named shared
memory, one count for each receiver and each time, which a death leaves behind. Here one piece of
memory lives as long as the trainer, and who opens it closes it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t."""

    _fields_ = (("reserved", ctypes.c_byte * 64),)


class ExportedMemory:
    """Memory of a GPU that other processes may open, until `close`.

    Attributes:
        bytes: uint8[nbytes].
        handle: for `opened`, in another process.

    Raises:
        RuntimeError: CUDA has not so much, or cannot share it.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._pointer = ctypes.c_void_p()
        self._device = device
        handle = _Handle()
        with _current(device):
            what = f"sharing {nbytes / 2**30:.2f} GiB of {device}"
            _call(what, "cudaMalloc", ctypes.byref(self._pointer), ctypes.c_size_t(nbytes))
            _call(what, "cudaIpcGetMemHandle", ctypes.byref(handle), self._pointer)
        self.handle = bytes(handle)
        self.bytes = _tensor_at(self._pointer, nbytes)

    def close(self) -> None:
        del self.bytes
        with _current(self._device):
            _call("freeing shared memory", "cudaFree", self._pointer)


@contextmanager
def opened(handle: bytes, nbytes: int, device: torch.device) -> Iterator[Tensor]:
    """Another process's memory, uint8[nbytes]; nobody may use it after the context.

    Args:
        device: of this process, which reads the memory itself or from a neighbour.

    Raises:
        RuntimeError: `device` cannot reach it.
    """
    if len(handle) != ctypes.sizeof(_Handle):
        raise RuntimeError(f"wanted a handle of 64 bytes, got {len(handle)}")
    pointer = ctypes.c_void_p()
    with _current(device):
        _call(
            "opening the trainer's GPU memory (which needs the same host, and GPUs that reach each "
            "other; --set rollout.server.transfer=shared_memory does without)",
            "cudaIpcOpenMemHandle",
            ctypes.byref(pointer),
            _Handle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
        try:
            yield _tensor_at(pointer, nbytes)
        finally:
            _synchronize(device)
            _call("closing the trainer's GPU memory", "cudaIpcCloseMemHandle", pointer)


class _Pointer:
    """Memory as torch takes it from other libraries; it finds out whose GPU's it is."""

    def __init__(self, pointer: ctypes.c_void_p, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer.value, False),
            "version": 3,
        }


def _tensor_at(pointer: ctypes.c_void_p, nbytes: int) -> Tensor:
    return torch.as_tensor(_Pointer(pointer, nbytes))


def _current(device: torch.device) -> Any:
    torch.cuda.init()
    return torch.cuda.device(device)


def _synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)


@cache
def _runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded: another copy of it would know nothing of its state.

    Raises:
        RuntimeError: there is none.
    """
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in maps if "libcudart" in line}
    if not paths:
        raise RuntimeError("torch has loaded no CUDA runtime here (libcudart)")
    library = ctypes.CDLL(min(paths))
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def _call(what: str, function: str, *arguments: Any) -> None:
    """Raises `RuntimeError` with CUDA's reason where a call fails."""
    status = getattr(_runtime(), function)(*arguments)
    if status:
        reason = _runtime().cudaGetErrorString(status).decode()
        _runtime().cudaGetLastError()  # or the next kernel's launch reports it again
        raise RuntimeError(f"{what}: {reason} ({function})")
