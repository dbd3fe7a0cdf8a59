"""A rank's part of tests/rollout/test_vllm_ranks.py: a run with vLLM, then a sync of its own.

Started with the configuration's file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import torch
from torch.distributed.tensor import DTensor

from recap_fast import trainer as trainer_module
from recap_fast.config import load_config
from recap_fast.rollout.mismatch import verify_sync
from recap_fast.rollout.protocol import iter_weights
from recap_fast.trainer import Trainer
from recap_fast.types import Prompt
from tests.processes import report


def children() -> dict[int, str]:
    """What runs below this process."""
    found: dict[int, str] = {}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # vLLM asks short commands about the machine
            found[child.pid] = " ".join(child.cmdline())
    return found


def started_by_engine(begin: Callable[[], Any]) -> list[str]:
    """Processes that came with the engine: of vLLM's too, where it would start some."""
    found: list[str] = []
    plain = trainer_module.start_engine

    def noted(*given: Any, **named: Any) -> Any:
        before = children()
        engine = plain(*given, **named)
        found.extend(line for pid, line in children().items() if pid not in before)
        return engine

    trainer_module.start_engine = noted
    begin()
    return found


def main(path: str) -> None:
    trainers: list[Trainer] = []
    new = started_by_engine(lambda: trainers.append(Trainer(load_config(path))))
    (trainer,) = trainers
    trainer.train()
    prompts = [row for row in trainer.stream.held_out("sums") if isinstance(row, Prompt)]
    model, engine = trainer.policy.model, trainer.engine
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            # By place: what is cut anywhere must not look like what it was.
            local.mul_(torch.linspace(0.7, 1.5, max(1, local.numel())).reshape(local.shape))
    before = verify_sync(engine, model, prompts, tolerance=1e9)
    engine.sync_weights(iter_weights(model, engine.dtype))
    after = verify_sync(engine, model, prompts)
    trainer.close()
    report(
        children=new,
        stale=[len(before.stale), after.stale],
        compared=after.num_compared,
        means=[before.mean, after.mean],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
