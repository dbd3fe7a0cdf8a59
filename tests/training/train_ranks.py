"""A rank's part of tests/training/test_distributed.py: the project's trainer on a saved config.

Started by `run_ranks` with the configuration's file and trainer options as JSON.
"""

from __future__ import annotations

import json
import sys

import torch

from recap_fast.config import load_config
from recap_fast.trainer import Trainer
from tests.processes import report


def main(path: str, options: str = "{}") -> None:
    trainer = Trainer(load_config(path), **json.loads(options))
    trainer.train()
    kinds = sorted({type(p).__name__ for p in trainer.policy.model.parameters()})
    lambdas = trainer.reweighter.weights.tolist()
    trainer.close()
    report(lambdas=lambdas, kinds=kinds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
