"""Rollouts that are sampled ahead: which prompts, how old, in which step, and after a resume.

The engine is a stand-in that completes groups when a test says so; rows and rewards are real.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recap_fast.training import rollout_source
from recap_fast.training.rollout_source import StepBatch, sampling_of
from recap_fast.types import StepFeedback, UserError
from tests.training.ahead import STEPS, Engine, Told, make_config, rows, tokens, train


@pytest.mark.parametrize("depth", [1, 3])
def test_each_step_has_the_rows_seeds_and_rewards_of_a_synchronous_run(
    depth: int, make_source: Any
) -> None:
    ahead, plain = (train(*make_source(d), 0, STEPS) for d in (depth, 0))
    for a, b in zip(ahead, plain, strict=True):
        assert tokens(a) == tokens(b)
        assert [row.token_ids for row in a.supervised] == [row.token_ids for row in b.supervised]
        np.testing.assert_array_equal(a.drawn.scored.rewards.values, b.drawn.scored.rewards.values)


@pytest.mark.parametrize("depth", [1, 3])
def test_no_token_is_older_than_depth(depth: int, make_source: Any) -> None:
    source, engine = make_source(depth)
    ages = set()
    for step, batch in enumerate(train(source, engine, 0, STEPS)):
        ages |= {step - v for r in batch.drawn.scored.rollouts for v in r.versions}
    assert max(ages) == depth
    assert len(engine.asked) == sum(len(rows(b)) for b in train(*make_source(0), 0, STEPS))


def test_earlier_steps_have_priority(make_source: Any) -> None:
    source, engine = make_source(2)
    train(source, engine, 0, STEPS)
    seeds = [seed for _, seed, _ in engine.asked]
    assert [p for _, _, p in engine.asked] == [seed - seeds[0] + 1 for seed in seeds]
    assert min(p for _, _, p in engine.asked) == 1, "evaluation, at 0, comes first"


def test_nothing_is_sent_off_before_its_weights_are_there(make_source: Any) -> None:
    source, engine = make_source(1)
    assert engine.asked == []
    batch = source.next(0, [])
    steps = {seed for _, seed, _ in engine.asked}
    assert len(steps) == 2
    assert source.next(0, []) is not None, "asked again for the same step"
    assert {seed for _, seed, _ in engine.asked} == steps
    source.trained(1)
    assert len({seed for _, seed, _ in engine.asked}) == 3
    assert batch is not None


def test_a_step_does_not_wait_for_long_rollouts_where_they_may_be_older(make_source: Any) -> None:
    source, engine = make_source(1, "rollout.async.max_staleness=3", engine=Engine(holds=True))
    batches = []
    for step in range(STEPS):
        if step == 0:
            source._send_until(0)
        # The first group of all takes longest; it may be trained on in step 2 at the latest.
        held = 1 if step < 2 else 0
        engine.complete(start=held)
        batch = source.next(step, [])
        batches.append(batch)
        engine.version = step + 1
        source.trained(step + 1)
    first = engine.asked[0]
    where = [step for step, batch in enumerate(batches) if first[0] in rows(batch)]
    assert where[0] == 2
    seen = [(r.prompt.source, r.prompt.row) for b in batches for r in b.drawn.scored.rollouts]
    plain = [
        (r.prompt.source, r.prompt.row)
        for b in train(*make_source(0), 0, STEPS)
        for r in b.drawn.scored.rollouts
    ]
    assert sorted(seen) == sorted(plain), "every prompt is trained on once"
    assert {len(rows(b)) for b in batches} == {
        len(rows(b)) for b in train(*make_source(0), 0, STEPS)
    }


def newest_first(source: Any, engine: Engine, waiting: Any, **_: Any) -> None:
    assert waiting, "the step waits for what nobody has asked for"
    engine.complete(start=len(engine.open) - 1)
    wait([one.scored for one in source._flights.values() if one.sampled.done()])


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_steps_that_must_take_more_leave_fewer_to_those_after_them(
    size: int, depth: int, make_source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps' own numbers of groups differ, and those that were asked for last end first."""
    late = f"rollout.async.max_staleness={depth + 1}"
    uneven = "data.batch_size=7"
    drawn = [len(rows(b)) for b in train(*make_source(0, uneven), 0, STEPS)]
    assert len(set(drawn)) > 1
    trained = 0
    for rank in range(size):
        world = Told(rank, size, torch.device("cpu"), None)
        engine = Engine(holds=True)
        source, _ = make_source(depth, late, uneven, engine=engine, world=world)
        monkeypatch.setattr(rollout_source, "wait", partial(newest_first, source, engine))
        for step, batch in enumerate(train(source, engine, 0, STEPS)):
            trained += len(rows(batch))
            ages = {step - v for r in batch.drawn.scored.rollouts for v in r.versions}
            assert max(ages, default=0) <= depth + 1
    assert trained == sum(drawn)


def test_groups_are_numbered_in_their_order(make_source: Any) -> None:
    source, engine = make_source(2)
    for batch in train(source, engine, 0, STEPS):
        groups = [r.group for r in batch.drawn.scored.rollouts]
        assert groups == sorted(groups)
        assert set(groups) == set(range(len(set(groups))))


