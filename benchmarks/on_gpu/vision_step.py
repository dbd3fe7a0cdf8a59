"""A hybrid training step with images: tokens/s, MFU, peak memory, and the largest kernels."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measuring import pick_device
from benchmarks.on_gpu.part import Context
from benchmarks.on_gpu.train_step import largest_kernels, measure, with_and_without_liger
from benchmarks.vision_step import WORKLOADS, VisionWorkload, model_flops, vision_step


def run(context: Context) -> dict[str, Any]:
    """Figures of recap-fast's step as the trainer runs it, and without Liger."""
    workload, device = WORKLOADS[context.shapes], pick_device()
    return with_and_without_liger(lambda liger: _figures(workload, device, liger), device)


def _figures(workload: VisionWorkload, device: torch.device, liger: bool) -> dict[str, Any]:
    step, update = vision_step(workload, device, liger=liger)
    record = measure(step, workload, model_flops(workload, update), device)
    record |= {
        "supervised_rows": workload.supervised,
        "image_tokens": workload.image_tokens,
        "packed_tokens": update.num_packed_tokens,
        "batches": len(update.batches),
    }
    record["kernels"] = largest_kernels(step, device)
    return record
