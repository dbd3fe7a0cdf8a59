"""A whole hybrid optimizer step with images on random weights: rollouts and supervised rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.vision_step import WORKLOADS, model_flops, vision_step

TRAINED = {"recap-fast": False, "recap-fast, tower trained": True}


@pytest.mark.parametrize("implementation", TRAINED)
def test_vision_step(
    implementation: str, benchmark: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    workload = WORKLOADS[request.config.getoption("--shapes")]
    train_vision = TRAINED[implementation]
    step, update = vision_step(workload, device, train_vision=train_vision)
    size = (
        f"{workload.name}, {workload.rollouts} rollouts x {workload.completion_tokens}, "
        f"{workload.prompts + workload.supervised} images"
    )
    benchmark.group = f"vision_step {size}"
    rounds = max(2, request.config.getoption("--rounds") // 2)
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    tokens = workload.rollouts * workload.completion_tokens
    benchmark.extra_info.update(
        suite="vision_step",
        implementation=implementation,
        size=size,
        tflops=model_flops(workload, update, train_vision=train_vision) / seconds / 1e12,
        more={"completion tokens/s": tokens / seconds},
    )