@pytest.mark.parametrize("stopped", [3, 7])
def test_resuming_draws_again_what_was_not_trained_on(stopped: int, make_source: Any) -> None:
    whole = train(*make_source(2), 0, STEPS)
    source, engine = make_source(2)
    train(source, engine, 0, stopped)
    assert len(engine.asked) > sum(len(rows(b)) for b in whole[:stopped]), "some are in flight"
    state = source.state_dict()
    source.close()

    resumed, engine = make_source(2)
    resumed.load_state_dict(state, stopped)
    rest = train(resumed, engine, stopped, STEPS)
    assert [tokens(b) for b in rest] == [tokens(b) for b in whole[stopped:]]


FOLLOWING = (
    "data.mixing=adaptive", "data.adaptive.most=3.0", "data.batch_size=8",
    "data.review={rewards: [vowels], after: 1, share: 0.5}",
)  # fmt: skip
DYNAMIC = "rollout.dynamic_sampling={max_refills: 2}"


def told(step: int, batch: StepBatch) -> StepFeedback:
    """What depends on the step and its rows alone."""
    prompts = {one.group: one.prompt for one in batch.drawn.scored.rollouts}.values()
    groups = [(one.source, one.row, (one.row + step) % 4 > 0) for one in prompts]
    return StepFeedback({"length": 2.0 + step % 3, "vowels": 2.0, "ntp": 0.1}, groups)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("stopped", [2, 6])
