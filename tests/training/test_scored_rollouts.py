"""Rewards keep to their rollouts, in whatever order groups finish."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recap_fast.training.distributed import World
from recap_fast.training.scored_rollouts import generate_and_score
from recap_fast.types import Prompt, RewardTable, Rollout, SamplingSpec, UserError

SPEC = SamplingSpec(2, 8, 1.0, 0)


class Engine:
    """Finishes groups in a given order, and notes how far it came."""

    ranks = 1

    def __init__(self, order):
        self.order, self.done = order, []

    def any_rank(self, here):
        return here

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

    def start(self, max_new_tokens, tally=None):
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


class Told(World):
    """Hears of nobody else."""

    def exchange(self, work):
        return [work()]


def told(rank, size):
    return Told(rank, size, torch.device("cpu"), None)


class Shared(Engine):
    """As one of several processes hears it, in which the others say what they are told to."""

    def __init__(self, order, ranks, others=()):
        super().__init__(order)
        self.ranks, self.others = ranks, iter(others)

    def any_rank(self, here):
        return here or next(self.others, False)


@pytest.mark.parametrize("place", [0, 1])
def test_processes_of_an_engine_score_a_part_each(place):
    world = told(place, 2)
    scorer, engine = Scorer(), Shared([2, 0, 3, 1], ranks=2)
    scored = generate_and_score(engine, scorer, prompts(4), SPEC, world=world)
    assert engine.done == [2, 0, 3, 1], "both sample all"
    assert sorted({group for group, _ in scorer.rows}) == [place, place + 2]
    assert [r.group for r in scored.rollouts] == [place, place, place + 2, place + 2]
    assert scored.rewards.values.tolist() == [r.token_ids for r in scored.rollouts]


@pytest.mark.parametrize(("rank", "wanted"), [(0, [0, 2]), (1, [0, 2]), (2, [1, 3]), (3, [1, 3])])
def test_engines_share_the_prompts_and_their_processes_do_not(rank, wanted):
    engine = Shared([], ranks=2)
    asked = []
    engine.generate = lambda prompts, sampling, on_group: (
        asked.append(([p.row for p in prompts], [sampling.group(i) for i in range(len(prompts))]))
        or []
    )
    generate_and_score(engine, Scorer(), prompts(4), SPEC, world=told(rank, 4))
    assert asked == [(wanted, wanted)]


def test_a_stop_elsewhere_ends_the_sampling_of_the_whole_engine():
    engine = Shared([1, 0, 2], ranks=2, others=[False, True])
    world = told(0, 2)
    assert generate_and_score(engine, Scorer(), prompts(3), SPEC, world=world) is None
    assert engine.done == [1]


def test_what_goes_wrong_in_scoring_waits_until_the_whole_engine_stops():
    """The processes of an engine step together: one that left in between would let others hang."""
    engine, scorer = Shared([0, 1, 2], ranks=2), Scorer()
    world = told(0, 2)

    def fail(group):
        raise UserError("no workers")

    scorer.add = fail
    with pytest.raises(UserError, match="no workers"):
        generate_and_score(engine, scorer, prompts(3), SPEC, world=world)
    assert engine.done == [0]
