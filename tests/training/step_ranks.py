"""A rank's part of tests/training/test_sharded_steps.py: each case that it is given, in turn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from recap_fast.model import sharding
from recap_fast.training.distributed import World, _mesh
from tests.processes import report
from tests.training.sharded_steps import Case, head_gradient_error, run_case


def main(folder: str, cases: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    reports = {}
    for case in (Case(**fields) for fields in json.loads(cases)):
        mesh = _mesh("cpu", size, case.replicas)
        own = Path(folder) / f"{case.name}-{rank}"
        own.mkdir()
        outcome = run_case(case, own, World(rank, size, torch.device("cpu"), mesh))
        if rank == 0:
            save_file(outcome.tensors, Path(folder) / f"{case.name}.safetensors")
        reports[case.name] = {"stats": outcome.stats, "rows": outcome.rows}
    mesh = _mesh("cpu", size, 1)
    errors = {}
    for wide in (True, False):
        if not wide:
            sharding._take_float32_gradients = lambda *_: None
        for tied in (True, False):
            name = f"{'tied' if tied else 'untied'}, {'float32' if wide else 'bfloat16'}"
            errors[name] = head_gradient_error(tied, mesh, rank, size)
    dist.destroy_process_group()
    report(cases=reports, head_errors=errors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
