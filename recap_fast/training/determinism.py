"""Training that gives the same bits every time, on CUDA too.

Without it two things there add float32 numbers in the order in which threads come: the gradients of
rows that are read several times (a shared prompt's keys and values, hidden states by index), and
flash attention's backward pass. Nothing of the kind happens on a CPU, nor in our own kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from recap_fast.model.sharding import Sliceable

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def prepare_determinism() -> None:
    """Sets what cuBLAS reads when it is first used. Call before anything runs on CUDA."""
    os.environ.setdefault(_WORKSPACE, ":4096:8")


@contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    """Lets torch take deterministic algorithms only, or leaves its choice as it is.

    Around the training step alone: a rollout engine in the same process keeps its own choice.

    Raises:
        RuntimeError: by torch, where an operation has no deterministic algorithm.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # It finds reads of memory that was never written, at the cost of writing all of it.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        settings.fill_uninitialized_memory = filled


def generator_states(rank: int, device: torch.device) -> dict[str, Tensor]:
    """States of torch's own generators in this process, by kind and rank."""
    states = {f"cpu/{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"cuda/{rank}"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: Mapping[str, Sliceable], rank: int, device: torch.device) -> None:
    """Takes back what `generator_states` gave. A rank that was not there before keeps its own.

    Earlier releases, of one process, gave no rank.
    """
    for kind, restore in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        state = states.get(f"{kind}/{rank}", states.get(kind) if rank == 0 else None)
        if state is not None and kind in ("cpu", device.type):
            restore(state[...])
