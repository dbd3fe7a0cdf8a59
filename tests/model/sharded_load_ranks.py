"""A rank: loads each folder in shards, and compares it with what `load_policy` makes of it."""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from recap_fast.config import ModelConfig
from recap_fast.model.policy import Policy, load_policy
from recap_fast.model.sharded_load import load_sharded_policy
from recap_fast.model.sharding import whole
from tests.processes import report


def tensors_of(policy: Policy) -> dict[str, Tensor]:
    model = policy.model
    named = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def differences(policy: Policy, wanted: Policy) -> list[str]:
    """Names of what is not the same to the bit, whole and as FSDP gathers it for a forward."""
    ours, theirs = tensors_of(policy), tensors_of(wanted)
    found = [f"only in one: {name}" for name in sorted(ours.keys() ^ theirs.keys())]
    for name, tensor in theirs.items():
        mine = ours[name]
        same = mine.requires_grad == tensor.requires_grad and mine.dtype == tensor.dtype
        if not same or not torch.equal(whole(mine.detach()), tensor):
            found.append(name)
    units = [module for module in policy.model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    found += [
        f"gathered: {name}"
        for name, tensor in tensors_of(policy).items()
        if isinstance(tensor, DTensor) or not torch.equal(tensor, theirs[name].to(tensor.dtype))
    ]
    for unit in units:
        unit.reshard()
    return found


def settings(policy: Policy) -> str:
    """What is not a tensor."""
    model = policy.model
    modes = [name for name, module in model.named_modules() if module.training]
    generation = model.generation_config
    config = model.config.to_dict()
    return repr((modes, generation and generation.to_dict(), config, model._weight_conversions,
                 policy.attention.name))  # fmt: skip


def is_tied(policy: Policy) -> bool:
    head, embedding = (
        policy.model.get_output_embeddings().weight, policy.model.get_input_embeddings().weight,
    )  # fmt: skip
    return head is embedding


def compare(folder: str, mesh: DeviceMesh, options: dict[str, Any]) -> dict[str, Any]:
    trainable = options.pop("trainable", True)
    config = ModelConfig(path=folder, device="cpu", **{"dtype": "bfloat16"} | options)
    policy = load_sharded_policy(config, folder, mesh, trainable=trainable)
    wanted = load_policy(config, folder, trainable=trainable)
    parameters = list(policy.model.parameters())
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    return {
        "differences": differences(policy, wanted),
        "same settings": settings(policy) == settings(wanted),
        "tied": [is_tied(policy), is_tied(wanted)],
        "sharded": len(sharded),
        "whole": len(parameters) - len(sharded),
        "empty": sum(p.to_local().numel() == 0 for p in sharded),
        "local": sum(p.to_local().numel() for p in sharded),
        "device": str(policy.device),
    }


def main() -> None:
    faulthandler.dump_traceback_later(150, exit=True)  # says where a rank waits, and ends it
    dist.init_process_group("gloo")
    shapes, cases = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    found = {}
    for shape in shapes:
        names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
        mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=names)
        for folder, options in cases:
            found[f"{shape} {Path(folder).name} {options}"] = compare(folder, mesh, dict(options))
    report(**found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
