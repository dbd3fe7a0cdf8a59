"""From a step's rollouts to its reward table, through a pool of worker processes.

A reward function takes a `RewardSample` and its parameters and returns a number, a bool, or None
where the reward does not apply. It is one of `BUILTIN` or any "module:function" of the user's.
All run in worker processes: they parse what a model wrote, and some of that makes a parser hang or
crash. A function of the user's that raises, runs too long, kills its process or returns something
else than a number makes the reward absent (NaN) from that one rollout, and is counted. So does a
built-in that cannot use the row. But an answer on which a built-in breaks is a wrong answer: 0, and
counted apart, or a model could end the run.

Workers import this module, so it stays free of torch, and heavy imports wait until needed.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import numbers
import os
import pickle  # noqa: TID251 (between this process and its own workers)
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the builtin from 3.11 on
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np

from recap_fast.config import RewardsConfig, RewardSpec, SourceConfig
from recap_fast.rewards.functions import BUILTIN
from recap_fast.rewards.resolve import RewardError, RewardFunction, resolve
from recap_fast.rewards.unreadable import Unreadable, describe
from recap_fast.rewards.worker_context import TO_GROUPS, worker_context
from recap_fast.types import Objective, RewardSample, RewardTable, Rollout

__all__ = ["RewardError", "RewardScorer", "Scoring"]

_HEAVY_MODULES = {"accuracy": "math_verify", "reasoning_gym": "reasoning_gym"}
_START_SECONDS = 180.0  # they import sympy, on what may be a busy machine
_SILENT_SECONDS = 60.0
_LOOKS_EVERY = 0.5
"""Seconds without a reward after which a table looks whether the workers are there."""
_BATCHES_PER_WORKER = 4  # evens out their load

_Outcome = tuple[str, Any]
"""("value", float), ("absent", None), ("unreadable", why), or how it failed and why."""
_Job = tuple[int, RewardSample]
"""Which of the scorer's rewards, and of what."""

_worker_rewards: list[tuple[RewardFunction, dict[str, Any]]] = []
_worker_problem: list[str] = []


def _start_worker(specs: Sequence[RewardSpec]) -> None:
    """Resolves all rewards once, and pays for imports and first calls before a step waits."""
    _leave_group()
    try:
        _worker_rewards.extend(resolve(spec) for spec in specs)
        for spec in specs:
            if spec.function in _HEAVY_MODULES:
                importlib.import_module(_HEAVY_MODULES[spec.function])
        if any(spec.function == "accuracy" for spec in specs):
            BUILTIN["accuracy"](RewardSample("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", {}, 1, 1, "stop"))
    except Exception as error:  # noqa: BLE001 (a worker that dies here would be started for ever)
        _worker_problem.append(describe(error))


def _leave_group() -> None:
    """Spares this worker what is sent to the trainer's process group, so that the step in flight
    can end: one that dies as it takes a job leaves the pool locked, and the job with nobody."""
    if not TO_GROUPS:
        return
    os.setpgrp()
    while came := signal.sigpending() & set(TO_GROUPS):  # while it was of the group
        signal.sigwait(came)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_GROUPS)  # the pool stops it by one
    _die_with_parent()


def _die_with_parent() -> None:
    """Without it a worker that hangs would outlive a trainer that is killed."""
    import fcntl  # where there are groups

    parent = multiprocessing.parent_process()
    assert parent is not None
    pipe = parent.sentinel  # closes with the trainer; SIGIO, which says so, ends any process
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if not parent.is_alive():
        os.kill(os.getpid(), signal.SIGKILL)


def _worker_problems() -> list[str]:
    return _worker_problem


def _compute(pickled_jobs: bytes) -> list[_Outcome]:
    """Computes a batch of rewards in a worker."""
    jobs: list[_Job] = pickle.loads(pickled_jobs)  # noqa: S301 (from the parent, not from outside)
    return [_compute_one(*_worker_rewards[reward], sample) for reward, sample in jobs]


