"""Weights to a vLLM server of its own, by each transfer: seconds and bytes, with random weights.

Where there is one GPU, trainer and server share it; NCCL, which wants one for each, is left out.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import pick_device
from benchmarks.on_gpu.part import Context, SkipPartError
from benchmarks.training_step import WORKLOADS, build_model
from recap_fast.config import RolloutConfig
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.protocol import EngineError, iter_weights
from recap_fast.rollout.server_command import check_installed
from tests.tiny_tokenizer import tiny_tokenizer

SYNCS = 3
CHANGED = 0.05
"""Share of the values that differ from sync to sync: about what a first step at a learning rate of
3e-6 changes in bfloat16 (`benchmarks.weight_changes`)."""


def run(context: Context) -> dict[str, Any]:
    """By transfer: the first update, the median of the others, and the bytes of the last.

    Raises:
        SkipPartError: no server can be started here.
    """
    device = pick_device()
    try:
        check_installed(takes_images=False)
    except EngineError as reason:
        raise SkipPartError(str(reason)) from None
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    kinds = {0: ["shared_memory"], 1: ["shared_memory", "ipc"]}.get(
        gpus, ["shared_memory", "ipc", "nccl", "nccl_sparse"]
    )
    model = build_model(WORKLOADS[context.shapes].model, device, packed=False)
    found: dict[str, Any] = {"gpus": gpus}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        if gpus == 1:
            os.environ["LOCAL_WORLD_SIZE"] = "0"  # the first GPU behind those that train
        for kind in kinds:
            found[kind] = _measure(kind, model, folder, context.work, device, shares=gpus == 1)
    return found


def _measure(
    kind: str, model: Any, folder: str, logs: Path, device: torch.device, *, shares: bool
) -> dict[str, float]:
    server = {"transfer": kind, "gpu_memory_utilization": 0.4 if shares else 0.9, "timeout": 120.0}
    config = {"engine": "vllm_server", "cpu_kv_cache_gib": 0.05, "server": server}
    engine = make_engine(
        RolloutConfig.model_validate(config),
        model=model,
        model_path=folder,
        tokenizer=tiny_tokenizer(),
        max_model_len=64,
        seed=0,
        device=device,
        logs=logs / kind,
    )
    times, sent = [], []
    try:
        for version in range(SYNCS):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 0.01 * (torch.rand_like(parameter) < CHANGED))
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            # Ends when the server has answered with digests of what it holds.
            engine.sync_weights(iter_weights(model, engine.dtype), version)
            times.append(time.perf_counter() - start)
            sent.append(engine.take_metrics()["rollout/sync_bytes"] / 1e9)
    finally:
        engine.close()
    whole = sum(parameter.numel() for parameter in model.parameters()) * engine.dtype.itemsize
    seconds = statistics.median(times[1:])  # without what forms a group
    return {
        "sync_seconds": seconds,
        "sync_first_seconds": times[0],
        "sync_gigabytes": whole / 1e9,
        "sync_gigabytes_per_second": whole / 1e9 / seconds,
        "sync_broadcast_gigabytes": sent[-1],
    }
