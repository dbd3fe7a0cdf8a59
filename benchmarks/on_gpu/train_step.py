"""A whole training step: tokens/s, MFU, peak memory, and the kernels that take its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.inputs import Shape
from benchmarks.measuring import (
    describe_device,
    free_memory,
    gemm_tflops,
    median_seconds,
    pick_device,
)
from benchmarks.on_gpu.part import Context
from benchmarks.training_step import WORKLOADS, Step, Workload, model_flops, recap_step
from benchmarks.vision_step import VisionWorkload

DATASHEET = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200 NVL": 835.0,
             "H200": 989.0, "A100": 312.0}  # fmt: skip
"""Dense bf16 TFLOP/s by what NVIDIA's name of the device contains; the longest match counts."""


def run(context: Context) -> dict[str, Any]:
    """Figures of recap-fast's step as the trainer runs it, and without Liger."""
    workload, device = WORKLOADS[context.shapes], pick_device()
    return with_and_without_liger(lambda liger: _figures(workload, device, liger), device)


def _figures(workload: Workload, device: torch.device, liger: bool) -> dict[str, Any]:
    step, update, _ = recap_step(workload, device, liger=liger)
    record = measure(step, workload, model_flops(workload, update), device)
    record["packed_tokens"] = update.num_packed_tokens
    record["kernels"] = largest_kernels(step, device)
    return record


def with_and_without_liger(
    figures: Callable[[bool], dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    """What `figures` gives with Liger, and in `without_liger` without it.

    That is None where Liger has no part. Without comes first: patches stay for the process.
    """
    without = None
    if device.type == "cuda":
        without = figures(False)
        free_memory(device)
    return figures(True) | {"without_liger": without}


def measure(
    step: Step, workload: Workload | VisionWorkload, flops: float, device: torch.device
) -> dict[str, Any]:
    """Time, speed and memory of a step that has not run yet."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(step, device, rounds=3)
    completion = workload.rollouts * workload.completion_tokens
    edge = 8192 if device.type == "cuda" else 512
    ceiling = gemm_tflops(Shape(1, edge, edge, edge), device)
    sheet = datasheet_tflops(device)
    tflops = flops / seconds / 1e12
    return {
        "workload": workload.name,
        "rollouts": workload.rollouts,
        "completion_tokens": completion,
        "seconds": seconds,
        "completion_tokens_per_second": completion / seconds,
        "tflops": tflops,
        "mfu_of_measured_gemm": tflops / ceiling,
        "mfu_of_datasheet": None if sheet is None else tflops / sheet,
        "measured_gemm_tflops": ceiling,
        "datasheet_tflops": sheet,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "device": describe_device(device),
    }


def datasheet_tflops(device: torch.device) -> float | None:
    """NVIDIA's own figure for dense bf16; None for a device that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [key for key in DATASHEET if all(word in name for word in key.split())]
    return DATASHEET[max(matches, key=len)] if matches else None


def largest_kernels(step: Step, device: torch.device, count: int = 10) -> list[dict[str, Any]]:
    """By the device's own time in one step; on a CPU by operator."""
    on_cuda = device.type == "cuda"
    kind = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = profiler.key_averages()
    total = sum(getattr(event, attribute) for event in events)
    largest = sorted(events, key=lambda event: -getattr(event, attribute))[:count]
    return [
        {
            "name": event.key[:120],
            "calls": event.count,
            "milliseconds": getattr(event, attribute) / 1e3,
            "percent": 100 * getattr(event, attribute) / total,
        }
        for event in largest
    ]
