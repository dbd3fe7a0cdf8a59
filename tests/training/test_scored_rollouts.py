"""Rewards keep to their rollouts, in whatever order groups finish."""

from __future__ import annotations

import numpy as np
import pytest

from recap_fast.training.scored_rollouts import generate_and_score
from recap_fast.types import Prompt, RewardTable, Rollout, SamplingSpec

SPEC = SamplingSpec(2, 8, 1.0, 0)


class Engine:
    """Finishes groups in a given order, and notes how far it came."""

    def __init__(self, order):
        self.order, self.done = order, []

    def generate(self, prompts, sampling, on_group=None):
        groups = {
            index: [
                Rollout(prompts[index], index, [index, member], [0.0, 0.0], "stop", "")
                for member in range(sampling.n)
            ]
            for index in self.order
        }
        for index in self.order:
            on_group(groups[index])
            self.done.append(index)
        return [rollout for index in sorted(groups) for rollout in groups[index]]


class Scorer:
    """Rewards a rollout by its two tokens; a table's rows are in the order of `add`."""

    def __init__(self):
        self.rows, self.limits = [], []

    def start(self, max_new_tokens):
        self.limits.append(max_new_tokens)
        return self

    def add(self, rollouts):
        self.rows += [rollout.token_ids for rollout in rollouts]

    def table(self):
        values = np.array(self.rows, np.float32).reshape(-1, 2)
        return RewardTable(values, failures={"a/raised": 1})


def prompts(count):
    return [Prompt("s", row, [1], "", None, {}) for row in range(count)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_rows_are_in_the_rollouts_order(order):
    scorer = Scorer()
    scored = generate_and_score(Engine(order), scorer, prompts(3), SPEC)
    assert scored.rewards.values.tolist() == [r.token_ids for r in scored.rollouts]
    assert [r.group for r in scored.rollouts] == [0, 0, 1, 1, 2, 2]
    assert scored.rewards.failures == {"a/raised": 1}
    assert scorer.limits == [8]
    assert min(scored.rollout_seconds, scored.reward_seconds) >= 0


def test_without_prompts_there_are_no_rows():
    scored = generate_and_score(Engine([]), Scorer(), [], SPEC)
    assert scored.rollouts == []
    assert scored.rewards.values.shape == (0, 2)


def test_a_stop_ends_sampling_after_the_group_in_progress():
    stop = []
    engine, scorer = Engine([1, 0, 2]), Scorer()
    add = scorer.add
    scorer.add = lambda group: (add(group), stop.append(15))
    assert generate_and_score(engine, scorer, prompts(3), SPEC, stop) is None
    assert engine.done == [1]
