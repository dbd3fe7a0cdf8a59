"""A rank's part of tests/training/test_distributed.py: what processes tell each other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recap_fast.config import load_config
from recap_fast.training.distributed import start_world
from recap_fast.types import UserError
from tests.processes import report


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(path: str) -> None:
    world = start_world(load_config(path))
    rank = world.rank
    own = torch.arange(3 * rank, dtype=torch.int32)  # none of rank 0
    gathered = world.gather({"own": own}, {"rank": rank, "word": "é" * rank})

    def fail(where: int) -> Callable[[], Any]:
        def work() -> Any:
            if rank == where:
                raise UserError("no such thing")
            return {}, "fine"

        return work

    def fetch() -> tuple[int, str]:
        fetched = Path(path).with_name("fetched")
        if rank == 0:
            time.sleep(0.5)  # for which the other, if it did not wait, would find nothing
            fetched.write_text("by rank 0")
        return rank, fetched.read_text()

    def in_all() -> None:
        raise UserError("wrong everywhere")

    sums, largest = world.sum_and_max(torch.tensor([1.0, rank]), torch.tensor([float(rank)]))
    values = {
        "gathered": [(tensors["own"].tolist(), note) for tensors, note in gathered],
        "failed": error_of(lambda: world.exchange(fail(1))),
        "failed_main": error_of(lambda: world.on_main(fail(0))),
        "failed_together": error_of(lambda: world.together(fail(1))),
        "failed_alike": error_of(lambda: world.together(in_all)),
        "together": world.together(lambda: rank),
        "one_by_host": world.one_by_host(fetch),
        "failed_by_host": error_of(lambda: world.one_by_host(fail(0))),
        "main": world.on_main(lambda: f"from rank {rank}"),
        "any": [world.any(rank == 1), world.any(False)],
        "sums": sums.tolist(),
        "largest": largest.tolist(),
    }
    world.close()
    report(**values)


if __name__ == "__main__":
    main(*sys.argv[1:])
