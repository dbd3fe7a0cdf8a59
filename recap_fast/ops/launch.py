"""Launches Triton kernels, by keyword, or hands their launches to someone who compiles them.

The modules named `triton_*` beside this file choose grids and buffers and launch through here. They
are imported where Triton is asked for, so that recap-fast works without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel, as it would have been made."""

    kernel: Any  # what @triton.jit made
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by parameter name; `num_warps` and `num_stages` among them


_recorders: list[Callable[[Launch], None]] = []


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Runs `kernel` on `device`; does nothing for an empty grid."""
    if 0 in grid:
        return
    if _recorders:
        _recorders[-1](Launch(kernel, grid, arguments))
    elif device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](**arguments)
    else:  # the interpreter, see `why_unavailable`
        kernel[grid](**arguments)


@contextmanager
def recording(recorder: Callable[[Launch], None]) -> Iterator[None]:
    """Hands launches to `recorder` instead of running them; outputs stay unwritten.

    For ahead-of-time compilation of exactly what an operation launches, without a GPU.
    """
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()


@torch.compiler.assume_constant_result  # torch.compile would not get through Triton's settings
def why_unavailable(device: torch.device) -> str | None:
    """The reason why Triton kernels cannot run on tensors of `device`; None where they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from triton import knobs

    if device.type == "cuda" or knobs.runtime.interpret or _recorders:
        return None
    return (
        f"Triton kernels run on CUDA, and the tensors are on {device.type}; "
        f"TRITON_INTERPRET=1 runs them there for debugging"
    )
