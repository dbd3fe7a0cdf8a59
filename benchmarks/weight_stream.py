"""Time of a sharded model's weights on their way to an engine: gathered one by one, as DTensor does
it, and many in one collective, as `iter_weights` does it.

Random weights of SmolLM2-135M's shape, in float32 shards over two processes of a CPU with gloo; a
taker copies each tensor into bfloat16 weights of its own. Fastest of the rounds, in turns.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.weight_stream [--rounds 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from recap_fast.model import gathering
from recap_fast.model.sharding import shard_model, whole
from recap_fast.rollout.protocol import iter_weights

Stream = Callable[[nn.Module], Iterator[tuple[str, Tensor]]]


def one_by_one(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        yield name, whole(tensor.detach())


def together(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return iter_weights(model, torch.bfloat16)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    taken = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    shard_model(model, mesh, torch.bfloat16, None)
    streams: dict[str, Stream] = {"one by one": one_by_one, "together": together}
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(options.rounds):
        for name, stream in streams.items():
            dist.barrier()
            begun = time.perf_counter()
            for weight, tensor in stream(model):
                taken[weight].copy_(tensor)
            dist.barrier()
            seconds[name].append(time.perf_counter() - begun)
    if dist.get_rank() == 0:
        size = sum(tensor.numel() for tensor in model.parameters())
        print(f"{size / 1e6:.0f} million parameters, {dist.get_world_size()} processes")
        print(f"bucket {gathering.BUCKET_BYTES / 2**20:.0f} MiB")
        for name, times in seconds.items():
            print(f"{name}\t{min(times):.3f} s")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
