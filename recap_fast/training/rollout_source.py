"""Where a step's rollouts come from: sampled when the step asks for them, or ahead of it.

Both kinds draw the same rows for a step and sample them with the same seeds, as long as no group is
replaced. What they have drawn and the trainer has not trained on is no part of their state: a
resumed run draws it again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from recap_fast.config import TrainConfig
from recap_fast.data.mix import DataStream
from recap_fast.rewards.scorer import RewardScorer
from recap_fast.rollout.protocol import RolloutEngine
from recap_fast.training.distributed import World
from recap_fast.training.dynamic_sampling import StepRollouts, drops, sample_step, sort_out
from recap_fast.training.engine_metrics import EngineMetrics
from recap_fast.training.rows_ahead import (
    DrawnPrompt,
    Key,
    RowsAhead,
    is_in_order,
    without_ahead,
)
from recap_fast.training.scored_rollouts import (
    ScoredRollouts,
    decoded,
    encoded,
    generate_and_score,
    merged,
)
from recap_fast.training.scoring_ahead import ScoringAhead
from recap_fast.types import (
    Prompt,
    RewardTable,
    Rollout,
    SamplingSpec,
    StepFeedback,
    SupervisedRow,
    UserError,
)

_SEED_STRIDE = 1_000_003
"""Prime distance between the sampling seeds of two runs, so that their steps share none."""
_NOTHING = StepFeedback()
_LOOKS_EVERY = 0.5
"""Seconds between looks at whether the run is to stop."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a step trains on."""

    supervised: list[SupervisedRow]
    drawn: StepRollouts
    engine: Mapping[str, float] = field(default_factory=dict)
    """What the engine reports since the batch before, as metrics: not what it does in the step."""


@runtime_checkable
class SamplingAhead(Protocol):
    """What an engine offers that samples while the trainer trains."""

    def submit(
        self, prompt: Prompt, sampling: SamplingSpec, index: int, priority: int
    ) -> Future[list[Rollout]]:
        """See `ServerEngine.submit`."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """See `ServerEngine.take_metrics`."""
        ...


class RolloutSource(Protocol):
    """All processes of a run call the methods together."""

    def next(self, step: int, stop: Sequence[int]) -> StepBatch | None:
        """The batch of the step after `step` optimizer steps; None where `stop` was filled, in any
        process."""
        ...

    def trained(self, step: int, feedback: StepFeedback = _NOTHING) -> None:
        """The last batch has been trained on, and the engine has the weights of `step`.

        Args:
            feedback: what the mix of the rows that are drawn from now on follows.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """From where to draw again, JSON-able: everything that was not trained on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Goes on where `state_dict` was taken, after `step` optimizer steps."""
        ...

    def close(self) -> None:
        """Gives up what is being sampled."""
        ...


def sampling_of(config: TrainConfig, step: int) -> SamplingSpec:
    """How the rollouts of a step are sampled."""
    return SamplingSpec(
        n=config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        seed=config.seed * _SEED_STRIDE + step,
    )


