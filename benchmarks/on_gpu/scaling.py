"""One GPU's part of the scaling model: an update timed beside its prediction, and two of the rates
that it stands on."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.inputs import Shape
from benchmarks.measuring import free_memory, gemm_tflops, median_seconds, pick_device
from benchmarks.on_gpu.part import Context
from benchmarks.scaling_model import Machine, Work, train_seconds
from benchmarks.scaling_model import Shape as Decoder
from benchmarks.training_step import WORKLOADS, Workload, recap_step


def run(context: Context) -> dict[str, Any]:
    """Seconds of an update as the trainer makes it (FSDP over one process on CUDA), measured and as
    the model has it for an H100; their ratio says what to --set for a prediction of more GPUs."""
    workload, device = WORKLOADS[context.shapes], pick_device()
    edge = 8192 if device.type == "cuda" else 512
    rates = {
        "gemm_tflops": gemm_tflops(Shape(1, edge, edge, edge), device),
        "copy_tbps": _copy_tbps(device),
    }
    free_memory(device)
    step, _, _ = recap_step(workload, device)
    measured = median_seconds(step, device, rounds=3)
    predicted = train_seconds(Machine(), decoder(workload), work(workload), 1)
    total = sum(predicted.values())
    return {
        "workload": workload.name,
        "measured_seconds": measured,
        "predicted_seconds": predicted | {"total": total},
        # The prediction is an H100's.
        "predicted_of_measured": total / measured if device.type == "cuda" else None,
        **rates,
    }


def decoder(workload: Workload) -> Decoder:
    """The workload's model as the scaling model takes it."""
    m = workload.model
    return Decoder(
        workload.name, m.hidden, m.layers, m.heads, m.kv_heads, m.intermediate, m.vocab, tied=True
    )


def work(workload: Workload) -> Work:
    return Work(
        workload.prompts,
        group=workload.group,
        prompt_tokens=workload.prompt_tokens,
        completion_tokens=workload.completion_tokens,
        pass_tokens=workload.max_tokens,
        recompute=float(workload.gradient_checkpointing),
    )


def _copy_tbps(device: torch.device) -> float:
    """Terabytes a second of a copy, read and written."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device) / 1e12
