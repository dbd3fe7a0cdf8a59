"""A rank's part of tests/training/test_sharded_checkpoint.py: sharded models and AdamW, without a
trainer. Started by `run_ranks` with the name of a function below, and its arguments."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from recap_fast.model.saved_weights import saved_weights
from recap_fast.model.sharding import part_of, shard_model, whole
from recap_fast.training import safetensors_writer
from recap_fast.training.checkpoint import CheckpointError, TrainerState, load_state
from recap_fast.training.distributed import World
from recap_fast.training.sharded_checkpoint import CheckpointSaver
from tests.processes import report
from tests.tiny import packed_vision_model, tiny_llama
from tests.tiny_tokenizer import tiny_tokenizer

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "tied": lambda: tiny_llama(tied=True),
    "untied": lambda: tiny_llama(tied=False),
    "qwen2_5_vl": lambda: packed_vision_model("qwen2_5_vl"),
    "qwen3_vl": lambda: packed_vision_model("qwen3_vl", tied=False),
}


def join(replicas: int = 1) -> World:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    shape = (size,) if replicas == 1 else (replicas, size // replicas)
    names = ("shard",) if replicas == 1 else ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return World(rank, size, torch.device("cpu"), mesh)


class Training:
    """AdamW steps whose gradients are the parameters: no data, and every number differs."""

    def __init__(self, world: World, kind: str, folder: Path) -> None:
        self.world, self.model = world, MODELS[kind]()
        tower = self.model.model.visual if "vl" in kind else None
        if tower is not None:  # frozen, whole in every process, and narrower than the rest
            tower.requires_grad_(False).to(torch.bfloat16)
        shard_model(self.model, world.mesh, torch.float32, tower)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=0.1, fused=True)
        self.saver = CheckpointSaver(
            folder, self.model, tiny_tokenizer(), keep=2, world=world, timeout=60
        )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            for parameter in self.trained.values():
                parameter.grad = parameter.detach().clone()
            self.optimizer.step()

    def state(self, step: int) -> TrainerState:
        tensors: dict[str, Tensor] = {
            f"optimizer/{key}/{name}": value
            for name, parameter in self.trained.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        placements = [Shard(0)] if self.world.mesh.ndim == 1 else None
        few = distribute_tensor(torch.arange(3.0), self.world.mesh, placements)  # none for some
        tensors |= {"alike": torch.arange(5.0), "few": few}
        own = {f"rank/{self.world.rank}": torch.tensor(self.world.rank)}
        return TrainerState(step, {"drawn": step}, tensors | own)

    def load(self, checkpoint: Path) -> None:
        stored = load_state(checkpoint).tensors
        for name, parameter in self.trained.items():
            keys = [key for key in stored if key.endswith(f"/{name}")]
            self.optimizer.state[parameter] = {
                key.split("/")[1]: part_of(stored[key], parameter) for key in keys
            }
        source = type(self.model).from_pretrained(checkpoint, dtype=torch.float32).state_dict()
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(part_of(source[name], tensor))

    def wholes(self) -> dict[str, Tensor]:
        """Weights and optimizer, as one process would have them."""
        found = {f"model/{n}": whole(t) for n, t in saved_weights(self.model).items()}
        found |= {f"trainer/{n}": whole(t) for n, t in self.state(0).tensors.items()}
        return {n: t.clone() for n, t in found.items() if "/rank/" not in n}


def save_while_training(folder: str, kinds: str) -> None:
    """A save of each model is taken, and the model trained on before it is written; then it is
    loaded, trained as far, and compared with the one that was never interrupted."""
    world = join()
    write_at = safetensors_writer.write_at

    def slow(*arguments: object) -> int:
        time.sleep(0.005)
        return write_at(*arguments)

    safetensors_writer.write_at = slow
    safetensors_writer.FILE_BYTES = 60_000
    pending, equal = [], []
    for kind in kinds.split():
        training = Training(world, kind, Path(folder) / kind)
        training.run(2)
        expected = training.wholes()
        path = training.saver.start(training.state(2))
        training.run(3)
        pending.append(not path.exists())
        training.saver.wait()
        if world.is_main:
            save_file(expected, Path(folder) / f"{kind}.safetensors")
        resumed = Training(world, kind, Path(folder) / "other")
        resumed.load(path)
        resumed.run(3)
        wanted = training.wholes()
        equal.append(all(torch.equal(t, wanted[n]) for n, t in resumed.wholes().items()))
    report(pending=pending, equal=equal)


def resave(folder: str, source: str, replicas: str) -> None:
    """What other processes have saved is loaded and saved again, under a step of its own."""
    world = join(int(replicas))
    training = Training(world, "untied", Path(folder))
    training.load(Path(source))
    training.saver.start(training.state(3))
    training.saver.wait()
    report(rows=[p.to_local().shape[0] for p in training.trained.values()])


def fail(folder: str) -> None:
    """Rank 1's disk is full for one save, and slow for another."""
    world = join()
    training = Training(world, "tied", Path(folder))
    write_at, messages = safetensors_writer.write_at, []

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    def slow(*arguments: object) -> int:
        time.sleep(0.1)
        return write_at(*arguments)

    def say(work: Callable[..., object], *arguments: object) -> None:
        try:
            work(*arguments)
            messages.append("done")
        except CheckpointError as error:
            messages.append(str(error))

    def names() -> list[str]:
        dist.barrier()
        return sorted(path.name for path in Path(folder).iterdir())

    training.run(1)
    training.saver.start(training.state(1))
    training.saver.wait()
    if world.rank == 1:
        safetensors_writer.write_at = full
    training.saver.start(training.state(2))
    while world.any(not training.saver._pending[1].done()):
        pass
    say(training.saver.settle)
    after = names()
    safetensors_writer.write_at = slow
    say(training.saver.start, training.state(2))
    say(training.saver.settle)
    say(training.saver.wait, 0.05)
    say(training.saver.wait)
    safetensors_writer.write_at = full if world.rank == 1 else write_at
    training.saver.start(training.state(3))
    say(training.saver.start, training.state(4))
    report(messages=messages, after=after, end=names())


def die(folder: str) -> None:
    """Rank 1 is killed in the middle of its second save."""
    world = join()
    training = Training(world, "tied", Path(folder))
    training.run(1)
    training.saver.start(training.state(1))
    training.saver.wait()
    write_at, count = safetensors_writer.write_at, []

    def deadly(*arguments: object) -> int:
        count.append(1)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_at(*arguments)

    if world.rank == 1:
        safetensors_writer.write_at = deadly
    training.saver.start(training.state(2))
    training.saver.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    dist.destroy_process_group()
