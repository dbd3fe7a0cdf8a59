"""A grid's runs in this process, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from recap_fast.reproduce.grid import Cell
from recap_fast.trainer import Trainer


def train_here(cells: Sequence[Cell], jobs: int, console: Console) -> None:
    """Stands in for `run_grid`, whose processes take seconds to start."""
    for cell in cells:
        if not cell.is_finished:
            trainer = Trainer(cell.config)
            trainer.train()
            trainer.close()
