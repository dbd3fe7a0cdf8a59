"""A whole hybrid optimizer step with images on random weights: rollouts and supervised rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.liger import patches_undone, skip_without_liger
from benchmarks.measuring import time_step
from benchmarks.vision_step import WORKLOADS, model_flops, vision_step

STEPS: dict[str, dict[str, bool]] = {
    "recap-fast": {"liger": True},
    "recap-fast, no Liger": {"liger": False},
    "recap-fast, tower trained": {"liger": True, "train_vision": True},
}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    with patches_undone("qwen2_5_vl"):
        yield


@pytest.mark.parametrize("implementation", STEPS)
def test_vision_step(
    implementation: str, benchmark: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    workload = WORKLOADS[request.config.getoption("--shapes")]
    settings = STEPS[implementation]
    skip_without_liger(settings["liger"], device)
    step, update = vision_step(workload, device, **settings)
    size = (
        f"{workload.name}, {workload.rollouts} rollouts x {workload.completion_tokens}, "
        f"{workload.prompts + workload.supervised} images"
    )
    flops = model_flops(workload, update, train_vision=settings.get("train_vision", False))
    tokens = workload.rollouts * workload.completion_tokens
    time_step(step, benchmark, request.config, "vision_step", implementation, size, flops, tokens)
