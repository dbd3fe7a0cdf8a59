"""A run's folder with curves shaped like those of real training, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from recap_fast.config import TrainConfig, save_config
from recap_fast.report.metrics import MetricsWriter
from recap_fast.reweighting.recap import RecapReweighter
from recap_fast.types import Prompt, RewardTable, Rollout

WINDOW = 4


def make_config(run: Path, steps: int, **logging: object) -> TrainConfig:
    sources = [
        {
            "name": name,
            "kind": "rl",
            "reasoning_gym": name,
            "rewards": {"accuracy": "accuracy", "format": "answer_format"},
        }
        for name in ("chain_sum", "basic_arithmetic")
    ]
    replay = {"name": "facts", "kind": "sft", "path": "facts.jsonl", "answer": "target"}
    return TrainConfig.model_validate(
        {
            "run": str(run),
            "model": {"path": "smollm2-135m-instruct"},
            "data": {"sources": [*sources, replay], "batch_size": 12},
            "reweighting": {"parameters": {"window": WINDOW, "temperature": 0.5}},
            "optimizer": {"learning_rate": 2e-5},
            "training": {"steps": steps},
            "logging": {"tensorboard": False, **logging},
        }
    )


def make_rollouts(step: int, reward: float = 1.0) -> tuple[list[Rollout], RewardTable]:
    """Two sources, two groups each, two rollouts a group; K = accuracy, format, ntp."""
    rollouts, rows = [], []
    for group in range(4):
        source = ("chain_sum", "basic_arithmetic")[group // 2]
        question = f"Calculate {step} + {group}. Put the answer in <answer> </answer> tags."
        prompt = Prompt(source, 10 * step + group, [1, 2, 3], question, str(step + group), {})
        for member in range(2):
            text = f"{step} & {group} make <answer>{step + group}</answer> ({member})"
            rollouts.append(Rollout(prompt, group, [5, 6], [-0.1, -0.2], "stop", text))
            rows.append([reward * member, 1.0, np.nan])
    return rollouts, RewardTable(np.array(rows, dtype=np.float32))


def make_run(run: Path, done: int, total: int, *, seed: int = 0, eval_every: int = 0) -> Path:
    """A run of `total` steps of which `done` were made, evaluated at 0 and at its end."""
    config = make_config(run, total)
    rng = np.random.default_rng(seed)
    reweighter = RecapReweighter(
        3, window=WINDOW, temperature=0.5, signals=["reward", "reward", "loss"]
    )
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.yaml")
    writer = MetricsWriter(run, config)
    writer.write({"step": 0, **_evaluation(0.0, rng)})
    for step in range(1, done + 1):
        row = _training_row(step, total, reweighter, rng)
        last = step == total
        if last or (eval_every and step % eval_every == 0):
            row |= _evaluation(step / total, rng)
        writer.write(row)
        writer.write_rollouts(step, *make_rollouts(step))
    writer.close()
    return run


def _training_row(
    step: int, total: int, reweighter: RecapReweighter, rng: np.random.Generator
) -> dict[str, float]:
    x = step / total
    values = {
        "accuracy": float(np.clip(0.12 + 0.45 / (1 + np.exp(-9 * (x - 0.45))), 0, 1)),
        "format": float(np.clip(1 - 0.95 * np.exp(-7 * x), 0, 1)),
        "ntp": 2.1 + 0.5 * float(np.exp(-4 * x)),
    }
    spread = {"accuracy": 0.06, "format": 0.03, "ntp": 0.08}
    noisy = {name: value + spread[name] * rng.normal() for name, value in values.items()}
    weights = reweighter.update(torch.tensor(list(noisy.values()), dtype=torch.float32))
    row: dict[str, float] = {"step": step}
    for k, name in enumerate(noisy):
        row[f"weight/{name}"] = float(weights[k])
        row[f"rate/{name}"] = float(reweighter.rates[k])
        row[f"instability/{name}"] = float(reweighter.instabilities[k])
        strength = {"accuracy": 0.4, "format": 0.5 * (1 - x) ** 2, "ntp": 5.0 - 3.0 * x}[name]
        row[f"gradient_norm/{name}"] = strength * float(np.exp(0.3 * rng.normal()))
        row[f"loss/{name}"] = noisy[name] if name == "ntp" else 0.02 * rng.normal()
        if name != "ntp":
            row[f"reward/{name}"] = min(max(noisy[name], 0.0), 1.0)
            row[f"zero_std_fraction/{name}"] = float(np.clip(values[name] ** 3, 0, 1))
    times = {"rollout": 4.5, "reward": 0.15, "train": 4.8, "sync": 0.35}
    times = {stage: value * (1 + 0.12 * rng.normal()) for stage, value in times.items()}
    row |= {f"time/{stage}": value for stage, value in times.items()}
    row["time/total"] = sum(times.values())
    row["tokens_per_second"] = 4100 / row["time/total"]
    row["rollout/logprob_diff_mean"] = 0.008 * float(np.exp(0.2 * rng.normal()))
    row["rollout/logprob_diff_max"] = 0.12 * float(np.exp(0.4 * rng.normal()))
    row["rollout/completion_tokens"] = 40 - 12 * x
    row["grad_norm"] = 0.9 * float(np.exp(0.3 * rng.normal()))
    row["lr"] = 2e-5 * min(x / 0.1, (1 - x) / 0.9)
    row["failed/accuracy/timeout"] = int(step % 9 == 0)
    row["skipped/facts/row_too_long"] = step // 4
    return row


def _evaluation(x: float, rng: np.random.Generator) -> dict[str, float]:
    scores = {
        "chain_sum/accuracy": 0.14 + 0.4 * x,
        "chain_sum/format": 0.05 + 0.94 * x,
        "chain_sum/completion_tokens": 41 - 12 * x,
        "basic_arithmetic/accuracy": 0.31 - 0.06 * x,
        "basic_arithmetic/format": 0.08 + 0.9 * x,
        "basic_arithmetic/completion_tokens": 33 - 5 * x,
        "facts/loss": 2.54 - 0.4 * x,
        "facts/token_accuracy": 0.47 + 0.05 * x,
    }
    return {f"eval/{key}": value * (1 + 0.02 * rng.normal()) for key, value in scores.items()}
