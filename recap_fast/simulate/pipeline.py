"""Trainer and engines side by side, event by event.

A step trains the next groups that are complete; then the engines pause for the new weights and take
up where they were, requests in flight included. Admission is paced: with v updates made, the groups
of (v + 1 + depth) steps may have been admitted in all, so nothing is thrown away. A group whose
oldest token would be more than `max_staleness` versions old in the step after is trained now: the
trainer waits for it, others queue behind.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from recap_fast.simulate.engine import Engine, Request, spread
from recap_fast.simulate.workload import Workload

Activity = Literal["wait", "train", "sync"]


@dataclass(frozen=True, slots=True)
class Costs:
    """What the parts of a step take, in seconds.

    Attributes:
        decode_step: a decode step of an engine, whatever is in flight.
        decode_request: what each request in flight adds to it.
        train_fixed: an update, whatever its tokens.
        train_token: GPU-seconds of a trained token; shared out among the trainer's GPUs.
        reward: from a group's last token to its rewards.
        sync: new weights for the engines, which pause; the trainer waits too.
        other: of the trainer, between steps.
        engine_gpus: GPUs of one engine.
        slots: requests in flight that an engine has room for; None: any number.
    """

    decode_step: float
    decode_request: float
    train_fixed: float
    train_token: float
    reward: float = 0.0
    sync: float = 0.0
    other: float = 0.0
    engine_gpus: int = 1
    slots: int | None = None

    def train(self, tokens: float, gpus: int) -> float:
        return self.train_fixed + self.train_token * tokens / gpus


@dataclass(frozen=True, slots=True)
class SetUp:
    """Who has which GPUs, and how far the engines may be ahead.

    Attributes:
        trainer_gpus, engine_gpus: of each side; where colocated, the same GPUs.
        depth: steps' worth of groups that may be under way or done beyond the step being trained;
            0 is synchronous.
        max_staleness: versions that a token may be behind the policy that is trained on it.
        parts: updates a step is trained in, each as soon as its groups are there.
    """

    trainer_gpus: int
    engine_gpus: int
    depth: float = 0.0
    max_staleness: int = 0
    colocated: bool = False
    parts: int = 1

    def __post_init__(self) -> None:
        if self.max_staleness < math.ceil(self.depth):
            raise ValueError(
                f"depth {self.depth:g} makes tokens up to {math.ceil(self.depth)} versions old: "
                f"wanted max_staleness of at least that, got {self.max_staleness}"
            )
        if self.colocated and (self.depth or self.trainer_gpus != self.engine_gpus):
            raise ValueError("colocated: both sides have the same GPUs, in turns: depth 0")

    @property
    def gpus(self) -> int:
        return self.trainer_gpus + (0 if self.colocated else self.engine_gpus)


@dataclass(frozen=True, slots=True)
class Span:
    """What the trainer does from when to when."""

    activity: Activity
    start: float
    end: float
    step: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation found, over the steps after the warm-up.

    Attributes:
        step_seconds: mean.
        stage_seconds: mean "wait", "train" and "sync" of the trainer. Where synchronous, it waits
            for all of a step's rollouts and rewards.
        trainer_idle: share of the time that the trainer waits for groups.
        engine_idle: share of engine time without a request in flight, or paused for weights; where
            colocated, of the time that they have the GPUs.
        requests: mean in flight in an engine that has any.
        staleness: share of the trained tokens by versions behind.
        tokens_per_second: sampled and trained.
        spans: of the trainer.
        in_flight: (seconds, requests in flight in all engines), as it changed.
    """

    set_up: SetUp
    step_seconds: float
    stage_seconds: dict[str, float]
    trainer_idle: float
    engine_idle: float
    requests: float
    staleness: dict[int, float]
    tokens_per_second: float
    spans: tuple[Span, ...] = field(repr=False)
    in_flight: tuple[tuple[float, int], ...] = field(repr=False)

    @property
    def mean_staleness(self) -> float:
        return sum(age * share for age, share in self.staleness.items())

    @property
    def max_staleness(self) -> int:
        return max(self.staleness, default=0)


@dataclass(slots=True)
class _Group:
    version: int  # at its admission
    left: int
    trained_per_sampled: float
    tokens: float = 0.0
    by_version: dict[int, float] = field(default_factory=dict)


