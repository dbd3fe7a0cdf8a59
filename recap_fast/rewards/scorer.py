"""From the names of rewards to a step's reward table, through a pool of worker processes.

A reward function takes a `RewardSample` and its parameters and returns a number, a bool, or None
where the reward does not apply. It is one of `BUILTIN` or any "module:function" of the user's.
All run in worker processes: they parse what a model wrote, and some of that makes a parser hang or
crash. A call that raises, runs too long, kills its process or returns something else than a number
makes the reward absent (NaN) from that one rollout, and is counted.

Workers import this module, so it stays free of torch, and heavy imports wait until needed.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import multiprocessing
import numbers
import os
import pickle  # noqa: TID251 (between this process and its own workers)
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError  # the builtin from 3.11 on
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from recap_fast.config import RewardsConfig, RewardSpec, SourceConfig
from recap_fast.rewards.functions import BUILTIN
from recap_fast.types import Objective, RewardSample, RewardTable, Rollout, UserError

__all__ = ["BUILTIN", "RewardError", "RewardFunction", "RewardScorer", "resolve"]

RewardFunction = Callable[..., Any]

_HEAVY_MODULES = {"accuracy": "math_verify", "reasoning_gym": "reasoning_gym"}
_START_SECONDS = 60.0
_BATCHES_PER_WORKER = 4  # evens out their load


class RewardError(UserError):
    """A reward that cannot be used, or that failed too often."""


def resolve(spec: RewardSpec | str) -> tuple[RewardFunction, dict[str, Any]]:
    """The function and the parameters that an entry of a source's `rewards` stands for.

    A "module:function" is looked for where Python looks for modules and in the current folder.

    Raises:
        RewardError: no built-in of that name, a module that cannot be imported, a name that is not
            in it or cannot be called, or parameters that the function does not take.
    """
    if isinstance(spec, str):
        spec = RewardSpec(function=spec)
    name = spec.function
    if ":" in name:
        function = _import_function(name)
    elif name in BUILTIN:
        function = BUILTIN[name]
    else:
        close = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"built in are {', '.join(BUILTIN)};"
        raise RewardError(f"no reward {name!r}; {hint} your own are written module:function")
    _check_parameters(function, name, spec.parameters)
    if name in BUILTIN:
        _check_words(function, name, spec.parameters)
    return function, spec.parameters


def _import_function(name: str) -> RewardFunction:
    module_name, _, attribute = name.partition(":")
    try:
        module = _import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise RewardError(
            f"reward {name!r}: module {module_name!r} cannot be imported: {_describe(error)}"
        ) from error
    if not hasattr(module, attribute):
        public = [key for key in vars(module) if not key.startswith("_")]
        close = difflib.get_close_matches(attribute, public, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RewardError(f"reward {name!r}: {module_name} has no {attribute!r}{hint}")
    function: RewardFunction = getattr(module, attribute)
    if not callable(function):
        raise RewardError(f"reward {name!r} is {type(function).__name__}, which cannot be called")
    return function


def _import_module(name: str) -> Any:
    if not name:
        raise ImportError("the name is empty")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A console script does not have the current folder on its path, `python -m` has.
        if error.name != name.partition(".")[0] or os.getcwd() in sys.path:
            raise
        sys.path.append(os.getcwd())
        importlib.invalidate_caches()
        return importlib.import_module(name)


def _check_parameters(function: RewardFunction, name: str, parameters: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function written in C that does not say what it takes
        return
    try:
        signature.bind(None, **parameters)
    except TypeError as error:
        takes = ", ".join(list(signature.parameters)[1:]) or "none"
        raise RewardError(
            f"reward {name!r} cannot be called with a sample and the parameters "
            f"{dict(parameters)}: {error}; its parameters are: {takes}"
        ) from None


def _check_words(function: RewardFunction, name: str, parameters: Mapping[str, Any]) -> None:
    """Raises `RewardError` for a word that a built-in function does not know. Others' annotations
    cannot be relied on."""
    for key, hint in get_type_hints(function).items():
        words = get_args(hint) if get_origin(hint) is Literal else None
        if words is not None and key in parameters and parameters[key] not in words:
            raise RewardError(
                f"reward {name!r}: parameter {key} is one of {', '.join(words)}; got "
                f"{parameters[key]!r}"
            )


def _describe(error: BaseException) -> str:
    """Type, text and place of an error, on one line."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[:300]}{place}"


_Outcome = tuple[str, Any]
"""("value", float), ("absent", None), or how it failed and the error's text."""
_Job = tuple[int, RewardSample]
"""Which of the scorer's rewards, and of what."""

_worker_rewards: list[tuple[RewardFunction, dict[str, Any]]] = []
_worker_problem: list[str] = []


