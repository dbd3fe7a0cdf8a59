"""Groups without a signal that were sampled ahead: what comes in their place, and after a resume.

The engine is a stand-in (`ahead.Engine`) whose rollouts are all the same for every third row.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest
import torch

from recap_fast.config import DynamicSamplingConfig, RolloutConfig
from recap_fast.training.distributed import World
from recap_fast.training.dynamic_sampling import drops, has_signal
from recap_fast.training.rollout_source import StepBatch
from recap_fast.training.scored_rollouts import ScoredRollouts
from recap_fast.types import Prompt, RewardTable, Rollout, UserError
from tests.training.ahead import STEPS, Engine, tokens, train

EIGHT = "data.batch_size=8"  # four prompts a step
DYNAMIC = ("rollout.dynamic_sampling={max_refills: 3}", EIGHT)
ORDERS = [
    pytest.param(1, (), id="depth-1"),
    pytest.param(2, (), id="depth-2"),
    pytest.param(1, ("rollout.async.max_staleness=3",), id="depth-1-late"),
    pytest.param(2, ("rollout.async.max_staleness=4",), id="depth-2-late"),
]


def is_flat(prompt: Prompt) -> bool:
    return prompt.row % 3 == 0


def engine(holds: bool = False) -> Engine:
    return Engine(holds, flat=is_flat)


def prompts(batch: StepBatch, trained: bool) -> list[tuple[str, int]]:
    """Of the groups that enter the loss, or of those that were dropped."""
    scored = batch.drawn.scored
    enter = set(batch.drawn.trained.tolist())
    found = [
        (one.prompt.source, one.prompt.row)
        for row, one in enumerate(scored.rollouts)
        if (row in enter) is trained
    ]
    return list(dict.fromkeys(found))


def seen(batch: StepBatch) -> tuple[Any, ...]:
    """All that a step makes of its rollouts."""
    drawn = batch.drawn
    return (
        tokens(batch), drawn.trained.tolist(), drawn.groups.metrics(),
        np.nan_to_num(drawn.scored.rewards.values, nan=-1).tolist(),
        [row.token_ids for row in batch.supervised],
    )  # fmt: skip


def check_each_once(batches: list[StepBatch]) -> None:
    found = [one for b in batches for trained in (True, False) for one in prompts(b, trained)]
    assert len(found) == len(set(found)), "each is trained on or dropped, once"


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("depth", "more"), ORDERS)
def test_groups_without_a_signal_are_replaced_and_counted(
    depth: int, more: tuple[str, ...], make_source: Any
) -> None:
    plain = train(*make_source(0, *DYNAMIC, engine=engine()), 0, STEPS)
    batches = train(*make_source(depth, *DYNAMIC, *more, engine=engine()), 0, STEPS)
    check_each_once(batches)
    ages = set()
    for step, (batch, in_turns) in enumerate(zip(batches, plain, strict=True)):
        scored, count = batch.drawn.scored, batch.drawn.groups
        trained, dropped = prompts(batch, True), prompts(batch, False)
        assert len(trained) == len(prompts(in_turns, True)), "no step is smaller"
        assert count.sampled == len(trained) + len(dropped)
        assert count.dropped == len(dropped)
        assert all(row % 3 == 0 for _, row in dropped)
        assert count.without_signal == sum(row % 3 == 0 for _, row in trained)
        groups = np.array([one.group for one in scored.rollouts])
        assert sorted(set(groups.tolist())) == list(range(count.sampled))
        for group in set(groups[batch.drawn.trained].tolist()):
            (rows,) = np.nonzero(groups == group)
            flat = is_flat(scored.rollouts[rows[0]].prompt)
            assert has_signal(scored.rewards.values[rows]) != flat
        ages |= {step - v for r in scored.rollouts for v in r.versions}
    assert sum(batch.drawn.groups.dropped for batch in batches) >= 8
    assert sum(batch.drawn.groups.refilled for batch in batches) >= 6
    assert 0 <= min(ages) < max(ages) <= (3 if more and depth == 1 else 2 * depth)


def test_a_single_step_is_that_of_a_run_in_turns(make_source: Any) -> None:
    """Where nothing is drawn behind it, refills are the same rows with the same seeds."""
    one = ("training.steps=1", "data.batch_size=16")
    ahead, plain = (
        train(*make_source(depth, *DYNAMIC, *one, engine=engine()), 0, 1)[0] for depth in (2, 0)
    )
    assert ahead.drawn.groups.dropped >= 3
    assert seen(ahead) == seen(plain)


def test_refills_are_bounded(make_source: Any) -> None:
    source, all_flat = make_source(
        2,
        "rollout.dynamic_sampling={max_refills: 2}",
        EIGHT,
        engine=Engine(flat=lambda prompt: True),
    )
    batches = train(source, all_flat, 0, 4)
    check_each_once(batches)
    places = sum(len(prompts(batch, True)) for batch in batches)
    counts = [batch.drawn.groups for batch in batches]
    assert sum(one.without_signal for one in counts) == places
    assert sum(one.refilled for one in counts) == 0
    assert max(one.dropped for one in counts) == 4 * 2


def test_later_steps_are_refilled_early_where_order_is_free(make_source: Any) -> None:
    for more, early in ((), False), (("rollout.async.max_staleness=3",), True):
        source, used = make_source(2, *DYNAMIC, *more, engine=engine())
        source._scoring = Inline(source._scoring)
        assert source.next(0, []) is not None
        refilled = {priority for prompt, priority, number in used.log if number >= 4}
        assert (refilled - {1} != set()) == early
        assert {priority for _, _, priority in used.asked} == {1, 2, 3}


class Inline:
    """Completes no group that is not scored: nothing then depends on how fast a machine is."""

    def __init__(self, scoring: Any) -> None:
        self.scoring = scoring

    def score(self, sampled: Any) -> Any:
        scored = self.scoring.score(sampled)
        sampled.add_done_callback(lambda _: wait([scored], timeout=60))
        return scored

    def close(self) -> None:
        self.scoring.close()


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("depth", "more"), ORDERS)
def test_a_run_that_resumes_at_any_step_is_an_unbroken_one(
    depth: int, more: tuple[str, ...], make_source: Any
) -> None:
    source, used = make_source(depth, *DYNAMIC, *more, engine=engine())
    source._scoring = Inline(source._scoring)
    whole, states = [], [source.state_dict()]
    for step in range(STEPS):
        whole += train(source, used, step, step + 1)
        states.append(source.state_dict())
    assert any(state.get("drawn_ahead", {}).get("log") for state in states), "some refills wait"
    for step, state in enumerate(states[:-1]):
        resumed, again = make_source(depth, *DYNAMIC, *more, engine=engine())
        resumed._scoring = Inline(resumed._scoring)
        resumed.load_state_dict(json.loads(json.dumps(state)), step)
        assert resumed.state_dict() == state
        again.version = step
        rest = train(resumed, again, step, STEPS)
        assert [seen(batch) for batch in rest] == [seen(batch) for batch in whole[step:]]
        assert resumed.state_dict() == states[-1]


def test_a_stop_between_rounds_gives_all_rows_back(make_source: Any) -> None:
    """Those that were dropped in the step too, and what was drawn in their place."""
    whole = train(*make_source(1, *DYNAMIC, engine=engine()), 0, STEPS)
    stop: list[int] = []
    source, used = make_source(1, *DYNAMIC, engine=engine())
    train(source, used, 0, 2)
    assert whole[2].drawn.groups.dropped, "or the test tests nothing"
    state, refill = source.state_dict(), source._rows.refill
    source._rows.refill = lambda dropped: (refill(dropped), stop.append(15))
    assert source.next(2, stop) is None
    assert source._dropped
    assert source.state_dict() == state
    resumed, again = make_source(1, *DYNAMIC, engine=engine())
    resumed.load_state_dict(state, 2)
    rest = train(resumed, again, 2, STEPS)
    assert [seen(batch) for batch in rest] == [seen(batch) for batch in whole[2:]]


def test_another_depth_keeps_to_its_own_age(make_source: Any) -> None:
    """What a deeper run had drawn is not sent off before it is due."""
    source, used = make_source(3, *DYNAMIC, engine=engine())
    batches = train(source, used, 0, 2)
    state = source.state_dict()
    assert state["drawn_ahead"]["log"]
    resumed, again = make_source(1, *DYNAMIC, engine=engine())
    resumed.load_state_dict(state, 2)
    again.version = 2
    rest = train(resumed, again, 2, STEPS)
    check_each_once(batches + rest)
    ages = {
        step - version
        for step, batch in enumerate(rest, start=2)
        for row in batch.drawn.trained
        for version in batch.drawn.scored.rollouts[row].versions
    }
    assert ages == {0, 1}
    in_turns, _ = make_source(0, *DYNAMIC, engine=engine())
    with pytest.raises(UserError, match=r"trained on, or dropped, already: resume it with"):
        in_turns.load_state_dict(state, 2)


def test_a_run_in_turns_goes_on_ahead(make_source: Any) -> None:
    source, used = make_source(0, *DYNAMIC, engine=engine())
    batches = train(source, used, 0, 3)
    resumed, again = make_source(2, *DYNAMIC, engine=engine())
    resumed.load_state_dict(source.state_dict(), 3)
    check_each_once(batches + train(resumed, again, 3, STEPS))


def test_a_step_does_not_wait_for_refills_where_they_may_be_late(make_source: Any) -> None:
    """Its last completions are of a flat group; others that are complete are trained on."""
    late = "rollout.async.max_staleness=3"
    source, used = make_source(1, *DYNAMIC, late, engine=engine(holds=True))
    batches = []
    for step in range(STEPS):
        source._send_until(step)
        keep = [i for i, one in enumerate(used.open) if one[2] < 4 or step % 3 == 2]
        if step == STEPS - 1:
            used.holds = False
            keep = list(range(len(used.open)))
        for place in reversed(keep):  # refills stay open but in every third step
            used.complete(1, start=place)
        batch = _next(source, used, step)
        batches.append(batch)
        used.version = step + 1
        source.trained(step + 1)
    check_each_once(batches)
    ages = {
        step - version
        for step, batch in enumerate(batches)
        for row in batch.drawn.trained
        for version in batch.drawn.scored.rollouts[row].versions
    }
    assert max(ages) <= 3
    plain = train(*make_source(0, *DYNAMIC, engine=engine()), 0, STEPS)
    assert [len(prompts(b, True)) for b in batches] == [len(prompts(b, True)) for b in plain]


def _next(source: Any, used: Engine, step: int) -> StepBatch:
    """The step's batch, while refills that it cannot do without are completed one by one."""
    found: list[StepBatch] = []
    waiting = threading.Thread(target=lambda: found.append(source.next(step, [])))
    waiting.start()
    while waiting.is_alive():
        waiting.join(0.2)
        if waiting.is_alive():
            used.complete(1)
    return found[0]


