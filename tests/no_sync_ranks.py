"""A rank's part of tests/test_no_sync.py: training steps of the project's trainer, whose updates
must not wait for the device, and what the guard must catch among several processes.

Started by `run_ranks` with the configuration's file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from recap_fast.config import load_config
from recap_fast.trainer import Trainer
from recap_fast.training.optimization import UpdateStats
from recap_fast.training.packing import PackedUpdate
from recap_fast.types import RewardTable
from tests.no_sync import ForbidHostSync, HostSyncError
from tests.processes import report


class GuardedTrainer(Trainer):
    """Counts its updates, and the collectives in them."""

    guarded = 0

    def _learn(
        self, updates: Sequence[PackedUpdate], rewards: RewardTable, lr: float
    ) -> UpdateStats:
        with ForbidHostSync():
            stats = super()._learn(updates, rewards, lr)
        self.guarded += len(updates)
        return stats


def caught(work: Callable[[], Any]) -> bool:
    with ForbidHostSync():
        try:
            work()
        except HostSyncError:
            return True
    return False


def main(path: str) -> None:
    trainer = GuardedTrainer(load_config(path))
    trainer.train()
    shard = trainer.optimizer.parameters[0]
    syncing = {
        "item": caught(lambda: shard.detach().sum().full_tensor().item()),
        "of a shard": caught(lambda: shard.to_local().sum().item()),  # type: ignore[operator]
        "of a sharded tensor": caught(lambda: float(shard.detach().sum())),
        "nothing": caught(lambda: shard.detach().sum().full_tensor() * 2),
    }
    trainer.close()
    report(guarded=trainer.guarded, syncing=syncing, kind=type(shard).__name__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
