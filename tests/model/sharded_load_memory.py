"""A rank: bytes of memory that its part of a model takes up while it is loaded, at the highest."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from recap_fast.config import ModelConfig
from recap_fast.model import sharded_load
from recap_fast.model.policy import load_policy
from tests.processes import report


def resident(which: str) -> int:
    """Of /proc/self/status, in bytes: VmRSS is all, RssAnon all but the pages of mapped files,
    which a host's processes share and the kernel may drop; VmHWM is the highest VmRSS."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def growth(work: Callable[[], Any]) -> tuple[int, Any]:
    """By how much the resident memory rises above what it is before, and what `work` returns."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the highest so far
    before = resident("VmRSS")
    result = work()
    return resident("VmHWM") - before, result


def main(folder: str, small: str) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    config = ModelConfig(path=folder, dtype="bfloat16", device="cpu")
    sharded_load.load_sharded_policy(config, small, mesh)  # imports what takes memory too
    read_part, read, anonymous = sharded_load._read_part, [], []

    def watched(*given: Any) -> int:
        read.append(read_part(*given))
        anonymous.append(resident("RssAnon"))
        return read[-1]

    sharded_load._read_part = watched
    before = resident("RssAnon")
    sharded, policy = growth(lambda: sharded_load.load_sharded_policy(config, folder, mesh))
    parameters = list(policy.model.parameters())
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in parameters)
    weights = sum(p.to_local().numel() for p in parameters)
    del policy, parameters
    dist.barrier()
    # What a process would take up without shards: of one, as all at once would be much.
    whole = growth(lambda: load_policy(config, folder))[0] if dist.get_rank() == 0 else None
    report(
        weights=weights,
        read=sum(read),
        anonymous=max(anonymous) - before,
        sharded=sharded,
        whole=whole,
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