def _compute_one(
    function: RewardFunction, parameters: dict[str, Any], sample: RewardSample
) -> _Outcome:
    try:
        return _check_value(function(sample, **parameters))
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the user's code may raise anything)
        return "raised", describe(error)


def _check_value(value: Any) -> _Outcome:
    if value is None:
        return "absent", None
    if isinstance(value, Unreadable):
        return "unreadable", value.reason
    if getattr(value, "shape", None) == ():  # an array or tensor of one number
        value = value.item()
    if isinstance(value, numbers.Real):
        with np.errstate(over="ignore"):
            if np.isfinite(np.float32(value)):
                return "value", float(value)
        return "invalid", f"wanted a finite number in float32's range, got {value!r}"
    return "invalid", f"wanted a number, a bool or None, got {type(value).__name__} {value!r:.80}"


@dataclass(frozen=True)
class _Reward:
    objective: str
    column: int
    spec: RewardSpec


class RewardScorer:
    """Computes the rewards of rollouts in worker processes.

    Calls are sent in batches. A batch in which a worker hangs or dies is computed again call by
    call, so that only the call at fault fails; each may take `config.timeout` seconds.

    Args:
        sources: all sources of the run; those of kind "rl" say which rewards apply to their rows.
        objectives: the K columns of the table, in order.
        config: workers, time limit, tolerated failures.

    Raises:
        RewardError: a reward that cannot be used (see `resolve`), or workers that do not start.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        objectives: Sequence[Objective],
        config: RewardsConfig,
    ) -> None:
        self.config = config
        self.num_objectives = len(objectives)
        self.rewards: list[_Reward] = []
        self.by_source: dict[str, list[int]] = {}
        """Which of `rewards` apply to a source's rows."""
        columns = {objective.name: column for column, objective in enumerate(objectives)}
        for source in sources:
            self.by_source[source.name] = []
            for name, spec in source.reward_specs.items():
                _validate(source, name, spec)
                self.by_source[source.name].append(len(self.rewards))
                self.rewards.append(_Reward(name, columns[name], spec))
        self.failures: Counter[str] = Counter()
        """Failed rewards of all steps so far, as in `RewardTable.failures`."""
        self.unreadable: Counter[str] = Counter()
        """Answers of all steps so far on which a built-in broke, as in `RewardTable.unreadable`."""
        self.first_errors: dict[str, str] = {}
        """Text of the first of each kind in `failures`, and in `unreadable` (of r:
        "r/unreadable")."""
        self.slow: set[int] = set()
        """Which of `rewards` do not fit into one time limit as a batch."""
        self.heard = -math.inf
        """When a worker was last done with a batch, whose ever it was."""
        self.pool: Any = None
        self._replacing = threading.Lock()
        self.counting = threading.Lock()
        """Held while an outcome is counted: `Scoring`s of several threads count in one place."""
        if self.rewards:
            self._start_pool()

    def __enter__(self) -> RewardScorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the workers, whatever they are doing."""
        # Taken first: a thread that still scores must not find it stopped, and replace it.
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def start(
        self,
        max_new_tokens: int,
        tally: RewardTally | None = None,
        *,
        judged: bool = True,
        on_done: Callable[[], object] | None = None,
    ) -> Scoring:
        """Begins a step, whose rollouts are scored while others are still being generated.

        Several may be in progress, in several threads, but each in one thread alone.

        Args:
            max_new_tokens: the limit the rollouts are sampled with.
            tally: of a step whose rollouts are scored in several parts, the same one for each.
            judged: whether too many failures raise; or else `judge` is to be asked about them, for
                rollouts that are no step.
            on_done: called when `collect` has something to take, by a thread that must not wait.
        """
        return Scoring(self, max_new_tokens, tally or RewardTally(), judged, on_done)

    def score(self, rollouts: Sequence[Rollout], max_new_tokens: int) -> RewardTable:
        """A step whose rollouts are all there: `start`, `add` and `table` in one."""
        scoring = self.start(max_new_tokens)
        scoring.add(rollouts)
        return scoring.table()

    def submit(self, jobs: Sequence[_Job]) -> tuple[Future[list[_Outcome]], Any]:
        """Has some worker compute a batch of calls, and says of which pool. Never raises: the
        future does."""
        with self._replacing:  # by another thread, which is soon done
            pool = self.pool
        try:
            # Pickled here, because an object that cannot be would take the pool's threads down.
            future: Future[list[_Outcome]] = pool.schedule(
                _compute, args=(pickle.dumps(jobs),), timeout=self.config.timeout
            )
            future.add_done_callback(self._hear)
        except Exception as error:  # noqa: BLE001 (a row, and so its pickling, may do anything)
            future = Future()
            broken = isinstance(error, RuntimeError) and not pool.active
            future.set_exception(BrokenExecutor(str(error)) if broken else error)
        return future, pool

    def _hear(self, _: Future[list[_Outcome]]) -> None:
        self.heard = time.monotonic()

    def judge(self, rollouts: Sequence[Rollout], rewards: RewardTable) -> None:
        """Raises `RewardError` where more than `max_failure_fraction` of a step's rewards of one
        objective failed."""
        calls: Counter[str] = Counter()
        for rollout in rollouts:
            calls.update(self.rewards[r].objective for r in self.by_source[rollout.prompt.source])
        failed: Counter[str] = Counter()
        for kind, count in rewards.failures.items():
            failed[kind.rpartition("/")[0]] += count
        for name, count in failed.items():
            self.stop_if_too_many(name, count, calls[name])

    def stop_if_too_many(self, name: str, failed: int, calls: int, at_least: str = "") -> None:
        limit = self.config.max_failure_fraction
        if failed <= limit * calls:
            return
        first = {
            key.rpartition("/")[2]: text
            for key, text in self.first_errors.items()
            if key.rpartition("/")[0] == name and key in self.failures
        }
        errors = "; ".join(f"first {kind}: {text}" for kind, text in first.items())
        raise RewardError(
            f"reward {name!r} failed for {at_least}{failed} of {calls} rollouts, more than "
            f"rewards.max_failure_fraction {limit}; {errors}"
        )

    def replace_pool(self, broken: Any) -> None:
        """Starts other workers, unless another step in progress already has."""
        with self._replacing:
            if self.pool is broken:
                self.close()
                self._start_pool()

    def _start_pool(self) -> None:
        for last in (False, False, True):
            try:
                self._try_to_start_pool()
                return
            except BrokenExecutor as error:  # pebble gives up where a worker is killed as it starts
                self.close()
                if last:
                    raise _not_started(error) from error

    def _try_to_start_pool(self) -> None:
        from pebble import ProcessPool

        specs = [reward.spec for reward in self.rewards]
        used = {spec.function for spec in specs}
        heavy = [module for name, module in _HEAVY_MODULES.items() if name in used]
        self.pool = ProcessPool(
            max_workers=self.config.workers,
            initializer=_start_worker,
            initargs=(specs,),
            context=worker_context([__name__, *heavy]),
        )
        try:
            problems = self.pool.schedule(_worker_problems).result(timeout=_START_SECONDS)
        except FutureTimeoutError as error:
            self.close()
            raise _not_started(error) from error
        if problems:
            self.close()
            raise RewardError(f"the reward workers cannot start: {problems[0]}")


@dataclass(frozen=True, slots=True)
class RewardTally:
    """By objective, the rewards of a step that were asked for, and those of them that failed."""

    calls: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)


class Scoring:
    """The rewards of one step in progress: `add` rollouts as they come, then take the `table`."""

    def __init__(
        self,
        scorer: RewardScorer,
        max_new_tokens: int,
        tally: RewardTally,
        judged: bool = True,
        on_done: Callable[[], object] | None = None,
    ) -> None:
        self._scorer = scorer
        self._judged = judged
        self._max_new_tokens = max_new_tokens
        self._num_rollouts = 0
        # By the call's number:
        self._jobs: list[_Job] = []
        self._rows: list[int] = []  # of the table
        self._where: list[str] = []  # in the data
        self._outcomes: dict[int, _Outcome] = {}
        self._calls, self._failed = tally.calls, tally.failed
        self._pending: dict[Future[list[_Outcome]], tuple[list[int], Any]] = {}
        """The calls of a batch, and the pool that has it."""
        self._done: SimpleQueue[Future[list[_Outcome]]] = SimpleQueue()
        self._on_done = on_done
        self._submitted = -math.inf  # when a batch last was
        self._split: list[list[int]] = []  # batches whose calls are computed one by one
        self._broken: list[Any] = []  # pools that have lost batches

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Hands rollouts to the workers, and returns at once. Whole groups make the best batches:
        the row that they share is then sent once."""
        first = len(self._jobs)
        for row, rollout in enumerate(rollouts, start=self._num_rollouts):
            sample = RewardSample(
                completion=rollout.text,
                answer=rollout.prompt.answer,
                entry=rollout.prompt.entry,
                num_tokens=len(rollout.token_ids),
                max_new_tokens=self._max_new_tokens,
                finish_reason=rollout.finish_reason,
            )
            for reward in self._scorer.by_source[rollout.prompt.source]:
                self._jobs.append((reward, sample))
                self._rows.append(row)
                self._where.append(f"{rollout.prompt.source}:{rollout.prompt.row}")
                self._calls[self._scorer.rewards[reward].objective] += 1
        self._num_rollouts += len(rollouts)
        self._submit(self._batches(range(first, len(self._jobs))))

    def table(self) -> RewardTable:
        """Waits for the rewards of the S rollouts added: [S, K] float32 in their order, NaN where a
        rollout's source does not carry the objective, the function returned None, or it failed.

        Raises:
            RewardError: more than `max_failure_fraction` of an objective's rewards failed, or the
                workers cannot be kept running.
        """
        while (table := self.collect(_LOOKS_EVERY)) is None:
            pass
        return table

    def collect(self, seconds: float = 0.0) -> RewardTable | None:
        """Takes the rewards that are there, and waits for more until none comes for `seconds`.

        Returns:
            The `table`, whose errors are raised here as well, or None while rewards are missing.
        """
        while self._pending:
            try:
                future = self._done.get(timeout=seconds)
            except Empty:
                self._resubmit_lost()
                return None
            self._take(future)
        for batch in self._split:
            # Each was done in time alone, so together they are too slow for one time limit.
            if all(self._outcomes[call][0] in ("value", "absent") for call in batch):
                self._scorer.slow.update(self._jobs[call][0] for call in batch)
        for name in self._failed:
            self._stop_if_too_many(name)
        return self._as_table()

    def _as_table(self) -> RewardTable:
        shape = (self._num_rollouts, self._scorer.num_objectives)
        values = np.full(shape, np.nan, dtype=np.float32)
        failures: Counter[str] = Counter()
        unreadable: Counter[str] = Counter()
        for call, (reward, _) in enumerate(self._jobs):
            kind, value = self._outcomes[call]
            objective = self._scorer.rewards[reward].objective
            if kind == "unreadable":
                unreadable[objective] += 1
                value = 0.0
            elif kind not in ("value", "absent"):
                failures[f"{objective}/{kind}"] += 1
                value = None
            if value is not None:
                values[self._rows[call], self._scorer.rewards[reward].column] = value
        return RewardTable(values, failures=dict(failures), unreadable=dict(unreadable))

    def _batches(self, calls: Sequence[int]) -> list[list[int]]:
        """Neighbours share a batch, so that the row of a group of rollouts is sent once."""
        slow = [[call] for call in calls if self._jobs[call][0] in self._scorer.slow]
        quick = [call for call in calls if self._jobs[call][0] not in self._scorer.slow]
        num_batches = _BATCHES_PER_WORKER * self._scorer.config.workers
        size = max(1, math.ceil(len(quick) / num_batches))
        return slow + [quick[start : start + size] for start in range(0, len(quick), size)]

    def _submit(self, batches: Sequence[list[int]]) -> None:
        for batch in batches:
            future, pool = self._scorer.submit([self._jobs[call] for call in batch])
            self._pending[future] = (batch, pool)
            self._submitted = time.monotonic()
            future.add_done_callback(self._tell)

    def _tell(self, future: Future[list[_Outcome]]) -> None:
        """Called by the pool's threads."""
        self._done.put(future)
        if self._on_done is not None:
            self._on_done()

    def _take(self, future: Future[list[_Outcome]]) -> None:
        """Keeps what came of a batch; one of several calls in which one hung or died is split."""
        if future not in self._pending:  # given up, and done after all
            return
        batch, pool = self._pending.pop(future)
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or isinstance(error, BrokenExecutor):
            self._resubmit(batch, pool)
        elif error is not None and len(batch) > 1:
            self._split.append(batch)
            self._submit([[call] for call in batch])
        elif error is not None:
            self._record(batch[0], self._failed_call(batch[0], error))
        else:
            for call, outcome in zip(batch, future.result(), strict=True):
                self._record(call, outcome)

    def _resubmit_lost(self) -> None:
        """Gives the batches of a pool that is broken or silent to another one."""
        # Time limits hold from when a worker takes a job, which one of them always does: of this
        # step, or of another one that came before it.
        silent_since = max(self._submitted, self._scorer.heard)
        silent = time.monotonic() - silent_since > self._scorer.config.timeout + _SILENT_SECONDS
        lost = [f for f, (_, pool) in self._pending.items() if silent or not pool.active]
        for batch, pool in [self._pending.pop(future) for future in lost]:
            self._resubmit(batch, pool)

    def _resubmit(self, batch: list[int], broken: Any) -> None:
        if broken not in self._broken:
            self._broken.append(broken)
        if len(self._broken) >= 3:
            raise RewardError(
                "the reward workers broke down three times in one step; is the machine out of "
                "memory?"
            )
        self._scorer.replace_pool(broken)
        self._submit([batch])

    def _failed_call(self, call: int, error: BaseException) -> _Outcome:
        """What came of a call whose worker did not return."""
        from pebble import ProcessExpired

        if isinstance(error, FutureTimeoutError):
            kind = "timeout"
            text = f"took longer than rewards.timeout, {self._scorer.config.timeout} s"
        elif isinstance(error, ProcessExpired):
            kind, text = "crashed", f"its process died with exit code {error.exitcode}"
        else:
            return "raised", describe(error)
        # A built-in hangs or dies over what the model wrote, never over the row alone.
        is_builtin = self._scorer.rewards[self._jobs[call][0]].spec.function in BUILTIN
        return ("unreadable" if is_builtin else kind), text

    def _record(self, call: int, outcome: _Outcome) -> None:
        """Keeps an outcome. Does not wait for more time limits than the failures tolerated."""
        self._outcomes[call] = outcome
        kind, value = outcome
        if kind in ("value", "absent"):
            return
        scorer = self._scorer
        name = scorer.rewards[self._jobs[call][0]].objective
        with scorer.counting:
            scorer.first_errors.setdefault(f"{name}/{kind}", f"row {self._where[call]}: {value}")
            if kind == "unreadable":
                scorer.unreadable[name] += 1
                return
            scorer.failures[f"{name}/{kind}"] += 1
        self._failed[name] += 1
        if kind in ("timeout", "crashed"):
            self._stop_if_too_many(name)

    def _stop_if_too_many(self, name: str) -> None:
        if self._judged:
            at_least = "at least " if self._pending else ""
            self._scorer.stop_if_too_many(name, self._failed[name], self._calls[name], at_least)


def _not_started(error: BaseException) -> RewardError:
    timed_out = isinstance(error, FutureTimeoutError)
    why = f"no answer within {_START_SECONDS:g} s" if timed_out else describe(error)
    return RewardError(f"the reward workers did not start: {why}")


def _validate(source: SourceConfig, objective: str, spec: RewardSpec) -> None:
    try:
        resolve(spec)
    except RewardError as error:
        raise RewardError(f"source {source.name!r}, objective {objective!r}: {error}") from error
