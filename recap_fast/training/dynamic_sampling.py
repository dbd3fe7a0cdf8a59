"""Which rollouts of a step enter the loss (DAPO, arXiv 2503.14476).

Dynamic sampling: a group whose rollouts no objective tells apart has no gradient, so a group of
another prompt is sampled in its place. Over-long filtering: a completion that was cut off is left
out. What is left out of the loss stays in the rewards that are reported and reweighted: lambda goes
by what the policy can do, not by what was kept of it.

Shapes: S rollouts of a step, G of a group, T that enter the loss, K objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recap_fast.config import RolloutConfig
from recap_fast.rewards.scorer import RewardTally
from recap_fast.training.scored_rollouts import ScoredRollouts, merged
from recap_fast.types import FinishReason, Prompt, SamplingSpec


def has_signal(rewards: np.ndarray) -> bool:
    """Whether an objective tells a group's rollouts apart: rewards [G, K], NaN where absent.

    Each objective is judged by itself: where two rewards add up to the same, each has a gradient.
    """
    present = ~np.isnan(rewards)
    lowest = np.where(present, rewards, np.inf).min(0, initial=np.inf)
    highest = np.where(present, rewards, -np.inf).max(0, initial=-np.inf)
    return bool((lowest < highest).any())


@dataclass(slots=True)
class GroupFilter:
    """Decides group by group, in whatever order they come, what enters the loss, and counts.

    One for each step: what is counted are the groups of that step.
    """

    max_refills: int  # of a place: how many groups may be sampled in the place of a first one
    filters_overlong: bool
    sampled: int = 0
    dropped: int = 0
    refilled: int = 0
    without_signal: int = 0

    @classmethod
    def of(cls, config: RolloutConfig) -> GroupFilter:
        settings = config.dynamic_sampling
        return cls(0 if settings is None else settings.max_refills, config.overlong_filtering)

    def trained(self, reasons: Sequence[FinishReason]) -> np.ndarray:
        """[G] bool: which rollouts of a group enter the loss, by how each came to its end."""
        cut = np.array([reason == "length" for reason in reasons], dtype=bool)
        return ~(cut & self.filters_overlong)

    def drops(self, rewards: np.ndarray, refills: int) -> bool:
        """Whether another prompt is to be sampled in the place of a group. Counts nothing.

        Args:
            rewards: [G, K] of its rollouts that enter the loss, NaN where absent.
            refills: how many groups were dropped from the place before this one.
        """
        return refills < self.max_refills and not has_signal(rewards)

    def keeps(self, rewards: np.ndarray, refills: int) -> bool:
        """Whether a group stays in its place, and counts it. Arguments are those of `drops`."""
        self.sampled += 1
        if self.drops(rewards, refills):
            self.dropped += 1
            return False
        if has_signal(rewards):
            self.refilled += refills > 0
        else:
            self.without_signal += 1
        return True

    def metrics(self) -> dict[str, float]:
        """What a step reports; nothing where groups are not replaced."""
        if not self.max_refills:
            return {}
        return {
            "groups/sampled": self.sampled,
            "groups/dropped": self.dropped,
            "groups/refilled": self.refilled,
            "groups/without_signal": self.without_signal,
        }


@dataclass(frozen=True, slots=True)
class StepRollouts:
    """The rollouts of a step."""

    scored: ScoredRollouts  # all S: dropped groups too, and those sampled in their place
    trained: np.ndarray  # [T] int64: which of them enter the loss, in order
    groups: GroupFilter  # what became of the groups


def sample_step(
    config: RolloutConfig,
    prompts: Sequence[Prompt],
    sampling: SamplingSpec,
    sample: Callable[..., ScoredRollouts | None],
    refill: Callable[[Sequence[str]], Sequence[Prompt]],
) -> StepRollouts | None:
    """Samples the groups of a step, and others for those that are dropped, round by round.

    Args:
        config: its `dynamic_sampling` and `overlong_filtering` are read.
        prompts: the step's.
        sampling: the step's. Each round goes on numbering groups, from which their seeds follow.
        sample: called as sample(prompts, sampling, tally=...), as `generate_and_score` is. Where it
            gives None, having been stopped, so does this.
        refill: draws a prompt for each that was dropped, given by its source.
    """
    groups, tally = GroupFilter.of(config), RewardTally()
    rounds: list[ScoredRollouts] = []
    trained: list[np.ndarray] = []
    first = 0  # number of the round's first group
    for refills in range(groups.max_refills + 1):
        numbers = tuple(range(first, first + len(prompts)))
        scored = sample(prompts, replace(sampling, groups=numbers), tally=tally)
        if scored is None:
            return None
        before = sum(len(round_.rollouts) for round_ in rounds)
        rounds.append(scored)
        dropped = []
        for rows in _rows_of_groups(scored):
            rollouts = [scored.rollouts[row] for row in rows]
            enters = rows[groups.trained([rollout.finish_reason for rollout in rollouts])]
            if groups.keeps(scored.rewards.values[enters], refills):
                trained.append(before + enters)
            else:
                dropped.append(rollouts[0].prompt.source)
        if not dropped:
            break
        first += len(prompts)
        prompts = refill(dropped)
    return StepRollouts(
        scored=_together(rounds),
        trained=np.concatenate([np.empty(0, np.int64), *trained]),
        groups=groups,
    )


def drops(config: RolloutConfig, scored: ScoredRollouts, refills: int) -> bool:
    """Whether another prompt is to be sampled in the place of this group, which is judged alone.

    Args:
        refills: how many groups were dropped from the place before it.
    """
    groups = GroupFilter.of(config)
    enters = groups.trained([rollout.finish_reason for rollout in scored.rollouts])
    return groups.drops(scored.rewards.values[enters], refills)


def sort_out(config: RolloutConfig, scored: ScoredRollouts, refills: Sequence[int]) -> StepRollouts:
    """A step whose groups, those that were dropped among them, are all there.

    Args:
        refills: of each group, how many were dropped from its place before it.
    """
    groups = GroupFilter.of(config)
    enters = groups.trained([rollout.finish_reason for rollout in scored.rollouts])
    trained = [np.empty(0, np.int64)]
    for rows, before in zip(_rows_of_groups(scored), refills, strict=True):
        rows = rows[enters[rows]]
        if groups.keeps(scored.rewards.values[rows], before):
            trained.append(rows)
    return StepRollouts(scored, np.concatenate(trained), groups)


def _rows_of_groups(scored: ScoredRollouts) -> list[np.ndarray]:
    """Row numbers of each group, whose rollouts stand side by side."""
    numbers = np.array([rollout.group for rollout in scored.rollouts], dtype=np.int64)
    starts = np.flatnonzero(np.diff(numbers)) + 1
    rows = np.split(np.arange(len(numbers)), starts)
    return rows if len(numbers) else []


def _together(rounds: Sequence[ScoredRollouts]) -> ScoredRollouts:
    """Rounds one after another; their groups are numbered in that order."""
    if len(rounds) == 1:
        return rounds[0]
    return replace(
        merged(rounds),
        rollout_seconds=sum(round_.rollout_seconds for round_ in rounds),
        reward_seconds=sum(round_.reward_seconds for round_ in rounds),
    )
