"""A rank's part of tests/model/test_gathering.py: weights are gathered by all while one process
hands what it has on to a receiver, from a thread of its own, through collectives of their own."""

from __future__ import annotations

import queue
import sys
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from recap_fast.model import gathering
from recap_fast.model.sharding import shard_model
from recap_fast.rollout.protocol import iter_weights
from tests.processes import report
from tests.tiny import tiny_llama

ROUNDS = 3
WAITING = 2
"""Weights that may wait for the transfer; a gather then waits for it."""


def send(weights: queue.Queue[Tensor | None], group: Any) -> None:
    while (tensor := weights.get()) is not None:
        dist.broadcast(tensor, 0, group=group)


def receive(shapes: list[torch.Size], group: Any, received: list[Tensor]) -> None:
    for shape in shapes:
        tensor = torch.empty(shape)
        dist.broadcast(tensor, 0, group=group)
        received.append(tensor)


def main() -> None:
    limit = timedelta(seconds=60)  # of a collective: one that waits for another names itself
    dist.init_process_group("gloo", timeout=limit)
    rank, size = dist.get_rank(), dist.get_world_size()
    last = size - 1
    transfer = dist.new_group([0, last], timeout=limit)
    model = tiny_llama(tied=False)
    whole = {name: tensor.clone() for name, tensor in iter_weights(model)}
    shard_model(model, init_device_mesh("cpu", (size,)), torch.float32, None)
    gathering.gather_whole.__defaults__ = (9000,)  # several gathers
    received: list[Tensor] = []
    for _ in range(ROUNDS):
        weights: queue.Queue[Tensor | None] = queue.Queue(WAITING)
        shapes = [tensor.shape for tensor in whole.values()]
        thread = threading.Thread()  # of most ranks it does nothing
        if rank == 0:
            thread = threading.Thread(target=send, args=(weights, transfer))
        elif rank == last:
            thread = threading.Thread(target=receive, args=(shapes, transfer, received))
        thread.start()
        for _, tensor in iter_weights(model, torch.float32):
            if rank == 0:
                weights.put(tensor.clone())  # it is there until the next is asked for
        if rank == 0:
            weights.put(None)
        thread.join()
    equal = [
        torch.equal(tensor, wanted)
        for tensor, wanted in zip(received, [*whole.values()] * ROUNDS, strict=False)
    ]
    report(received=len(equal), equal=sum(equal), weights=len(whole))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
