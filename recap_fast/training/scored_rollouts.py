"""Rollouts and their rewards: groups are scored while others are still being generated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from recap_fast.rewards.scorer import RewardScorer
from recap_fast.rollout.protocol import RolloutEngine
from recap_fast.types import Prompt, RewardTable, Rollout, SamplingSpec


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """What a set of prompts gave."""

    rollouts: list[Rollout]  # in the prompts' order
    rewards: RewardTable  # rows in the rollouts' order
    rollout_seconds: float
    reward_seconds: float  # that scoring went on after the last rollout


class _Stopped(Exception):
    pass


def generate_and_score(
    engine: RolloutEngine,
    scorer: RewardScorer,
    prompts: Sequence[Prompt],
    sampling: SamplingSpec,
    stop: Sequence[int] = (),
) -> ScoredRollouts | None:
    """Samples completions and scores each group as it is complete.

    Args:
        stop: filled from outside when the run is to end; sampling is then given up after the group
            in progress, and None returned.
    """
    started = time.perf_counter()
    scoring = scorer.start(sampling.max_new_tokens)
    finished: list[int] = []

    def score(group: Sequence[Rollout]) -> None:
        if stop:
            raise _Stopped
        finished.extend(rollout.group for rollout in group)
        scoring.add(group)

    try:
        rollouts = engine.generate(prompts, sampling, score) if prompts else []
    except _Stopped:
        return None
    sampled = time.perf_counter()
    table = scoring.table()
    if stop:
        return None
    # A stable sort brings the rows, which came as groups finished, into the rollouts' order.
    order = np.argsort(np.array(finished, dtype=np.int64), kind="stable")
    return ScoredRollouts(
        rollouts=rollouts,
        rewards=replace(table, values=table.values[order]),
        rollout_seconds=sampled - started,
        reward_seconds=time.perf_counter() - sampled,
    )