@pytest.mark.parametrize("more", [(), (DYNAMIC,)], ids=["every group", "dynamic"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_mix_that_follows_steps_goes_on_to_the_bit(
    depth: int, more: tuple[str, ...], stopped: int, make_source: Any
) -> None:
    def engine() -> Engine:
        return Engine(flat=lambda prompt: prompt.row % 3 == 0)

    def build() -> tuple[Any, Engine]:
        return make_source(depth, *FOLLOWING, *more, engine=engine())

    def mix(batch: StepBatch) -> Any:
        return [one.row for one in batch.supervised], tokens(batch)

    source, used = build()
    whole = train(source, used, 0, STEPS, told)
    assert len({len(batch.supervised) for batch in whole}) > 1, "the shares move"
    seen = [(r.prompt.source, r.prompt.row) for b in whole for r in b.drawn.scored.rollouts]
    assert max(Counter(seen).values()) > 4, "groups of 4 come back"

    broken, used_before = build()
    train(broken, used_before, 0, stopped, told)
    state = json.loads(json.dumps(broken.state_dict()))
    assert depth == 0 or any(isinstance(one, dict) for one in state["drawn_ahead"]["log"])
    resumed, used_after = build()
    resumed.load_state_dict(state, stopped)
    used_after.version = stopped
    rest = train(resumed, used_after, stopped, STEPS, told)
    assert [mix(batch) for batch in rest] == [mix(batch) for batch in whole[stopped:]]
    assert json.dumps(resumed.state_dict()) == json.dumps(source.state_dict())
    if depth:
        in_turns, _ = make_source(0, *FOLLOWING, *more, engine=engine())
        with pytest.raises(UserError, match="before the mix has changed"):
            in_turns.load_state_dict(state, stopped)


def test_rows_that_are_drawn_already_stay_what_they_are(make_source: Any) -> None:
    """What a step tells acts on the first step that is not drawn yet."""

    def all_on(step: int, batch: StepBatch) -> StepFeedback:
        return StepFeedback({"length": 3.0, "vowels": 3.0, "ntp": 0.0})

    even = [len(b.supervised) for b in train(*make_source(0, "data.batch_size=40"), 0, 4)]
    assert even == [20] * 4
    for depth in (0, 2):
        adaptive = ("data.mixing=adaptive", "data.batch_size=40")
        batches = train(*make_source(depth, *adaptive), 0, 5, all_on)
        counts = [len(batch.supervised) for batch in batches]
        assert counts[: depth + 1] == [20] * (depth + 1)
        assert counts[depth + 1 :] == [18, 16, 15, 13][: 4 - depth]


def test_a_batch_that_was_not_trained_on_is_part_of_the_state(make_source: Any) -> None:
    for depth in (0, 2):
        source, engine = make_source(depth)
        train(source, engine, 0, 2)
        batch = source.next(2, [])
        state = source.state_dict()
        resumed, _ = make_source(depth)
        resumed.load_state_dict(state, 2)
        again = resumed.next(2, [])
        assert tokens(again) == tokens(batch)


def test_resuming_out_of_order_trains_each_prompt_once(make_source: Any) -> None:
    late = "rollout.async.max_staleness=4"
    source, engine = make_source(1, late, engine=Engine(holds=True))
    source._send_until(0)
    seen = []
    for step in range(2):
        engine.complete(start=1)  # the first stays open
        batch = source.next(step, [])
        seen += [(r.prompt.source, r.prompt.row) for r in batch.drawn.scored.rollouts]
        source.trained(step + 1)
    state = source.state_dict()
    resumed, engine = make_source(1, late)
    resumed.load_state_dict(state, 2)
    for batch in train(resumed, engine, 2, STEPS):
        seen += [(r.prompt.source, r.prompt.row) for r in batch.drawn.scored.rollouts]
    plain = [
        (r.prompt.source, r.prompt.row)
        for b in train(*make_source(0), 0, STEPS)
        for r in b.drawn.scored.rollouts
    ]
    assert sorted(seen) == sorted(plain)
    taking_turns, _ = make_source(0)
    with pytest.raises(UserError, match=r"resume it with the rollout\.async that it had"):
        taking_turns.load_state_dict(state, 2)


def test_a_run_in_order_resumes_with_another_depth(make_source: Any) -> None:
    whole = train(*make_source(0), 0, STEPS)
    source, engine = make_source(2)
    train(source, engine, 0, 3)
    for depth in (0, 1, 3):
        resumed, engine = make_source(depth)
        resumed.load_state_dict(source.state_dict(), 3)
        assert [tokens(b) for b in train(resumed, engine, 3, STEPS)] == [
            tokens(b) for b in whole[3:]
        ]


def test_a_stop_ends_the_wait(make_source: Any) -> None:
    source, _ = make_source(1, engine=Engine(holds=True))
    assert source.next(0, [15]) is None
    resumed, engine = make_source(1)
    resumed.load_state_dict(source.state_dict(), 0)
    assert tokens(train(resumed, engine, 0, 1)[0]) == tokens(train(*make_source(0), 0, 1)[0])


def test_what_an_engine_cannot_sample_is_raised_by_the_next_step(make_source: Any) -> None:
    source, engine = make_source(2, engine=Engine(holds=True))
    source._send_until(0)
    engine.open[-1][3].set_exception(UserError("no server is left"))  # of a later step
    with pytest.raises(UserError, match="no server is left"):
        source.next(0, [])


SMALL = ("rollout.group_size=2", "data.batch_size=8")  # four groups a step


def test_groups_are_with_the_reward_workers_at_once(tmp_path: Path, make_source: Any) -> None:
    """Each of six rewards waits until all six are being computed: those of three groups."""
    (tmp_path / "met").mkdir()
    meet = json.dumps({"folder": str(tmp_path / "met"), "count": 6, "seconds": 20.0})
    rewards = f"{{met: {{function: 'tests.rewards.reward_cases:meet', parameters: {meet}}}}}"
    source, engine = make_source(
        1, *SMALL, f"data.sources.0.rewards={rewards}",
        "rewards.workers=6", "rewards.timeout=60", own_scorer=True,
    )  # fmt: skip
    (batch,) = train(source, engine, 0, 1)
    assert len(rows(batch)) == 4
    assert np.nanmin(batch.drawn.scored.rewards.values) == 1.0
    assert batch.drawn.scored.rewards.failures == {}


def test_a_reward_that_hangs_keeps_no_other_group(make_source: Any) -> None:
    source, engine = make_source(
        1, *SMALL, "data.sources.0.rewards={r: 'tests.rewards.reward_cases:misbehave'}",
        "rewards.workers=2", "rewards.timeout=600", engine=Engine(holds=True), own_scorer=True,
    )  # fmt: skip
    source._send_until(0)
    first, *later = [source._flights[key].scored for key in sorted(source._flights)]
    prompt, sampling, index, future, version = engine.open.pop(0)
    good, other = engine.group(prompt, sampling, index, version)
    future.set_result([good, replace(other, text="hang")])
    engine.complete()
    assert len(later) == 7
    assert not wait(later, timeout=60).not_done
    assert not first.done()


def test_groups_whose_reward_workers_are_lost_are_scored_by_others(make_source: Any) -> None:
    source, engine = make_source(
        1, *SMALL, "data.sources.0.rewards={r: 'tests.rewards.reward_cases:slow'}",
        "rewards.workers=2", own_scorer=True,
    )  # fmt: skip
    source._send_until(0)
    lost = source._scorer.pool
    lost.stop()  # the one that replaces it also joins it
    (batch,) = train(source, engine, 0, 1)
    assert source._scorer.pool is not lost
    assert len(rows(batch)) == 4
    assert np.nanmin(batch.drawn.scored.rewards.values) == 1.0


@pytest.mark.parametrize("size", [2, 3])
def test_processes_sample_a_part_each(size: int, make_source: Any) -> None:
    plain = train(*make_source(0), 0, STEPS)
    parts = []
    for rank in range(size):
        world = Told(rank, size, torch.device("cpu"), None)
        parts.append(train(*make_source(2, world=world), 0, STEPS))
    for step, whole in enumerate(plain):
        found: Sequence[Any] = [
            (r.prompt.source, r.prompt.row, r.token_ids)
            for part in parts
            for r in part[step].drawn.scored.rollouts
        ]
        wanted = [(r.prompt.source, r.prompt.row, r.token_ids) for r in whole.drawn.scored.rollouts]
        assert sorted(found) == sorted(wanted)


def test_seeds_differ_between_steps_and_runs(tmp_path: Path, ahead_model: Path) -> None:
    config = make_config(tmp_path, ahead_model, 0)
    assert len({sampling_of(config, step).seed for step in range(100)}) == 100
