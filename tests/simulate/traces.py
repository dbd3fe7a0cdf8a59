"""Runs whose stages take what given costs say, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from recap_fast.config import TrainConfig, save_config
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.report.metrics import COMPLETION_QUANTILES, MACHINE_FILE, METRICS_FILE
from recap_fast.simulate.pipeline import Costs
from recap_fast.simulate.workload import clipped_lognormal

COSTS = Costs(
    decode_step=0.02, decode_request=0.001, train_fixed=0.3, train_token=0.002, reward=0.1,
    sync=0.4, other=0.05,
)  # fmt: skip
GROUP, LIMIT = 4, 256


def make_config(run: Path, rows: int = 8, **rollout: object) -> TrainConfig:
    source = {"name": "sums", "kind": "rl", "reasoning_gym": "chain_sum",
              "rewards": {"accuracy": "accuracy"}}  # fmt: skip
    return TrainConfig.model_validate(
        {
            "run": str(run),
            "model": {"path": "smollm2-135m-instruct"},
            "data": {"sources": [source], "batch_size": rows},
            "rollout": {"group_size": GROUP, "max_new_tokens": LIMIT, **rollout},
            "loss": PolicyLossConfig(rollout_is_cap=2.0),
            "training": {"steps": 20, "max_tokens": 2048},
        }
    )


def write_trace(
    run: Path,
    *,
    steps: int = 20,
    rows: int = 8,
    processes: int = 1,
    costs: Costs = COSTS,
    seed: int = 0,
    vary: bool = True,
    noise: float = 0.0,
    **rollout: object,
) -> Path:
    """A run's folder. Its first step takes three times as long as it should."""
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True, exist_ok=True)
    save_config(make_config(run, rows, **rollout), run / "config.yaml")
    (run / MACHINE_FILE).write_text(json.dumps({"processes": processes}))
    with (run / METRICS_FILE).open("w") as file:
        file.write(json.dumps({"step": 0, "eval/sums/accuracy": 0.1}) + "\n")
        for step in range(1, steps + 1):
            mean = rng.uniform(40, 120) if vary else 80
            longest = rng.uniform(180, LIMIT) if vary else LIMIT
            lengths = clipped_lognormal(mean, longest, 0.6).draw(rows * GROUP, rng)
            row = measured_step(lengths, processes, costs)
            slower = (3.0 if step == 1 else 1.0) * (1 + noise * rng.normal())
            row |= {k: v * slower for k, v in row.items() if k.startswith("time/")}
            file.write(json.dumps({"step": step, **row}) + "\n")
    return run


def measured_step(lengths: np.ndarray, processes: int, costs: Costs) -> dict[str, float]:
    """What a step of such completions [S] records."""
    tokens = float(lengths.sum())
    times = {
        "rollout": costs.decode_step * lengths.max() + costs.decode_request * tokens / processes,
        "reward": costs.reward,
        "train": costs.train(1.5 * tokens, processes),
        "sync": costs.sync,
    }
    times["total"] = sum(times.values()) + costs.other
    quantiles = np.quantile(lengths, list(COMPLETION_QUANTILES.values()))
    return {
        **{f"time/{stage}": float(seconds) for stage, seconds in times.items()},
        "rollout/completions": len(lengths),
        "rollout/completion_tokens": float(lengths.mean()),
        **dict(zip(COMPLETION_QUANTILES, quantiles.tolist(), strict=True)),
        "train/packed_tokens": 1.5 * tokens,
    }
