"""How far a prediction from one run is from another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recap_fast.config import TrainConfig, load_config
from recap_fast.paths import shown
from recap_fast.report.metrics import read_metrics
from recap_fast.simulate.pipeline import Costs, Outcome, SetUp, simulate
from recap_fast.simulate.trace import (
    MIN_STEPS,
    Trace,
    TraceError,
    asynchrony,
    engines_of,
    processes_of,
    workload_of,
)

LIMIT = 0.1
"""Largest difference of the step's time, as a share of the measured one, that passes."""

_MOST_STEPS = 200


@dataclass(frozen=True, slots=True)
class Check:
    """A run's mean step beside its prediction.

    Attributes:
        seconds: by stage, predicted and measured; "step" is the whole. Stages that the run did not
            record are left out.
    """

    run: Path
    set_up: SetUp
    seconds: dict[str, tuple[float, float]]

    @property
    def error(self) -> float:
        """Of the step, signed, as a share of the measured one."""
        predicted, measured = self.seconds["step"]
        return predicted / measured - 1

    @property
    def passes(self) -> bool:
        return abs(self.error) <= LIMIT


def check_run(costs: Costs, trace: Trace, run: Path, *, seed: int = 0) -> Check:
    """Predicts a run from a trace and compares.

    Raises:
        TraceError: no run, too few steps, or another model.
    """
    config_file = run / "config.yaml"
    if not config_file.is_file():
        raise TraceError(f"{shown(run)}: not a run's folder (it has no config.yaml)")
    config = load_config(config_file)
    rows = [row for row in read_metrics(run) if row["step"] and row.get("time/total")][1:]
    if len(rows) < MIN_STEPS:
        raise TraceError(
            f"{shown(run)}: too few steps to compare with: wanted at least {MIN_STEPS + 1} (the "
            f"first also warms up), got {len(rows) + bool(rows)}"
        )
    workload = workload_of(trace, config)
    steps = min(max(len(workload.lengths), 12), _MOST_STEPS)
    set_up = _set_up(config, processes_of(run))
    outcome = simulate(costs, workload, set_up, steps=steps, seed=seed)

    def mean(key: str) -> float | None:
        values = [value for row in rows if (value := row.get(key)) is not None]
        return sum(values) / len(values) if values else None

    predicted = _predicted(costs, outcome)
    keys = {"step": "time/total", "rollout": "time/rollout", "reward": "time/reward",
            "train": "time/train", "sync": "time/sync"}  # fmt: skip
    measured = {stage: mean(key) for stage, key in keys.items() if stage in predicted}
    seconds = {stage: (predicted[stage], m) for stage, m in measured.items() if m is not None}
    return Check(run, set_up, seconds)


def _set_up(config: TrainConfig, processes: int) -> SetUp:
    """What a run had: servers have GPUs of their own, other engines those of its processes."""
    if config.rollout.engine != "vllm_server":
        return SetUp(processes, processes, colocated=True)
    engines = engines_of(config, processes) * config.rollout.tensor_parallel_size
    return SetUp(processes, engines, *(asynchrony(config) or ()))


def _predicted(costs: Costs, outcome: Outcome) -> dict[str, float]:
    stages = {
        "step": outcome.step_seconds,
        "train": outcome.stage_seconds["train"] - costs.other,
        "sync": outcome.stage_seconds["sync"],
    }
    if not outcome.set_up.depth:
        stages["rollout"] = outcome.stage_seconds["wait"] - costs.reward
        stages["reward"] = costs.reward
    return stages