class SynchronousRollouts:
    """Samples when a step asks for it, from the weights of that step."""

    def __init__(
        self,
        config: TrainConfig,
        stream: DataStream,
        engine: RolloutEngine,
        scorer: RewardScorer,
        world: World,
    ) -> None:
        self._config = config
        self._stream = stream
        self._engine = engine
        self._scorer = scorer
        self._world = world
        self._metrics = None
        if isinstance(engine, SamplingAhead):
            self._metrics = EngineMetrics(engine.take_metrics, world)
        self._state = stream.state_dict()
        self._is_there = True  # the stream, where `_state` is

    def next(self, step: int, stop: Sequence[int]) -> StepBatch | None:
        if not self._is_there:  # the last batch was not trained on
            self._stream.load_state_dict(self._state)
        self._is_there = False
        rows = self._stream.next_step()
        sample = partial(
            generate_and_score, self._engine, self._scorer, stop=stop, world=self._world
        )
        drawn = sample_step(
            self._config.rollout,
            rows.prompts,
            sampling_of(self._config, step),
            sample,
            self._stream.refill,
        )
        if drawn is None:
            return None
        metrics = {} if self._metrics is None else self._metrics.take()
        return StepBatch(rows.supervised, drawn, metrics)

    def trained(self, step: int, feedback: StepFeedback = _NOTHING) -> None:
        self._stream.follow(feedback)
        self._state = self._stream.state_dict()
        self._is_there = True

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        if not is_in_order(state):
            raise UserError(
                "the checkpoint is of a run with rollout.async, some of whose later prompts "
                "were drawn before the mix has changed, or are trained on, or dropped, already: "
                "resume it with the rollout.async that it had"
            )
        self._state = without_ahead(state)
        self._is_there = False

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A group that this process has sent off, and its scored rollouts once they are there."""

    sampled: Future[list[Rollout]]
    scored: Future[ScoredRollouts]


@dataclass(frozen=True, slots=True)
class _Ready:
    """Groups of this process, once it has waited for a step."""

    chosen: list[Key]  # what the step trains on, in order
    dropped: list[Key]  # others are to be sampled in the place of these
    is_enough: bool  # or else some of those others are waited for


class AsynchronousRollouts:
    """Samples `depth` steps ahead of the trainer, while it trains.

    The prompts of step s + depth are sent off when the engine has the weights of step s; earlier
    steps have priority there. A step trains on as many groups as it has drawn: on those that were
    drawn longest ago where `max_staleness` is `depth`, and else on those that are complete first,
    with the ones that would become too stale among them; where these alone are more than it has
    drawn, the steps after it have fewer. No token is then older than
    `max_staleness` steps when it is trained on, and no rollout is thrown away, which
    would leave out the long ones.

    With dynamic sampling a step judges the groups that it waits for, which is the same in every
    run, and where steps need not keep their order, all that are complete by then. What is sampled
    in the place of a group that is dropped has its step and its priority.
    """

    def __init__(
        self,
        config: TrainConfig,
        stream: DataStream,
        engine: SamplingAhead,
        scorer: RewardScorer,
        world: World,
    ) -> None:
        settings = config.rollout.asynchronous
        self._config = config
        self._depth = settings.depth
        self._delay = settings.staleness_bound - settings.depth
        self._engine = engine
        self._scorer = scorer
        self._world = world
        self._metrics = EngineMetrics(engine.take_metrics, world)
        self._scoring = ScoringAhead(scorer, config.rollout.max_new_tokens)
        self._rows = RowsAhead(stream)
        self._flights: dict[Key, _Flight] = {}  # own
        # Since the last batch that was trained on: of all processes, and own rollouts.
        self._dropped: dict[Key, DrawnPrompt] = {}
        self._dropped_scored: dict[Key, ScoredRollouts] = {}
        self._chosen: set[Key] = set()  # what the last batch was made of
        self._state = stream.state_dict()

    def next(self, step: int, stop: Sequence[int]) -> StepBatch | None:
        started = time.monotonic()
        self._send_until(step)
        is_enough = self._config.rollout.dynamic_sampling is None
        while not is_enough:
            notes = [note for _, note in self._world.exchange(lambda: self._judge(step, stop))]
            if any(note is None for note in notes):
                return None
            self._replace([(s, number) for note in notes for s, number in note["dropped"]], step)
            is_enough = all(note["is_enough"] for note in notes)

        def work() -> tuple[dict[str, Tensor], Any]:
            ready = self._wait_for(step, stop)
            return ({}, None) if ready is None else encoded(self._joined(ready.chosen, started))

        parts = self._world.exchange(work)
        if any(note is None for _, note in parts):
            return None
        drawn = self._drawn()
        prompts = {number: one.prompt for number, one in enumerate(drawn)}
        scored = merged([decoded(tensors, note, prompts) for tensors, note in parts])
        numbers = sorted({rollout.group for rollout in scored.rollouts})
        groups = [drawn[number] for number in numbers]
        self._chosen = {one.key for one in groups} - self._dropped.keys()
        places = {number: place for place, number in enumerate(numbers)}
        rollouts = [replace(one, group=places[one.group]) for one in scored.rollouts]
        batch = sort_out(
            self._config.rollout,
            replace(scored, rollouts=rollouts),
            [one.refills for one in groups],
        )
        return StepBatch(self._rows.supervised(step), batch, self._metrics.take())

    def _drawn(self) -> list[DrawnPrompt]:
        """What a batch may have rollouts of, the same in all processes: their numbers there."""
        found = [*self._rows.pending.values(), *self._dropped.values()]
        return sorted(found, key=lambda one: one.key)

    def _send_until(self, step: int) -> None:
        """Sends off what is due when the engine has the weights of `step`, drawing the steps up to
        `step` + depth."""
        last = min(step + self._depth, self._config.training.steps - 1)
        while self._rows.next_step <= last:
            self._rows.draw()
        for key, one in sorted(self._rows.pending.items()):
            if one.step <= last and self._is_mine(one.place) and key not in self._flights:
                self._flights[key] = self._send(one)

    def _send(self, one: DrawnPrompt) -> _Flight:
        sampling = sampling_of(self._config, one.step)
        sampled = self._engine.submit(one.prompt, sampling, one.number, priority=one.step + 1)
        return _Flight(sampled, self._scoring.score(sampled))

    def _is_mine(self, place: int) -> bool:
        return place % self._world.size == self._world.rank

    def _wait_for(self, step: int, stop: Sequence[int]) -> _Ready | None:
        """Waits until as many of this process's groups are complete as the step trains on, and all
        that it must train on; None where `stop` was filled."""
        mine = {key: self._rows.pending[key] for key in sorted(self._flights)}
        is_last = step == self._config.training.steps - 1
        must = {key for key, one in mine.items() if is_last or one.step + self._delay <= step}
        count = min(len(mine), max(len(must), self._due(step, len(mine))))
        while not stop:
            complete = [key for key in mine if self._flights[key].scored.done()]
            for key in complete:
                self._flights[key].scored.result()  # raises at once, whenever it would be needed
            if must.issubset(complete) and len(complete) >= count:
                break
            waiting = [self._flights[key].scored for key in mine if key not in complete]
            wait(waiting, timeout=_LOOKS_EVERY, return_when="FIRST_COMPLETED")
        else:
            return None
        dropped = [
            key
            for key in (complete if self._delay else must)
            if drops(self._config.rollout, self._scored(key), mine[key].refills)
        ]
        kept = [key for key in complete if key not in dropped]
        others = [key for key in kept if key not in must]
        chosen = sorted([*must.intersection(kept), *others[: count - len(must)]])
        return _Ready(chosen, dropped, is_enough=len(chosen) == count)

    def _due(self, step: int, pending: int) -> int:
        """How many groups of this process the step trains on, if it need not take more: what was
        drawn for the steps up to this one, less what was trained on. Steps that had to take more
        than they have drawn so leave fewer to those after them, but one, where they have any."""
        later = sum(self._own(one) for one in range(step + 1, self._rows.next_step))
        return max(pending - later, min(1, self._own(step)))

    def _own(self, step: int) -> int:
        """Groups that the step has drawn for this process."""
        return sum(map(self._is_mine, range(len(self._rows.prompts(step)))))

    def _scored(self, key: Key) -> ScoredRollouts:
        return self._flights[key].scored.result()

    def _judge(self, step: int, stop: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
        """What this process has to say about its groups, once a step could be made of them."""
        ready = self._wait_for(step, stop)
        if ready is None:
            return {}, None
        return {}, {"dropped": ready.dropped, "is_enough": ready.is_enough}

    def _replace(self, dropped: Sequence[Key], step: int) -> None:
        """Has others sampled in the place of groups that some process has dropped."""
        for key in dropped:
            self._dropped[key] = self._rows.pending[key]
            if key in self._flights:
                self._dropped_scored[key] = self._scored(key)
                del self._flights[key]
        self._rows.refill(dropped)
        self._send_until(step)

    def _joined(self, chosen: Sequence[Key], started: float) -> ScoredRollouts:
        """This process's part of a batch, each group under its number there: what is trained on,
        and what was dropped."""
        numbers = {one.key: number for number, one in enumerate(self._drawn())}
        found = {key: self._scored(key) for key in chosen} | self._dropped_scored
        none = RewardTable(np.zeros((0, self._scorer.num_objectives), np.float32))
        parts = [ScoredRollouts([], none, 0.0, 0.0)]
        for key, scored in found.items():
            rollouts = [replace(rollout, group=numbers[key]) for rollout in scored.rollouts]
            parts.append(replace(scored, rollouts=rollouts))
        joined = replace(merged(parts), rollout_seconds=time.monotonic() - started)
        self._scorer.judge(joined.rollouts, joined.rewards)
        return joined

    def trained(self, step: int, feedback: StepFeedback = _NOTHING) -> None:
        for key in self._chosen:
            self._flights.pop(key, None)
        self._rows.trained(step, self._chosen)
        self._rows.follow(feedback)
        self._chosen, self._dropped, self._dropped_scored = set(), {}, {}
        self._state = self._rows.state_dict()
        self._send_until(step)

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        self._rows.load_state_dict(state, step)
        self._state = dict(state)

    def close(self) -> None:
        for flight in self._flights.values():
            flight.sampled.cancel()
        self._scoring.close()


def make_source(
    config: TrainConfig,
    stream: DataStream,
    engine: RolloutEngine,
    scorer: RewardScorer,
    world: World,
) -> RolloutSource:
    """What `config.rollout.asynchronous` asks for."""
    if not config.rollout.asynchronous.depth:
        return SynchronousRollouts(config, stream, engine, scorer, world)
    assert isinstance(engine, SamplingAhead)
    return AsynchronousRollouts(config, stream, engine, scorer, world)
