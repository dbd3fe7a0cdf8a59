"""A rank's part of tests/model/test_gathering.py: a sharded model's weights, gathered."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from recap_fast.config import LoraConfig
from recap_fast.model import gathering
from recap_fast.model.lora import add_adapters
from recap_fast.model.sharding import shard_model
from recap_fast.rollout.protocol import iter_weights, weight_names
from tests.processes import report
from tests.tiny import tiny_llama

COUNT = 0


def count_collectives(name: str) -> None:
    plain = getattr(dist, name)

    def counted(*given: Any, **named: Any) -> Any:
        global COUNT
        COUNT += 1
        return plain(*given, **named)

    setattr(dist, name, counted)


def make(tied: bool, adapted: bool) -> Any:
    """Odd widths: over several processes no tensor is cut evenly, and some processes get none."""
    model = tiny_llama(tied=tied)
    torch.manual_seed(1)
    model.model.extra = torch.nn.Linear(5, 3)
    model.model.register_buffer("whole_everywhere", torch.arange(3))
    if adapted:
        add_adapters(model, LoraConfig(rank=3), "base")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    return model


def wrong(found: Iterator[tuple[str, Tensor]], wanted: dict[str, Tensor], dtype: Any) -> list[str]:
    """Names of what differs from the whole model to the bit, while the taker goes its own pace."""
    names, problems = [], []
    total = torch.zeros(())
    for name, tensor in found:
        names.append(name)
        expected = wanted[name] if dtype is None else wanted[name].to(dtype)
        given = tensor if dtype is None else tensor.to(dtype)
        if not torch.equal(given, expected) or tensor.shape != expected.shape:
            problems.append(name)
        if random.random() < 0.1:
            time.sleep(0.02)
        dist.all_reduce(total)  # as an engine's own collectives would come between
    return problems if sorted(names) == sorted(wanted) else ["other names"]


def main() -> None:
    dist.init_process_group("gloo")
    random.seed(dist.get_rank())
    size = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))]
    if size == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    problems: list[str] = []
    for mesh, tied, adapted in itertools.product(meshes, (True, False), (False, True)):
        whole = dict(iter_weights(make(tied, adapted)))
        model = make(tied, adapted)
        shard_model(model, mesh, torch.bfloat16, None)
        for dtype, bucket in ((None, 9000), (torch.bfloat16, 2**26), (torch.bfloat16, 1)):
            gathering.gather_whole.__defaults__ = (bucket,)
            case = f"{mesh.ndim} tied={tied} adapted={adapted} {dtype} {bucket}"
            found = wrong(iter_weights(model, dtype), whole, dtype)
            problems += [f"{case}: {name}" for name in found]
            if weight_names(model) != whole.keys():
                problems.append(f"{case}: names")
    gathering.gather_whole.__defaults__ = (2**26,)
    model = tiny_llama()
    shard_model(model, meshes[0], torch.float32, None)
    count_collectives("all_gather_single")
    sent = {name: tensor.dtype for name, tensor in iter_weights(model, torch.bfloat16)}
    dist.barrier()
    report(problems=problems, collectives=COUNT, tensors=len(sent), dtypes=str(set(sent.values())))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
