"""The same training step through TRL's GRPOTrainer."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.measuring import free_memory, pick_device
from benchmarks.on_gpu.part import Context, SkipPartError
from benchmarks.on_gpu.train_step import measure
from benchmarks.training_step import WORKLOADS, make_config, make_update, model_flops, trl_step


def run(context: Context) -> dict[str, Any]:
    """Figures for several numbers of rollouts in a pass; the fastest is TRL's.

    Raises:
        SkipPartError: TRL is not installed.
        RuntimeError: no setting ran.
    """
    for package in ("trl", "datasets"):
        if find_spec(package) is None:
            raise SkipPartError(f"{package} is not installed")
    workload, device = WORKLOADS[context.shapes], pick_device()
    flops = model_flops(workload, make_update(workload, make_config(workload, device), device))
    found: dict[str, Any] = {}
    for micro_batch in (workload.rollouts, workload.group, 1):
        try:
            with tempfile.TemporaryDirectory() as folder:
                step = trl_step(workload, device, folder, micro_batch)
                found[f"{micro_batch} rollouts a pass"] = measure(step, workload, flops, device)
        except torch.OutOfMemoryError as error:
            found[f"{micro_batch} rollouts a pass"] = {"reason": f"out of memory: {error}"[:200]}
        step = None  # the model goes before the next one comes
        free_memory(device)
    times = {name: entry["seconds"] for name, entry in found.items() if "seconds" in entry}
    if not times:
        raise RuntimeError(f"no setting ran: {found}")
    fastest = min(times, key=lambda name: times[name])
    return {"fastest": fastest, **found[fastest], "settings": found}
