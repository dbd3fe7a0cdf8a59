"""A whole optimizer step on random weights: packed through recap-fast, padded through TRL."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.liger import patches_undone, skip_without_liger
from benchmarks.measuring import time_step
from benchmarks.training_step import WORKLOADS, Workload, model_flops, recap_step, trl_step

RECAP = {"recap-fast": True, "recap-fast, no Liger": False}
TRL: dict[str, Callable[[Workload], int]] = {
    "TRL, all at once": lambda workload: workload.rollouts,
    "TRL, group by group": lambda workload: workload.group,
    "TRL, one by one": lambda workload: 1,
}
"""Rollouts in one forward pass."""


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    """TRL's model, and that without Liger, must not meet what an earlier test patched."""
    with patches_undone("qwen2"):
        yield


@pytest.mark.parametrize("implementation", [*RECAP, *TRL])
def test_training_step(
    implementation: str,
    benchmark: Any,
    device: torch.device,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    workload: Workload = WORKLOADS[request.config.getoption("--shapes")]
    liger = RECAP.get(implementation, False)
    if implementation in RECAP:
        skip_without_liger(liger, device)
    step, update, model = recap_step(workload, device, liger=liger)
    flops = model_flops(workload, update)
    if implementation not in RECAP:
        pytest.importorskip("trl")
        del step, model
        gc.collect()
        micro_batch = TRL[implementation](workload)
        step = trl_step(workload, device, str(tmp_path), micro_batch)
    size = f"{workload.name}, {workload.rollouts} rollouts x {workload.completion_tokens}"
    tokens = workload.rollouts * workload.completion_tokens
    time_step(step, benchmark, request.config, "training_step", implementation, size, flops, tokens)