def _start_worker(specs: Sequence[RewardSpec]) -> None:
    """Resolves all rewards once, and pays for imports and first calls before a step waits."""
    try:
        _worker_rewards.extend(resolve(spec) for spec in specs)
        for spec in specs:
            if spec.function in _HEAVY_MODULES:
                importlib.import_module(_HEAVY_MODULES[spec.function])
        if any(spec.function == "accuracy" for spec in specs):
            BUILTIN["accuracy"](RewardSample("$\\frac{1}{2}$", "0.5", {}, 1, 1, "stop"))
    except Exception as error:  # noqa: BLE001 (a worker that dies here would be started for ever)
        _worker_problem.append(_describe(error))


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
        return "raised", _describe(error)


def _check_value(value: Any) -> _Outcome:
    if value is None:
        return "absent", None
    if isinstance(value, numbers.Real | np.bool_):
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


@dataclass
class _Step:
    """The calls for some rollouts and what came of them, by the call's number."""

    jobs: list[_Job] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # which rollout a call belongs to
    where: list[str] = field(default_factory=list)  # which row of the data
    outcomes: dict[int, _Outcome] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)  # by objective
    calls: Counter[str] = field(default_factory=Counter)


class RewardScorer:
    """Computes the rewards of a step's rollouts in worker processes.

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
        self._config = config
        self._num_objectives = len(objectives)
        self._rewards: list[_Reward] = []
        self._by_source: dict[str, list[int]] = {}
        columns = {objective.name: column for column, objective in enumerate(objectives)}
        for source in sources:
            self._by_source[source.name] = []
            for name, spec in source.reward_specs.items():
                _validate(source, name, spec)
                self._by_source[source.name].append(len(self._rewards))
                self._rewards.append(_Reward(name, columns[name], spec))
        self.failures: Counter[str] = Counter()
        """Failed rewards of all steps so far, as in `RewardTable.failures`."""
        self.first_errors: dict[str, str] = {}
        """Text of the first failure of each kind in `failures`."""
        self._slow: set[int] = set()  # rewards that do not fit into one time limit as a batch
        self._pool: Any = None
        if self._rewards:
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
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def score(self, rollouts: Sequence[Rollout], max_new_tokens: int) -> RewardTable:
        """Rewards of S rollouts: [S, K] float32, NaN where a rollout's source does not carry the
        objective, the function returned None, or it failed.

        Args:
            max_new_tokens: the limit the rollouts were sampled with.

        Raises:
            RewardError: more than `max_failure_fraction` of an objective's rewards failed, or the
                workers cannot be kept running.
        """
        step = self._collect(rollouts, max_new_tokens)
        self._compute_all(step)
        values = np.full((len(rollouts), self._num_objectives), np.nan, dtype=np.float32)
        failures: Counter[str] = Counter()
        for index, (reward, _) in enumerate(step.jobs):
            kind, value = step.outcomes[index]
            if kind == "value":
                values[step.rows[index], self._rewards[reward].column] = value
            elif kind != "absent":
                failures[f"{self._rewards[reward].objective}/{kind}"] += 1
        return RewardTable(values=values, failures=dict(failures))

    def _collect(self, rollouts: Sequence[Rollout], max_new_tokens: int) -> _Step:
        step = _Step()
        for row, rollout in enumerate(rollouts):
            sample = RewardSample(
                completion=rollout.text,
                answer=rollout.prompt.answer,
                entry=rollout.prompt.entry,
                num_tokens=len(rollout.token_ids),
                max_new_tokens=max_new_tokens,
                finish_reason=rollout.finish_reason,
            )
            for reward in self._by_source[rollout.prompt.source]:
                step.jobs.append((reward, sample))
                step.rows.append(row)
                step.where.append(f"{rollout.prompt.source}:{rollout.prompt.row}")
                step.calls[self._rewards[reward].objective] += 1
        return step

    def _compute_all(self, step: _Step) -> None:
        to_split = self._run(step, self._batches(step.jobs))
        self._run(step, [[index] for batch in to_split for index in batch])
        for batch in to_split:
            # Each was done in time alone, so together they are too slow for one time limit.
            if all(step.outcomes[index][0] not in ("timeout", "crashed") for index in batch):
                self._slow.update(step.jobs[index][0] for index in batch)

    def _batches(self, jobs: Sequence[_Job]) -> list[list[int]]:
        """Neighbours share a batch, so that the row of a group of rollouts is sent once."""
        slow = [[index] for index, (reward, _) in enumerate(jobs) if reward in self._slow]
        quick = [index for index, (reward, _) in enumerate(jobs) if reward not in self._slow]
        size = max(1, math.ceil(len(quick) / (_BATCHES_PER_WORKER * self._config.workers)))
        return slow + [quick[start : start + size] for start in range(0, len(quick), size)]

    def _run(self, step: _Step, batches: Sequence[list[int]]) -> list[list[int]]:
        """Computes batches; returns those of several calls in which one hung or died."""
        to_split: list[list[int]] = []
        waiting = list(batches)
        for _ in range(3):  # a pool that breaks altogether is replaced twice
            waiting = self._run_until_broken(step, waiting, to_split)
            if not waiting:
                return to_split
            self.close()
            self._start_pool()
        raise RewardError(
            "the reward workers broke down three times in one step; is the machine out of memory?"
        )

    def _run_until_broken(
        self, step: _Step, batches: Sequence[list[int]], to_split: list[list[int]]
    ) -> list[list[int]]:
        """Computes batches until all are done or the pool breaks; returns those left over."""
        left_over: list[list[int]] = []
        pending = {self._submit([step.jobs[index] for index in batch]): batch for batch in batches}
        while pending:
            done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            if not done and not self._pool.active:
                return left_over + list(pending.values())
            for future in done:
                batch = pending.pop(future)
                error = future.exception()
                if isinstance(error, BrokenExecutor):
                    left_over.append(batch)
                elif error is not None and len(batch) > 1:
                    to_split.append(batch)
                else:
                    outcomes = [self._failed_call(error)] if error else future.result()
                    self._record(step, batch, outcomes)
        return left_over

    def _record(self, step: _Step, batch: Sequence[int], outcomes: Sequence[_Outcome]) -> None:
        """Keeps outcomes, and stops as soon as too many calls of an objective have failed."""
        for index, (kind, value) in zip(batch, outcomes, strict=True):
            step.outcomes[index] = (kind, value)
            if kind in ("value", "absent"):
                continue
            name = self._rewards[step.jobs[index][0]].objective
            self.failures[f"{name}/{kind}"] += 1
            self.first_errors.setdefault(f"{name}/{kind}", f"row {step.where[index]}: {value}")
            step.failed[name] += 1
            if step.failed[name] > self._config.max_failure_fraction * step.calls[name]:
                raise RewardError(
                    f"reward {name!r} failed for {step.failed[name]} of {step.calls[name]} "
                    f"rollouts, more than rewards.max_failure_fraction "
                    f"{self._config.max_failure_fraction}; first {kind}: "
                    f"{self.first_errors[f'{name}/{kind}']}"
                )

    def _submit(self, jobs: Sequence[_Job]) -> Future[list[_Outcome]]:
        try:
            # Pickled here, because an object that cannot be would take the pool's threads down.
            future: Future[list[_Outcome]] = self._pool.schedule(
                _compute, args=(pickle.dumps(jobs),), timeout=self._config.timeout
            )
        except Exception as error:  # noqa: BLE001 (a row, and so its pickling, may do anything)
            future = Future()
            broken = isinstance(error, RuntimeError) and not self._pool.active
            future.set_exception(BrokenExecutor(str(error)) if broken else error)
        return future

    def _failed_call(self, error: BaseException) -> _Outcome:
        from pebble import ProcessExpired

        if isinstance(error, FutureTimeoutError):
            return "timeout", f"took longer than rewards.timeout, {self._config.timeout} s"
        if isinstance(error, ProcessExpired):
            return "crashed", f"its process died with exit code {error.exitcode}"
        return "raised", _describe(error)

    def _start_pool(self) -> None:
        from pebble import ProcessPool

        specs = [reward.spec for reward in self._rewards]
        self._pool = ProcessPool(
            max_workers=self._config.workers,
            initializer=_start_worker,
            initargs=(specs,),
            context=_worker_context(specs),
        )
        try:
            problems = self._pool.schedule(_worker_problems).result(timeout=_START_SECONDS)
        except (FutureTimeoutError, BrokenExecutor) as error:
            self.close()
            raise RewardError(
                f"the reward workers did not start ({_describe(error)}); a script that trains "
                f'needs `if __name__ == "__main__":` around what it runs'
            ) from error
        if problems:
            self.close()
            raise RewardError(f"the reward workers cannot start: {problems[0]}")


def _worker_context(specs: Sequence[RewardSpec]) -> Any:
    """Workers are forked from a small server process that has the verifiers' libraries loaded:
    replacing a killed worker then takes milliseconds. Forking this process would not be safe, it
    has threads of torch and vLLM."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    used = {spec.function for spec in specs}
    heavy = [module for name, module in _HEAVY_MODULES.items() if name in used]
    context.set_forkserver_preload(["recap_fast.rewards.scorer", *heavy])
    return context


def _validate(source: SourceConfig, objective: str, spec: RewardSpec) -> None:
    try:
        resolve(spec)
    except RewardError as error:
        raise RewardError(f"source {source.name!r}, objective {objective!r}: {error}") from error
