"""What the tests of TRL's trainer and their ranks share: tiny runs, rewards by script, advantages
by another formula."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from tests.tiny_tokenizer import tiny_tokenizer

Table = list[list[float | None]]
"""Rewards by completion and function; None where a function has none to give."""

TABLE: Table = [
    [0.5, 10.0], [1.0, 30.0], [0.25, 20.0], [0.75, None],
    [None, None], [0.0, 12.0], [1.0, None], [0.5, 17.0],
]  # fmt: skip
"""Two groups of four: a row without any reward, rewards of different scales."""

CONSTANT: Table = [[0.5, 10.0], [0.5, 30.0], [0.5, 20.0], [0.5, 25.0], *TABLE[4:]]
"""The first function says nothing about the first group."""


SHIFTED: Table = [[0.5, 40.0], [0.6, 30.0], [0.2, 90.0], [0.7, 60.0], *TABLE[4:]]
"""The second function gives more, but in the first group alone."""


def scripted(name: str, batches: Sequence[Sequence[float | None]]) -> Callable[..., Any]:
    """A reward function that gives these, batch after batch, whatever the completions are."""
    remaining = iter(batches)

    def function(completions: list[str], **_: Any) -> list[float | None]:
        rewards = list(next(remaining))
        assert len(rewards) == len(completions)
        return rewards

    function.__name__ = name
    return function


def functions(*tables: Table, rows: slice = slice(None)) -> list[Callable[..., Any]]:
    """The two functions of these tables, one table a generated batch."""
    return [
        scripted(name, [[row[k] for row in table[rows]] for table in tables])
        for k, name in enumerate(("near", "far"))
    ]


def means(table: Table) -> list[float]:
    """Each function's mean reward."""
    columns = ([r for r in column if r is not None] for column in zip(*table, strict=True))
    return [statistics.fmean(column) for column in columns]


def expected_advantages(
    table: Table, group: int, scale: str = "group", factors: Sequence[float] = (1.0, 1.0)
) -> list[float]:
    """sum_k factor_k (r_k - mean_k) / (deviation_k + 1e-4), in Python's own float64."""
    total = [0.0] * len(table)
    for k, factor in enumerate(factors):
        column = [row[k] for row in table]
        everywhere = [r for r in column if r is not None]
        for start in range(0, len(column), group):
            known = [r for r in column[start : start + group] if r is not None]
            if len(known) < 2:
                continue
            deviating = {"group": known, "batch": everywhere}.get(scale)
            spread = 1.0 if deviating is None else statistics.stdev(deviating) + 1e-4
            for row in range(start, start + group):
                if (reward := column[row]) is not None:
                    total[row] += factor * (reward - statistics.fmean(known)) / spread
    return total


def settings(folder: Path, **options: Any) -> GRPOConfig:
    """Batches of two groups of four completions in two parts, nothing logged but in memory."""
    return GRPOConfig(
        **{
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-3,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | options
    )


def make(kind: Any, model: Path, args: GRPOConfig, rewards: Any, **keywords: Any) -> Any:
    prompts = [{"prompt": text} for text in ("ab", "cde", "fg hi", "what", "so", "no")]
    return kind(
        str(model),
        rewards,
        args,
        train_dataset=Dataset.from_list(prompts * 4),
        processing_class=tiny_tokenizer(),
        **keywords,
    )
