from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recap_fast.simulate.pipeline import Costs, SetUp, simulate
from recap_fast.simulate.workload import Lengths, Workload, clipped_lognormal

ALIKE = Workload(8, 4, (Lengths((0, 1), (100, 100), 100),), (1.5,))
TAILED = Workload(16, 4, (clipped_lognormal(200, 4000, 1.0),), (1.0,))
COSTS = Costs(0.01, 0.001, 0.5, 0.001, reward=0.1, sync=0.2, other=0.05)
ROLLOUT = 100 * (0.01 + 32 * 0.001)
TRAIN = 0.5 + 0.001 * 32 * 100 * 1.5 + 0.05


def test_a_synchronous_step_is_the_sum_of_its_stages():
    found = simulate(COSTS, ALIKE, SetUp(1, 1, colocated=True))
    assert found.step_seconds == pytest.approx(ROLLOUT + 0.1 + TRAIN + 0.2)
    assert found.stage_seconds == pytest.approx(
        {"wait": ROLLOUT + 0.1, "train": TRAIN, "sync": 0.2}
    )
    assert found.staleness == {0: 1.0}
    assert found.requests == pytest.approx(32)
    assert found.tokens_per_second == pytest.approx(3200 / found.step_seconds)


def test_apart_and_synchronous_each_side_waits_for_the_other():
    together = simulate(COSTS, ALIKE, SetUp(1, 1, colocated=True))
    apart = simulate(COSTS, ALIKE, SetUp(1, 1))
    assert apart.step_seconds == pytest.approx(together.step_seconds)
    assert apart.trainer_idle == pytest.approx((ROLLOUT + 0.1) / apart.step_seconds)
    assert apart.engine_idle == pytest.approx(1 - ROLLOUT / apart.step_seconds)


def test_steps_that_train_few_tokens_are_short():
    uneven = replace(ALIKE, lengths=ALIKE.lengths * 2, trained_per_sampled=(0.0, 3.0))
    found = simulate(COSTS, uneven, SetUp(1, 1, colocated=True))
    even = simulate(COSTS, ALIKE, SetUp(1, 1, colocated=True))
    assert found.step_seconds == pytest.approx(even.step_seconds)
    seconds = {round(s.end - s.start, 3) for s in found.spans if s.activity == "train"}
    assert seconds == {0.55, 0.55 + 9.6}
    # Overlapped, what varies is waited for.
    slow = [simulate(COSTS, work, SetUp(1, 1, 1, 1)).trainer_idle for work in (uneven, ALIKE)]
    assert slow[0] > slow[1]


def test_gpus_share_out_the_work():
    found = simulate(COSTS, ALIKE, SetUp(4, 8, colocated=False))
    assert found.stage_seconds["wait"] == pytest.approx(100 * (0.01 + 4 * 0.001) + 0.1)
    assert found.stage_seconds["train"] == pytest.approx(0.5 + 4.8 / 4 + 0.05)


def test_one_step_off_a_slow_trainer_never_waits():
    costs = replace(COSTS, train_token=0.002)
    found = simulate(costs, ALIKE, SetUp(1, 1, 1, 1))
    assert found.step_seconds == pytest.approx(0.5 + 0.05 + 0.002 * 4800 + 0.2)
    assert found.trainer_idle == pytest.approx(0, abs=1e-9)
    assert found.engine_idle == pytest.approx(1 - ROLLOUT / found.step_seconds)
    assert found.staleness == {1: pytest.approx(1)}


def test_one_step_off_slow_engines_never_rest():
    costs = replace(COSTS, train_token=0.0001, reward=0.0)
    found = simulate(costs, ALIKE, SetUp(1, 1, 1, 1))
    # What each request adds is paid in full; decode steps are shared with the step before.
    assert 3200 * 0.001 + 0.2 < found.step_seconds < ROLLOUT + 0.2
    assert found.engine_idle == pytest.approx(0.2 / found.step_seconds)
    assert found.trainer_idle > 0.5


def test_depth_hides_the_tail_that_one_step_off_waits_for():
    costs = Costs(0.01, 0.0005, 0.1, 0.0005)
    synchronous, one_off, far = (
        simulate(costs, TAILED, SetUp(4, 4, depth, staleness)).step_seconds
        for depth, staleness in ((0, 0), (1, 1), (2, 6))
    )
    assert synchronous > 1.2 * one_off > 1.2 * 1.2 * far


@settings(max_examples=20, deadline=None)
@given(
    depth=st.sampled_from([0, 0.5, 1, 1.5, 2, 3]),
    slack=st.integers(0, 3),
    parts=st.integers(1, 4),
    trainer=st.floats(0.0001, 0.01),
    seed=st.integers(0, 5),
)
def test_no_token_is_older_than_the_bound(depth, slack, parts, trainer, seed):
    bound = math.ceil(depth) + slack
    costs = Costs(0.01, 0.001, 0.1, trainer, reward=0.3, sync=0.2)
    set_up = SetUp(2, 3, depth, bound, parts=parts)
    found = simulate(costs, TAILED, set_up, steps=4, seed=seed)
    assert found.max_staleness <= bound
    assert sum(found.staleness.values()) == pytest.approx(1)
    assert found.step_seconds == pytest.approx(sum(found.stage_seconds.values()))
    assert 0 <= found.trainer_idle < 1
    assert 0 <= found.engine_idle < 1


def test_every_group_is_trained_once_and_the_trainer_does_one_thing_at_a_time():
    found = simulate(COSTS, TAILED, SetUp(2, 2, 1, 3))
    edges = [(span.start, span.end) for span in found.spans]
    assert all(later >= end - 1e-9 for (_, end), (later, _) in zip(edges, edges[1:], strict=False))
    tokens = found.tokens_per_second * found.step_seconds
    assert tokens == pytest.approx(16 * 4 * 200, rel=0.25)


def test_a_step_in_parts_starts_before_its_last_group():
    costs = Costs(0.01, 0.0, 0.4, 0.001)
    whole = simulate(costs, TAILED, SetUp(1, 1))
    parts = simulate(costs, TAILED, SetUp(1, 1, parts=4))
    assert parts.step_seconds < 0.9 * whole.step_seconds
    assert parts.stage_seconds["train"] == pytest.approx(whole.stage_seconds["train"], rel=0.1)


def test_a_pause_for_weights_stops_both_sides():
    slow = simulate(replace(COSTS, sync=2.0), ALIKE, SetUp(1, 1, 1, 1))
    fast = simulate(replace(COSTS, sync=0.0), ALIKE, SetUp(1, 1, 1, 1))
    assert slow.step_seconds == pytest.approx(fast.step_seconds + 2.0, rel=0.05)


def test_the_same_seed_gives_the_same_simulation():
    first, again, other = (
        simulate(COSTS, TAILED, SetUp(2, 2, 1, 2), seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first.spans == again.spans
    assert first.step_seconds != other.step_seconds


def test_set_ups_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="depth 1 makes tokens up to 1 versions old"):
        SetUp(1, 1, depth=1, max_staleness=0)
    with pytest.raises(ValueError, match="colocated"):
        SetUp(1, 2, colocated=True)
    with pytest.raises(ValueError, match="an engine has 4 GPUs"):
        simulate(replace(COSTS, engine_gpus=4), ALIKE, SetUp(4, 2))


def test_slots_bound_what_is_in_flight():
    found = simulate(replace(COSTS, slots=5), ALIKE, SetUp(1, 2))
    assert max(count for _, count in found.in_flight) == 10
    assert np.isclose(found.stage_seconds["wait"], 0.1 + 4 * 100 * (0.01 + 4 * 0.001), rtol=0.15)
