"""A rank's part of tests/training/test_offload.py: FSDP2's CPU offload over a mesh of CPUs, where
shards are moved from the host to the host: all but the copies is as on a GPU."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recap_fast.config import ModelConfig, OptimizerConfig
from recap_fast.model.policy import Policy
from recap_fast.model.sharded_load import load_sharded_policy
from recap_fast.model.sharding import whole
from recap_fast.rollout.protocol import iter_weights
from recap_fast.training.optimization import PolicyOptimizer
from recap_fast.training.packing import pack_update
from tests.processes import report
from tests.tiny import packed_vision_model, tiny_config, tiny_llama
from tests.training.checkpoint_ranks import join
from tests.training.test_packing import make_rows


def main(folder: str, states: str) -> None:
    world = join()
    equal, kinds = [], set()
    for state in states.split():
        results = []
        for offload in (False, True):
            with tempfile.TemporaryDirectory() as own:
                config = tiny_config(Path(own), Path(own))
            settings = OptimizerConfig(state=state)  # type: ignore[arg-type]
            config = config.model_copy(update={"optimizer": settings})
            policy = Policy(tiny_llama(tied=False), torch.float32)
            policy.shard(world.mesh, offload=offload)
            optimizer = PolicyOptimizer(policy, None, config, world)
            optimizer._is_offloaded = offload  # which the devices do not tell here
            steps = []
            for seed, weight in ((3, 1.0), (4, float("nan")), (5, 1.0)):
                update = pack_update(
                    *make_rows(seed, 2, 4, 2), [2, 2], config=config.loss, max_tokens=60,
                    rank=world.rank, size=world.size,
                )  # fmt: skip
                stats = optimizer.step(update, torch.full((3,), weight), 1e-2)
                steps += [stats.grad_norm.nan_to_num(), stats.skipped]
            kept = [whole(tensor) for _, tensor in optimizer.named_state()]
            weights = [t.clone() for _, t in iter_weights(policy.model)]
            results.append([*steps, *kept, *weights])
            if offload:
                assert all(p.grad is None for p in optimizer.parameters)
                groups = policy.model._get_fsdp_state()._fsdp_param_groups
                kinds |= {type(g.offload_policy).__name__ for g in groups}
        plain, offloaded = results
        equal.append(all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True)))
    report(equal=equal, kinds=sorted(kinds), filled=filled(Path(folder), world.mesh))


def filled(folder: Path, mesh: Any) -> bool:
    """A model that is made empty, offloaded and then read, is the one that was saved."""
    saved = packed_vision_model("qwen2_5_vl", tied=False)
    if dist.get_rank() == 0:
        saved.save_pretrained(folder)
    dist.barrier()
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu", offload=True)
    model = load_sharded_policy(config, str(folder), mesh).model
    found = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return all(torch.equal(found[name], p) for name, p in saved.named_parameters())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    dist.destroy_process_group()
