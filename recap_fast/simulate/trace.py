"""What a run's metrics.jsonl says about the time of its stages.

Fitted over its steps, each the sum of two terms, by least squares without negative ones:

    rollout seconds = decode_step * longest completion + decode_request * tokens of an engine
    train seconds   = train_fixed + train_token * trained tokens of a GPU

The first is what an engine does that gives every request in flight a token each decode step of
decode_step + n * decode_request seconds, until the longest is done.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap_fast.config import TrainConfig, load_config
from recap_fast.paths import shown
from recap_fast.report.metrics import COMPLETION_QUANTILES, MACHINE_FILE, read_metrics
from recap_fast.simulate.pipeline import Costs
from recap_fast.simulate.workload import Lengths, Workload
from recap_fast.types import UserError

MIN_STEPS = 5
"""Steps that a trace needs, without its first, which also warms up."""
SLOTS = 1024
"""Requests that vLLM takes at a time on an H100 or H200, by its default; others wait in line."""
_LARGEST_ERROR = 0.25
"""Of a term's share of the time, as a standard error; past it the trace does not tell the terms
apart."""
MAX_ERROR = 0.25
"""Of a stage's time in a step, beside what the costs make of it; past it set-ups differ by less
than the costs are off."""
_STAGES = ("rollout", "reward", "train", "sync", "total")
_NEEDED = (
    *(f"time/{stage}" for stage in _STAGES),
    "rollout/completions",
    "rollout/completion_tokens",
    *COMPLETION_QUANTILES,
    "train/packed_tokens",
)


class TraceError(UserError):
    """A run that cannot be replayed."""


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One measured step; times in seconds."""

    processes: int
    engines: int
    completions: int
    lengths: Lengths
    trained_tokens: float
    times: dict[str, float]

    @property
    def sampled_tokens(self) -> float:
        return self.completions * self.lengths.mean


@dataclass(frozen=True, slots=True)
class Trace:
    """The measured steps of one or more runs of the same work.

    Attributes:
        config: of the first run.
        steps: of all runs, in order.
        left_out: first steps, which also warmed up.
    """

    config: TrainConfig
    steps: tuple[TracedStep, ...]
    left_out: int

    @property
    def rows_with_rollouts(self) -> float:
        """Share of a step's rows that rollouts are sampled for."""
        groups = np.mean([s.completions for s in self.steps]) / self.config.rollout.group_size
        return float(groups / self.config.data.batch_size)


@dataclass(frozen=True, slots=True)
class Fit:
    """Costs, how well they fit, and what had to be assumed."""

    costs: Costs
    rollout_error: float
    """Root mean square of what the fit leaves of a step's rollout time, as a share of its mean."""
    train_error: float
    notes: tuple[str, ...]

    @property
    def is_supported(self) -> bool:
        """Whether the costs are the trace's: set-ups can then be told apart by them."""
        return max(self.rollout_error, self.train_error) <= MAX_ERROR


def read_trace(runs: Sequence[Path]) -> Trace:
    """Reads synchronous runs of one configuration, on any numbers of processes.

    Raises:
        TraceError: no run, an asynchronous one, too few steps, times or lengths missing, or runs
            that differ in the model, the rows, the rollouts of a prompt or their limit.
    """
    steps: list[TracedStep] = []
    first: TrainConfig | None = None
    for run in runs:
        config, own = read_steps(run)
        if asynchrony(config) is not None:
            raise TraceError(
                f"{shown(run)}: an asynchronous run, whose stages overlap: a trace is a "
                f"synchronous one (rollout.async.depth 0, or none)"
            )
        if len(own) - 1 < MIN_STEPS:
            raise TraceError(
                f"{shown(run)}: too few steps to replay: wanted at least {MIN_STEPS + 1} (the "
                f"first also warms up), got {len(own)}"
            )
        if first is not None:
            _check_same(runs[0], first, run, config)
        first = first or config
        steps += own[1:]
    if first is None:
        raise TraceError("a simulation needs a run to replay: --trace RUN")
    return Trace(first, tuple(steps), len(runs))


def asynchrony(config: TrainConfig) -> tuple[int, int] | None:
    """`rollout.async`'s depth and bound; None where the configuration is synchronous."""
    settings = config.rollout.asynchronous
    return (settings.depth, settings.staleness_bound) if settings.depth else None


def read_steps(run: Path) -> tuple[TrainConfig, list[TracedStep]]:
    """A run's configuration and all its steps that had rollouts.

    Raises:
        TraceError: no run there, or one without the times and lengths.
    """
    if not (run / "config.yaml").is_file():
        raise TraceError(f"{shown(run)}: not a run's folder (it has no config.yaml)")
    config = load_config(run / "config.yaml")
    rows = [row for row in read_metrics(run) if row["step"] and row.get("rollout/completions") != 0]
    for row in rows:
        missing = [key for key in _NEEDED if row.get(key) is None]
        if missing:
            raise TraceError(
                f"{shown(run)}: step {row['step']} has no {missing[0]}"
                + (f" (nor {len(missing) - 1} others)" if len(missing) > 1 else "")
                + ": a trace is a run that this version recorded"
            )
    processes = processes_of(run)
    engines = engines_of(config, processes)
    return config, [_step(row, processes, engines) for row in rows]


def _step(row: dict[str, Any], processes: int, engines: int) -> TracedStep:
    lengths = Lengths(
        tuple(COMPLETION_QUANTILES.values()),
        tuple(float(row[key]) for key in COMPLETION_QUANTILES),
        float(row["rollout/completion_tokens"]),
    )
    return TracedStep(
        processes,
        engines,
        int(row["rollout/completions"]),
        lengths,
        float(row["train/packed_tokens"]),
        {stage: float(row[f"time/{stage}"]) for stage in _STAGES},
    )


