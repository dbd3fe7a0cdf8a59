"""Which groups are replaced, which rollouts enter the loss, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest

from recap_fast.config import DynamicSamplingConfig, RolloutConfig
from recap_fast.ops import group_advantages
from recap_fast.rewards.scorer import RewardTally
from recap_fast.training.dynamic_sampling import GroupFilter, has_signal, sample_step
from recap_fast.training.scored_rollouts import ScoredRollouts
from recap_fast.types import Prompt, RewardTable, Rollout, SamplingSpec

NAN = float("nan")
SPEC = SamplingSpec(2, 8, 1.0, 0)
WRONG, RIGHT, MIXED = [[0.0], [0.0]], [[1.0], [1.0]], [[0.0], [1.0]]


def settings(refills: int = 0, overlong: bool = False) -> RolloutConfig:
    dynamic = DynamicSamplingConfig(max_refills=refills) if refills else None
    return RolloutConfig(group_size=2, dynamic_sampling=dynamic, overlong_filtering=overlong)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (MIXED, True),
        (RIGHT, False),
        ([[1.0, 0.0], [0.0, 1.0]], True),  # the sums are equal, the objectives are not
        ([[0.5, 0.0], [0.5, 0.0]], False),
        ([[0.5, 0.0], [0.5, 1.0]], True),
        ([[1.0, NAN], [0.0, NAN]], True),
        ([[1.0, NAN], [1.0, 0.0]], False),  # nothing to compare the second objective with
        ([[NAN, NAN], [NAN, NAN]], False),
        ([[1.0, 0.0]], False),
        (np.empty((0, 2)), False),
        ([[0.1], [0.1], [0.1]], False),
        ([[1e-7], [0.0]], True),
    ],
)
def test_a_signal_is_an_advantage_in_some_objective(rewards, expected):
    import torch

    values = np.array(rewards, np.float32)
    assert has_signal(values) is expected
    groups = torch.zeros(len(values), dtype=torch.int64)
    assert bool(group_advantages(torch.from_numpy(values), groups).any()) is expected


def test_groups_are_judged_one_at_a_time_in_any_order():
    groups = GroupFilter.of(settings(refills=2))
    arrivals = [(MIXED, 0), (RIGHT, 0), (WRONG, 1), (MIXED, 1), (RIGHT, 2), (MIXED, 2), (RIGHT, 1)]
    kept = [groups.keeps(np.array(rewards), refills) for rewards, refills in arrivals]
    assert kept == [True, False, False, True, True, True, False]
    assert groups.metrics() == {
        "groups/sampled": 7,
        "groups/dropped": 3,
        "groups/refilled": 2,
        "groups/without_signal": 1,
    }


def test_nothing_is_dropped_or_reported_by_default():
    groups = GroupFilter.of(RolloutConfig())
    assert groups.keeps(np.array(RIGHT), 0)
    assert groups.trained(["stop", "length"]).tolist() == [True, True]
    assert groups.metrics() == {}


class Sampler:
    """Gives each prompt the rewards that are told by its row, and notes what it was asked for."""

    def __init__(self, rewards, reasons=None, stop_at=None):
        self.rewards, self.reasons, self.stop_at = rewards, reasons or {}, stop_at
        self.asked: list[tuple[list[int], tuple[int, ...]]] = []
        self.tallies: list[RewardTally] = []
        self.next_row = 100

    def sample(self, prompts, sampling, *, tally):
        self.asked.append(([prompt.row for prompt in prompts], sampling.groups))
        self.tallies.append(tally)
        if len(self.asked) == self.stop_at:
            return None
        rollouts, values = [], []
        for prompt, group in zip(prompts, sampling.groups, strict=True):
            rewards = self.rewards.get(prompt.row, RIGHT)
            reasons = self.reasons.get(prompt.row, ["stop"] * len(rewards))
            values += rewards
            rollouts += [Rollout(prompt, group, [1], [0.0], reason, "") for reason in reasons]
        width = len(values[0]) if values else 1
        table = np.array(values, np.float32).reshape(len(rollouts), width)
        return ScoredRollouts(rollouts, RewardTable(table, {"a/raised": 1}, {"a": 2}), 2.0, 0.5)

    def refill(self, sources):
        new = [prompt_of(self.next_row + i, source) for i, source in enumerate(sources)]
        self.next_row += len(new)
        return new

    def run(self, config, rows):
        prompts = [prompt_of(row) for row in rows]
        return sample_step(config, prompts, SPEC, self.sample, self.refill)


def prompt_of(row, source="s"):
    return Prompt(source, row, [1], "", None, {})


def test_dropped_groups_are_refilled_round_by_round():
    sampler = Sampler({0: MIXED, 1: RIGHT, 2: WRONG, 100: MIXED, 101: RIGHT, 102: MIXED})
    step = sampler.run(settings(refills=5), [0, 1, 2])
    # Numbers, from which seeds follow, are of one group each.
    assert sampler.asked == [([0, 1, 2], (0, 1, 2)), ([100, 101], (3, 4)), ([102], (5,))]
    assert [r.group for r in step.scored.rollouts] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    trained = [step.scored.rollouts[row] for row in step.trained]
    assert [r.prompt.row for r in trained] == [0, 0, 100, 100, 102, 102]
    assert step.scored.rewards.values[step.trained].tolist() == MIXED * 3
    # Dropped ones stay in what is reported and reweighted.
    assert step.scored.rewards.values[:, 0].tolist() == [0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1]
    assert step.scored.rewards.failures == {"a/raised": 3}
    assert step.scored.rewards.unreadable == {"a": 6}
    assert (step.scored.rollout_seconds, step.scored.reward_seconds) == (6.0, 1.5)
    assert step.groups.metrics() == {
        "groups/sampled": 6,
        "groups/dropped": 3,
        "groups/refilled": 2,
        "groups/without_signal": 0,
    }
    assert all(tally is sampler.tallies[0] for tally in sampler.tallies)


def test_the_last_refill_stays_without_a_signal():
    sampler = Sampler({0: MIXED})
    step = sampler.run(settings(refills=2), [0, 1])
    assert [rows for rows, _ in sampler.asked] == [[0, 1], [100], [101]]
    assert [step.scored.rollouts[row].prompt.row for row in step.trained] == [0, 0, 101, 101]
    assert step.groups.without_signal == 1
    assert step.groups.refilled == 0


def test_a_stop_in_a_later_round_gives_the_step_up():
    assert Sampler({}, stop_at=2).run(settings(refills=2), [0, 1]) is None


def test_without_prompts_nothing_is_refilled():
    step = Sampler({}).run(settings(refills=2), [])
    assert len(step.trained) == 0
    assert step.scored.rollouts == []


def test_cut_rollouts_are_neither_trained_nor_compared():
    """Group 0 differs in a cut rollout alone; group 1 without its cut one; group 2 is all cut."""
    three = {0: [[0.0], [1.0], [1.0]], 1: [[0.0], [1.0], [0.0]], 2: [[0.0], [1.0], [1.0]]}
    reasons = {
        0: ["length", "stop", "stop"],
        1: ["stop", "stop", "length"],
        2: ["length"] * 3,
    }
    step = Sampler(three, reasons).run(settings(overlong=True), [0, 1, 2])
    assert step.trained.tolist() == [1, 2, 3, 4]
    assert len(step.scored.rewards.values) == 9
    assert step.groups.metrics() == {}

    sampler = Sampler(three | {100: MIXED, 101: MIXED}, reasons)
    step = sampler.run(settings(refills=1, overlong=True), [0, 1, 2])
    assert [step.scored.rollouts[row].prompt.row for row in step.trained] == [1, 1, 100, 100, 101,
                                                                             101]  # fmt: skip
    assert step.groups.dropped == 2
    assert step.groups.refilled == 2


def test_all_may_be_cut():
    step = Sampler({}, {0: ["length", "length"]}).run(settings(overlong=True), [0])
    assert len(step.trained) == 0
    assert len(step.scored.rollouts) == 2
