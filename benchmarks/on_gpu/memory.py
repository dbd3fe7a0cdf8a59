"""Memory over steps of varying length: what is reserved and not used must not grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import pick_device
from benchmarks.on_gpu.part import Context
from benchmarks.training_step import WORKLOADS, make_update, recap_optimizer

STEPS = 20
SHORTEST = 0.25
"""Of the workload's completion, the share that a step's rollouts have at least."""
GIB = 2**30


def run(context: Context) -> dict[str, Any]:
    """GiB after each step: peak allocated, reserved, and the gap between the two.

    A gap that rises from the first half of the steps to the second is fragmentation. None of it on
    a device whose memory torch does not count.
    """
    workload, device = WORKLOADS[context.shapes], pick_device()
    optimizer, policy, config = recap_optimizer(workload, device)
    random = np.random.default_rng(0)
    weights = torch.ones(1, device=device)
    steps = []
    for _ in range(STEPS):
        share = random.uniform(SHORTEST, 1.0)
        some = replace(workload, completion_tokens=int(share * workload.completion_tokens))
        update = make_update(some, config, device, policy.attention)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        optimizer.step(update, weights, 1e-6)
        steps.append({"packed_tokens": update.num_packed_tokens, **_memory(device)})
    return {"steps": steps, **_growth(steps)}


def _memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    return {
        "peak_gib": peak / GIB,
        "reserved_gib": reserved / GIB,
        "gap_gib": (reserved - torch.cuda.memory_allocated()) / GIB,
    }


def _growth(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Largest gap of the later half of the steps less that of the earlier."""
    gaps = [step["gap_gib"] for step in steps if "gap_gib" in step]
    if not gaps:
        return {}
    half = len(gaps) // 2
    return {"gap_growth_gib": max(gaps[half:]) - max(gaps[:half])}
