"""A rank's part of tests/training/test_compact_adamw.py: steps of an optimizer on a sharded model,
whose state is saved, and loaded by other numbers of processes."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from recap_fast.config import OptimizerConfig
from recap_fast.model.policy import Policy
from recap_fast.model.sharding import whole
from recap_fast.training.checkpoint import TrainerState, latest_checkpoint, load_state
from recap_fast.training.distributed import ALONE, World
from recap_fast.training.optimization import PolicyOptimizer
from recap_fast.training.sharded_checkpoint import CheckpointSaver
from tests.processes import report
from tests.tiny import tiny_config, tiny_llama
from tests.tiny_tokenizer import tiny_tokenizer
from tests.training.checkpoint_ranks import join


class Steps:
    """A model whose gradients are functions of its parameters: no data, and every number differs.
    331 rows do not divide."""

    def __init__(self, folder: Path, state: str, world: World = ALONE, seed: int = 0) -> None:
        with tempfile.TemporaryDirectory() as own:  # processes must not write one file at once
            config = tiny_config(Path(own), folder)
        settings = OptimizerConfig(state=state, learning_rate=1e-2, weight_decay=0.1)  # type: ignore[arg-type]
        config = config.model_copy(update={"optimizer": settings})
        self.world, self.model = world, tiny_llama(tied=False, seed=seed)
        policy = Policy(self.model, torch.float32)
        policy.shard(world.mesh)
        self.optimizer = PolicyOptimizer(policy, None, config, world)

    def run(self, first: int, last: int) -> None:
        inner: Any = self.optimizer.optimizer
        for number in range(first, last):
            for parameter in self.optimizer.parameters:
                parameter.grad = torch.sin(parameter.detach() * (1 + number))
            inner.grad_scale, inner.found_inf = torch.tensor(2.0), torch.tensor(float(number == 1))
            inner.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and state, whole."""
        found = {f"model/{n}": whole(p.detach()) for n, p in self.model.named_parameters()}
        found |= {f"optimizer/{n}": whole(t) for n, t in self.optimizer.named_state()}
        return {name: tensor.clone() for name, tensor in found.items()}

    def save(self, folder: Path) -> None:
        saver = CheckpointSaver(
            folder, self.model, tiny_tokenizer(), keep=1, world=self.world, timeout=60
        )
        state = {f"optimizer/{name}": tensor for name, tensor in self.optimizer.named_state()}
        saver.start(TrainerState(1, {}, state))
        saver.wait()

    def load(self, folder: Path) -> None:
        stored = load_state(latest_checkpoint(folder)).tensors
        state = {n.removeprefix("optimizer/"): t for n, t in stored.items()}
        self.optimizer.load_named_state(state)


def main(folder: str, states: str, replicas: str = "1") -> None:
    """Three steps, the second of which is skipped, a save, and two more; from what one process has
    saved after three, two more too."""
    world = join(int(replicas))
    path = Path(folder)
    for state in states.split():
        steps = Steps(path, state, world)
        steps.run(0, 3)
        saved = path / f"{state}-of-{world.size}-{replicas}"
        steps.save(saved)
        again = Steps(path, state, world)
        again.load(path / f"{state}-of-1")
        with torch.no_grad():
            for ours, theirs in zip(
                again.optimizer.parameters, steps.optimizer.parameters, strict=True
            ):
                ours.copy_(theirs)
        for one in (steps, again):
            one.run(3, 5)
        results = [one.tensors() for one in (steps, again)]
        if world.is_main:
            for name, tensors in zip(("end", "resumed"), results, strict=True):
                save_file(tensors, saved / f"{name}.safetensors")
    report(done=json.dumps(states))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    dist.destroy_process_group()
