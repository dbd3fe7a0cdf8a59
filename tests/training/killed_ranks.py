"""A rank's part of a run that ends early: rank 1 is killed after a step, or all get SIGTERM.

Started with the configuration's file, the step and the signal's name.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from recap_fast.config import load_config
from recap_fast.trainer import Trainer


def main(path: str, step: str, name: str) -> None:
    trainer = Trainer(load_config(path))
    log = trainer._log

    def then_die(view, row):
        log(view, row)
        if row["step"] == int(step) and (name == "SIGTERM" or trainer.world.rank == 1):
            os.kill(os.getpid(), getattr(signal, name))

    trainer._log = then_die
    finished = trainer.train()
    trainer.close()
    assert not finished


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
