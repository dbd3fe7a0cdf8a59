"""A rank of the command in which something goes wrong, for tests/training/test_launch.py.

python -m torch.distributed.run ... faulty_rank.py FAULT RANK STEP train CONFIG [OPTIONS]
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from recap_fast import cli

if TYPE_CHECKING:  # and below where it is needed: reward workers import this file as they start
    from recap_fast.trainer import Trainer


def raise_something() -> None:
    raise KeyError("lm_head")


def want_memory() -> None:
    import torch

    torch.empty(1 << 50)


def give_nan() -> None:
    """Of the next loss's gradients, before they are summed over the processes."""
    import torch

    from recap_fast.training import optimization

    original = optimization.fused_linear_policy_loss

    def broken(*given: Any, **named: Any) -> Any:
        optimization.fused_linear_policy_loss = original
        output = original(*given, **named)
        return replace(output, loss=output.loss * torch.nan)

    optimization.fused_linear_policy_loss = broken


def limit_files() -> None:
    """Of this process's files none may grow beyond what metrics need: the system itself refuses to
    write checkpoints from now on, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


FAULTS = {"raise": raise_something, "memory": want_memory, "nan": give_nan, "full": limit_files}


def main(fault: str, rank: str, step: str, *command: str) -> None:
    from recap_fast.trainer import Trainer

    learn = Trainer._learn

    def faulty(self: Trainer, *given: Any) -> Any:
        if os.environ.get("RANK", "0") == rank and self.step + 1 == int(step):
            FAULTS[fault]()
        return learn(self, *given)

    Trainer._learn = faulty  # type: ignore[method-assign]
    sys.argv = ["recap-fast", *command]
    cli.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