class Meeting(World):
    """Processes of a run as threads, which exchange what they say."""

    def __init__(self, rank: int, size: int, table: dict[int, Any], barrier: Any) -> None:
        super().__init__(rank, size, torch.device("cpu"), None)
        self.table, self.barrier = table, barrier

    __slots__ = ("barrier", "table")

    def exchange(self, work: Any) -> Any:
        self.table[self.rank] = work()
        self.barrier.wait(60)
        found = [self.table[rank] for rank in range(self.size)]
        self.barrier.wait(60)
        return found


@pytest.mark.thinned(3)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("depth", "more"), ORDERS[:3])
def test_processes_draw_the_same_refills(
    depth: int, more: tuple[str, ...], size: int, make_source: Any
) -> None:
    """Each knows the rewards of its own groups alone."""
    barrier, table = threading.Barrier(size), {}
    made = [
        make_source(
            depth, *DYNAMIC, *more, engine=engine(), world=Meeting(rank, size, table, barrier)
        )
        for rank in range(size)
    ]
    for source, _ in made:
        source._scoring = Inline(source._scoring)
    found: dict[int, list[StepBatch]] = {}
    threads = [
        threading.Thread(target=lambda r=rank: found.update({r: train(*made[r], 0, STEPS)}))
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(found) == set(range(size))
    for batches in found.values():
        assert [seen(batch) for batch in batches] == [seen(batch) for batch in found[0]]
    assert len({json.dumps(source.state_dict()) for source, _ in made}) == 1
    assert all(used.asked for _, used in made), "each samples some"
    check_each_once(found[0])
    if not more:  # in their order: as one process
        whole = train(*make_source(depth, *DYNAMIC, engine=engine()), 0, STEPS)
        assert [seen(batch) for batch in found[0]] == [seen(batch) for batch in whole]


def test_groups_are_judged_by_objective() -> None:
    """Rewards that add up to the same in all rollouts differ in each objective."""
    config = RolloutConfig(dynamic_sampling=DynamicSamplingConfig(max_refills=2))
    prompt = Prompt("s", 0, [1], "", None, {})
    rollouts = [Rollout(prompt, 0, [1], [0.0], "stop", "") for _ in range(2)]

    def group(rewards: list[list[float]]) -> ScoredRollouts:
        return ScoredRollouts(rollouts, RewardTable(np.array(rewards, np.float32)), 0.0, 0.0)

    assert not drops(config, group([[1.0, 0.0], [0.0, 1.0]]), 0)
    assert drops(config, group([[1.0, 0.0], [1.0, 0.0]]), 1)
    assert not drops(config, group([[1.0, 0.0], [1.0, 0.0]]), 2), "the last one stays"
    assert not drops(RolloutConfig(), group([[1.0, 0.0], [1.0, 0.0]]), 0), "where none is asked for"
