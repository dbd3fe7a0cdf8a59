"""AdamW's step alone, by the state that it keeps: time, bytes a parameter, and what it needs."""

from __future__ import annotations

from typing import Any, get_args

import torch

from benchmarks.measuring import free_memory, median_seconds, pick_device
from benchmarks.on_gpu.part import Context
from recap_fast.config import OptimizerConfig
from recap_fast.training.compact_adamw import make_optimizer

STATES = get_args(OptimizerConfig.model_fields["state"].annotation)


def run(context: Context) -> dict[str, Any]:
    """For each state, of eight matrices and a vector."""
    device, edge = pick_device(), 512 if context.rehearse else 8192
    return {state: measure(state, edge, device) for state in STATES}


def measure(
    state: str, edge: int, device: torch.device, rounds: int = 5
) -> dict[str, float | None]:
    """Of matrices [edge, edge], one step."""
    shapes = [(edge, edge)] * 8 + [(edge,)]
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    optimizer: Any = make_optimizer(parameters, OptimizerConfig(state=state), seed=0)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.grad_scale = torch.ones((), device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()  # makes the state
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(optimizer.step, device, rounds)
    kept = sum(t.nbytes for found in optimizer.state.values() for t in found.values())
    count = sum(parameter.numel() for parameter in parameters)
    there = kept + 8 * count
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    # Weight and state are read and written, the gradient is read.
    terabytes = (2 * kept + 12 * count) / 1e12
    optimizer = parameters = None
    free_memory(device)
    return {
        "milliseconds": 1e3 * seconds,
        "nanoseconds_a_parameter": 1e9 * seconds / count,
        "terabytes_a_second": terabytes / seconds,
        "state_bytes_a_parameter": kept / count,
        "mib_beyond_what_stays": None if peak is None else (peak - there) / 2**20,
    }