def simulate(
    costs: Costs, workload: Workload, set_up: SetUp, *, steps: int = 12, seed: int = 0
) -> Outcome:
    """Runs `steps` steps after a warm-up, and at least twice as many as may be under way at a time:
    waits for old groups come back about that often.

    Raises:
        ValueError: fewer GPUs on the engines' side than one engine has.
    """
    if set_up.engine_gpus < costs.engine_gpus:
        raise ValueError(
            f"an engine has {costs.engine_gpus} GPUs: wanted at least as many for the engines, got "
            f"{set_up.engine_gpus}"
        )
    warm_up = 2 + math.ceil(set_up.depth)
    steps = max(steps, 2 * (1 + math.ceil(set_up.depth)))
    run = _Run(costs, workload, set_up, warm_up, warm_up + steps, np.random.default_rng(seed))
    return run.finish()


class _Run:
    def __init__(
        self,
        costs: Costs,
        workload: Workload,
        set_up: SetUp,
        warm_up: int,
        steps: int,
        rng: np.random.Generator,
    ) -> None:
        self._costs, self._workload, self._set_up, self._rng = costs, workload, set_up, rng
        self._warm_up, self._steps = warm_up, steps
        count = set_up.engine_gpus // costs.engine_gpus
        self._engines = [
            Engine(costs.decode_step, costs.decode_request, costs.slots) for _ in range(count)
        ]
        self._events: list[tuple[float, int, str, int, int]] = []
        self._order = 0
        self._drawn: list[tuple[np.ndarray, float]] = []
        self._turn = 0
        self._groups: list[_Group] = []
        self._open: set[int] = set()  # admitted, and not yet trained
        self._ready: list[int] = []  # in the order in which they were complete
        self._version = 0
        self._part = 0
        self._waiting_since: float | None = 0.0
        self._measured_from = 0.0
        self._paused = 0.0
        self._ended: list[float] = []
        self._tokens: list[float] = []
        self._staleness: dict[int, float] = {}
        self._spans: list[Span] = []
        self._flying = 0
        self._in_flight: list[tuple[float, int]] = []
        self._engine_totals = (0.0, 0.0)

    def finish(self) -> Outcome:
        self._admit(0.0)
        while len(self._ended) < self._steps:
            time, _, kind, which, changes = heapq.heappop(self._events)
            if kind == "end":
                if changes == self._engines[which].changes:
                    self._on_end(time, which)
            elif kind == "ready":
                self._ready.append(which)
                self._start_part(time)
            elif kind == "trained":
                self._on_trained(time)
            else:
                self._on_synced(time)
        return self._outcome()

    def _push(self, time: float, kind: str, which: int = 0, changes: int = 0) -> None:
        self._order += 1
        heapq.heappush(self._events, (time, self._order, kind, which, changes))

    def _watch(self, which: int) -> None:
        engine = self._engines[which]
        end = engine.next_end()
        if end < math.inf:
            self._push(end, "end", which, engine.changes)

    def _admit(self, time: float) -> None:
        """Fills up to what the pace allows."""
        per_step = self._workload.groups
        allowed = math.floor((self._version + 1 + self._set_up.depth) * per_step + 1e-9)
        new: list[Request] = []
        while len(self._groups) < allowed:
            for lengths, trained in self._next_groups(allowed - len(self._groups)):
                place = len(self._groups)
                self._groups.append(_Group(self._version, len(lengths), trained))
                self._open.add(place)
                new += [Request(place, float(tokens)) for tokens in lengths]
        for engine in self._engines:
            engine.advance(time)
        spread(self._engines, new)
        for which in range(len(self._engines)):
            self._watch(which)
        self._note(time, sum(engine.in_flight for engine in self._engines) - self._flying)

    def _next_groups(self, count: int) -> list[tuple[np.ndarray, float]]:
        """Up to `count` groups' lengths, [group_size] each, and trained tokens for each sampled
        one; what a step has left comes first."""
        if not self._drawn:
            lengths, trained = self._workload.draw_step(self._turn, self._rng)
            self._drawn = [(group, trained) for group in lengths]
            self._turn += 1
        taken, self._drawn = self._drawn[:count], self._drawn[count:]
        return taken

    def _on_end(self, time: float, which: int) -> None:
        engine = self._engines[which]
        engine.advance(time)
        before = engine.in_flight
        for request in engine.collect():
            group = self._groups[request.group]
            group.left -= 1
            group.tokens += request.tokens
            by_version = group.by_version
            for version, tokens in engine.tokens_by_version(request):
                by_version[version] = by_version.get(version, 0.0) + tokens
            if not group.left:
                self._push(time + self._costs.reward, "ready", request.group)
        self._watch(which)
        self._note(time, engine.in_flight - before)

    def _start_part(self, time: float) -> None:
        if self._waiting_since is None:
            return
        chosen = self._choose()
        if chosen is None:
            return
        step = self._version
        if time > self._waiting_since:
            self._spans.append(Span("wait", self._waiting_since, time, step))
        self._waiting_since = None
        if not self._part:
            self._tokens.append(0.0)
        tokens = trained = 0.0
        self._open.difference_update(chosen)
        taken = set(chosen)
        self._ready = [place for place in self._ready if place not in taken]
        for place in chosen:
            tokens += self._groups[place].tokens
            trained += self._groups[place].tokens * self._groups[place].trained_per_sampled
            if step >= self._warm_up:
                for version, count in self._groups[place].by_version.items():
                    age = step - version
                    self._staleness[age] = self._staleness.get(age, 0.0) + count
        self._tokens[-1] += tokens
        seconds = self._costs.train(trained, self._set_up.trainer_gpus)
        seconds -= self._costs.train_fixed * (1 - 1 / self._set_up.parts)
        seconds += self._costs.other / self._set_up.parts
        self._spans.append(Span("train", time, time + seconds, step))
        self._push(time + seconds, "trained")

    def _choose(self) -> list[int] | None:
        """Groups to train next; None while some of them are not there."""
        parts, per_step = self._set_up.parts, self._workload.groups
        until = (self._part + 1) * per_step // parts
        wanted = until - self._part * per_step // parts
        if len(self._ready) < wanted:
            return None
        oldest = self._version - self._set_up.max_staleness
        due = {place for place in self._open if self._groups[place].version <= oldest}
        # Of those that may not wait for the next step, the step's later parts take the rest.
        needed = max(0, len(due) - (per_step - until))
        chosen = [place for place in self._ready if place in due][:needed]
        if len(chosen) < needed:
            return None
        taken = set(chosen)
        others = [place for place in self._ready if place not in taken]
        return chosen + others[: wanted - len(chosen)]

    def _on_trained(self, time: float) -> None:
        self._part += 1
        if self._part < self._set_up.parts:
            self._waiting_since = time
            self._start_part(time)
            return
        self._part = 0
        end = time + self._costs.sync
        self._spans.append(Span("sync", time, end, self._version))
        for engine in self._engines:
            engine.advance(time)
            engine.pause(end)
        self._paused += self._costs.sync
        self._push(end, "synced")

    def _on_synced(self, time: float) -> None:
        self._version += 1
        self._ended.append(time)
        if self._version == self._warm_up:
            self._measured_from, self._paused = time, 0.0
            self._engine_totals = self._engine_seconds()
        for engine in self._engines:
            engine.set_version(self._version)
        self._waiting_since = time
        self._admit(time)
        self._start_part(time)

    def _note(self, time: float, change: int) -> None:
        self._flying += change
        self._in_flight.append((time, self._flying))

    def _engine_seconds(self) -> tuple[float, float]:
        """Without a request, and requests times seconds; of all engines."""
        return (
            sum(engine.idle_seconds for engine in self._engines),
            sum(engine.request_seconds for engine in self._engines),
        )

    def _outcome(self) -> Outcome:
        start, end = self._measured_from, self._ended[-1]
        elapsed, count = end - start, self._steps - self._warm_up
        stages = {"wait": 0.0, "train": 0.0, "sync": 0.0}
        for span in self._spans:
            if span.step >= self._warm_up and span.step < self._steps:
                stages[span.activity] += (span.end - span.start) / count
        for engine in self._engines:
            engine.advance(end)
        idle, requests = (
            now - before
            for now, before in zip(self._engine_seconds(), self._engine_totals, strict=True)
        )
        engine_time = len(self._engines) * elapsed
        sampling = engine_time - idle - len(self._engines) * self._paused
        if self._set_up.colocated:
            trained = count * (stages["train"] + stages["sync"])
            mine = len(self._engines) * (elapsed - trained)
            engine_idle = max(mine - sampling, 0.0) / mine if mine else 0.0
        else:
            engine_idle = 1 - sampling / engine_time
        total = sum(self._staleness.values())
        return Outcome(
            self._set_up,
            elapsed / count,
            stages,
            stages["wait"] * count / elapsed,
            engine_idle,
            requests / sampling if sampling > 0 else 0.0,
            {age: self._staleness[age] / total for age in sorted(self._staleness)},
            sum(self._tokens[self._warm_up : self._steps]) / elapsed,
            tuple(self._spans),
            tuple(self._in_flight),
        )