def engines_of(config: TrainConfig, processes: int) -> int:
    """How many engines a run samples with: its servers, or those of its processes."""
    settings = config.rollout
    if settings.engine == "vllm_server":
        return len(settings.server.urls) or settings.server.count
    return max(1, processes // settings.tensor_parallel_size)


def processes_of(run: Path) -> int:
    """How many processes a run had.

    Raises:
        TraceError: it does not say.
    """
    path = run / MACHINE_FILE
    try:
        machine = json.loads(path.read_text(encoding="utf-8"))
        return int(machine["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise TraceError(
            f"{shown(path)}: does not say how many processes the run had: a trace needs a run that "
            f"this version recorded"
        ) from None


def _check_same(first_run: Path, first: TrainConfig, run: Path, config: TrainConfig) -> None:
    compared = {
        "model.path": (first.model.path, config.model.path),
        "rollout.group_size": (first.rollout.group_size, config.rollout.group_size),
        "rollout.max_new_tokens": (first.rollout.max_new_tokens, config.rollout.max_new_tokens),
        "data.batch_size": (first.data.batch_size, config.data.batch_size),
    }
    for key, (old, new) in compared.items():
        if old != new:
            raise TraceError(f"{key}: {shown(first_run)} has {old}, {shown(run)} has {new}")


def workload_of(trace: Trace, config: TrainConfig) -> Workload:
    """The work of `config`, with the lengths of `trace`.

    Raises:
        TraceError: another model, or completions longer than the trace let them be.
    """
    if config.model.path != trace.config.model.path:
        raise TraceError(
            f"model.path: the trace is of {trace.config.model.path}, which says nothing of the "
            f"times of {config.model.path}"
        )
    limit, traced = config.rollout.max_new_tokens, trace.config.rollout.max_new_tokens
    cut = max(s.lengths.longest for s in trace.steps) >= traced
    if limit > traced and cut:
        raise TraceError(
            f"rollout.max_new_tokens: {limit} is wanted, and the trace has completions that were "
            f"cut at {traced}: how long they would have become is not known"
        )
    groups = round(config.data.batch_size * trace.rows_with_rollouts)
    return Workload(
        max(groups, 1),
        config.rollout.group_size,
        tuple(s.lengths.cut(limit) for s in trace.steps),
        tuple(s.trained_tokens / s.sampled_tokens for s in trace.steps),
    )


def fit_costs(trace: Trace) -> Fit:
    """The costs of a trace's stages."""
    steps, notes = trace.steps, []

    def column(values: Sequence[float]) -> np.ndarray:
        return np.array(values, dtype=np.float64)

    rollout = column([s.times["rollout"] for s in steps])
    longest = column([s.lengths.longest for s in steps])
    tokens = column([s.sampled_tokens / s.engines for s in steps])
    (decode_step, decode_request), is_known, rollout_error = _two_terms(longest, tokens, rollout)
    if not is_known:
        # Half the time to each: wrong by a factor of two at most, for either.
        decode_step, decode_request = (
            float(rollout.sum() / 2 / values.sum()) for values in (longest, tokens)
        )
        notes.append(
            "completions vary too little to tell what a decode step costs from what each request "
            "adds: half the rollout time is given to each"
        )
    train = column([s.times["train"] for s in steps])
    trained = column([s.trained_tokens / s.processes for s in steps])
    (fixed, token), is_known, train_error = _two_terms(np.ones(len(steps)), trained, train)
    if not is_known:
        fixed, token = 0.0, float(train.sum() / trained.sum())
        notes.append(
            "trained tokens vary too little to tell an update's fixed time: all of it is given to "
            "tokens, and shared out among GPUs; traces on other numbers of GPUs would tell"
        )

    def mean(stage: str) -> float:
        return float(np.mean([s.times[stage] for s in steps]))

    costs = Costs(
        decode_step,
        decode_request,
        fixed,
        token,
        reward=mean("reward"),
        sync=mean("sync"),
        other=max(0.0, mean("total") - sum(mean(stage) for stage in _STAGES[:-1])),
        engine_gpus=trace.config.rollout.tensor_parallel_size,
        slots=SLOTS,
    )
    return Fit(costs, rollout_error, train_error, tuple(notes))


def _two_terms(
    first: np.ndarray, second: np.ndarray, seconds: np.ndarray
) -> tuple[tuple[float, float], bool, float]:
    """Least squares of `seconds` on two columns, all [steps], with coefficients of at least 0,
    which are then scaled so that the mean fits.

    Returns:
        The coefficients; whether the steps vary enough to tell them apart; the root mean square of
        what is left, as a share of the mean.
    """
    columns = np.stack([first, second], 1)
    found, *_ = np.linalg.lstsq(columns, seconds, rcond=None)
    left = seconds - columns @ found
    noise = float(left @ left) / max(len(seconds) - 2, 1)
    covariance = np.linalg.pinv(columns.T @ columns) * noise
    shares = np.sqrt(np.diag(covariance)) * columns.mean(0) / seconds.mean()
    is_known = np.linalg.matrix_rank(columns, tol=1e-9 * columns.max()) == 2
    is_known = bool(is_known and shares.max() <= _LARGEST_ERROR)
    if found.min() < 0:
        kept = int(np.argmax(found))
        found = np.zeros(2)
        found[kept] = seconds.sum() / columns[:, kept].sum()
    found *= seconds.mean() / (columns @ found).mean()
    error = np.sqrt(np.mean((seconds - columns @ found) ** 2)) / seconds.mean()
    return (float(found[0]), float(found[1])), is_known, float(error)
