"""Puts the runtime of `cuda_stand_in.c` in the place of CUDA's, in this process."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from recap_fast.rollout import cuda_memory

LIBRARY = "stand_in.so"


def build(folder: Path) -> Path | None:
    """Compiles it. None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = folder / LIBRARY
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def use(library: Path, setattr: Any = setattr) -> None:
    runtime = ctypes.CDLL(str(library))
    runtime.cudaGetErrorString.restype = ctypes.c_char_p

    def tensor_at(pointer: ctypes.c_void_p, nbytes: int) -> torch.Tensor:
        assert pointer.value is not None
        return torch.frombuffer(
            (ctypes.c_byte * nbytes).from_address(pointer.value), dtype=torch.uint8
        )

    setattr(cuda_memory, "_runtime", lambda: runtime)
    setattr(cuda_memory, "_tensor_at", tensor_at)
    setattr(cuda_memory, "_current", lambda device: nullcontext())
    setattr(cuda_memory, "_synchronize", lambda device: None)
