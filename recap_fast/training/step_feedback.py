"""What a step tells the data stage: weights for adaptive shares, and which prompts were solved.

Shapes: S rollouts, K objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from recap_fast.config import TrainConfig
from recap_fast.training.distributed import World
from recap_fast.training.step_metrics import column_means
from recap_fast.types import Prompt, RewardTable, Rollout, StepFeedback


def step_feedback(
    config: TrainConfig,
    metrics: Mapping[str, float],
    rollouts: Sequence[Rollout],
    rewards: RewardTable,
    world: World,
) -> StepFeedback:
    """What `config.data` makes use of; the same in all processes, which call this together.

    Args:
        metrics: the step's from the device, with `weight/<objective>` of all objectives, and with
            `unbalanced_weight/<objective>` where weights are balanced: shares follow these.
        rollouts: all S, those of dropped groups too; those of a group stand side by side.
        rewards: values [S, K].
    """
    weights: dict[str, float] = {}
    if config.data.mixing == "adaptive":
        names = [objective.name for objective in config.objectives]
        # Of rank 0: devices of another kind may round differently, and rows must be the same.
        kind = "unbalanced_weight" if f"unbalanced_weight/{names[0]}" in metrics else "weight"
        weights = world.on_main(lambda: {name: metrics[f"{kind}/{name}"] for name in names})
    return StepFeedback(weights, tuple(_solved_groups(config, rollouts, rewards.values)))


def _solved_groups(
    config: TrainConfig, rollouts: Sequence[Rollout], values: np.ndarray
) -> list[tuple[str, int, bool | None]]:
    """Of each group of a source with rewards that say so: its prompt's source and row, and whether
    the mean of each such reward reaches the threshold. None where one is absent or failed for all
    rollouts, and no other is below it: the prompt was neither solved nor lost."""
    review = config.data.review
    if review is None:
        return []
    names = [objective.name for objective in config.objectives]
    judging = {
        source.name: [names.index(name) for name in source.rewards if name in review.rewards]
        for source in config.data.sources
    }
    found: list[tuple[str, int, bool | None]] = []
    for _, members in groupby(range(len(rollouts)), key=lambda row: rollouts[row].group):
        rows = list(members)
        prompt: Prompt = rollouts[rows[0]].prompt
        columns = judging[prompt.source]
        if columns:
            means = column_means(values[np.ix_(rows, columns)], np.float64)
            is_solved = bool((means >= review.threshold).all())
            is_lost = bool((means < review.threshold).any())
            found.append((prompt.source, prompt.row, is_solved if is_solved or is_lost else None))
    return found
