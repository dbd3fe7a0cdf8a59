"""A hybrid training step with images: tokens/s, MFU, peak memory, and the largest kernels."""

from __future__ import annotations

from typing import Any

from benchmarks.measuring import pick_device
from benchmarks.on_gpu.part import Context
from benchmarks.on_gpu.train_step import largest_kernels, measure
from benchmarks.vision_step import WORKLOADS, model_flops, vision_step


def run(context: Context) -> dict[str, Any]:
    """Figures of recap-fast's step, and its ten largest kernels."""
    workload, device = WORKLOADS[context.shapes], pick_device()
    step, update = vision_step(workload, device)
    record = measure(step, workload, model_flops(workload, update), device)
    record |= {
        "supervised_rows": workload.supervised,
        "image_tokens": workload.image_tokens,
        "packed_tokens": update.num_packed_tokens,
        "batches": len(update.batches),
    }
    record["kernels"] = largest_kernels(step, device)
    return record
