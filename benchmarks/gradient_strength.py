"""Does each objective's pull at the hidden states tell that in the parameters, and at what cost?

    python -m benchmarks.gradient_strength [CONFIG] [--steps 24] [--every 2] [--json FILE]

Trains CONFIG (examples/smollm2-cpu.yaml) and every few steps measures the true norms, one backward
pass an objective, beside those that the loss hands over. What `reweighting.balance` needs is how
objectives compare, so each is taken relative to the geometric mean of its step's. Prints by what
factor those differ from the true ones, beside the factors themselves and what the other candidate
leaves, the root of the tokens' summed squared norms, in which nothing cancels; and the time of the
loss with and without them, in turns, at the model's shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import provenance
from recap_fast.config import TrainConfig, load_config
from recap_fast.model.precision import compute_dtype
from recap_fast.ops import PolicyLossConfig, fused_linear_policy_loss, objective
from recap_fast.ops.tokens import TokenTable
from recap_fast.report.metrics import read_metrics
from recap_fast.trainer import Trainer
from recap_fast.training.optimization import UpdateStats
from recap_fast.training.packing import PackedUpdate

ROUNDS = 15
TOKENS, HIDDEN, VOCABULARY, OBJECTIVES = 2048, 576, 49152, 3  # SmolLM2-135M


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("config", nargs="?", default="examples/smollm2-cpu.yaml")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run={folder}/run",
            f"training.steps={given.steps}",
            f"reweighting.measure_gradients_every={given.every}",
            "evaluation.before=false",
            "evaluation.after=false",
        ]
        config = load_config(given.config, overrides)
        trainer = Trainer(config)
        token_norms = _watch_tokens(trainer)
        trainer.train()
        trainer.close()
        found = _compare(config, read_metrics(Path(config.run)), token_norms)
    command = " ".join(["python -m benchmarks.gradient_strength", *sys.argv[1:]])
    about = provenance(torch.device("cpu"), command)
    text = json.dumps({**about, "config": given.config, **found, "cost": _cost()}, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")


def _watch_tokens(trainer: Trainer) -> list[list[float]]:
    """The other candidate of each step to come, [K]: what the sums are made of, squared before they
    are summed."""
    summed, take_step = objective.objective_gradients, trainer.optimizer.step
    squares = torch.zeros(len(trainer.config.objectives))
    found: list[list[float]] = []

    def sums(
        tokens: TokenTable,
        logprobs: Tensor,
        d_hidden: Tensor,
        config: PolicyLossConfig,
        loss_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        by_objective = objective.logprob_gradients(tokens, logprobs, config)
        total = (by_objective * tokens.weights).sum(1)
        parts = by_objective.where(total[:, None] != 0, 0.0) / total.where(total != 0, 1.0)[:, None]
        squares.add_((parts.square() * d_hidden.float().square().sum(1, keepdim=True)).sum(0))
        return summed(tokens, logprobs, d_hidden, config, loss_scale)

    def step(update: PackedUpdate, weights: Tensor, lr: float) -> UpdateStats:
        squares.zero_()  # of the passes that measure the true norms
        stats = take_step(update, weights, lr)
        found.append(squares.sqrt().tolist())
        return stats

    objective.objective_gradients = sums
    trainer.optimizer.step = step  # type: ignore[method-assign]
    return found


def _compare(
    config: TrainConfig, rows: list[Mapping[str, Any]], token_norms: list[list[float]]
) -> dict[str, Any]:
    names = [objective.name for objective in config.objectives]
    steps, true, told, others = [], [], [], []
    for row in rows:
        if any(f"parameter_gradient_norm/{name}" not in row for name in names):
            continue
        steps.append(row["step"])
        true.append([row[f"parameter_gradient_norm/{name}"] or np.nan for name in names])
        told.append([row[f"gradient_norm/{name}"] or np.nan for name in names])
        others.append([norm or np.nan for norm in token_norms[int(row["step"]) - 1]])
    norms, pulls, tokens = (np.array(table, dtype=float) for table in (true, told, others))
    missing = np.isnan(norms) | np.isnan(pulls) | np.isnan(tokens)
    norms[missing], pulls[missing], tokens[missing] = np.nan, np.nan, np.nan

    def relative(table: np.ndarray) -> np.ndarray:
        logs = np.log(table)
        return logs - np.nanmean(logs, axis=1, keepdims=True)

    several = (~missing).sum(1) > 1  # of one alone there is nothing to tell
    spread = relative(norms)[several]
    error = relative(pulls)[several] - spread
    token_error = relative(tokens)[several] - spread
    known = ~np.isnan(error)
    return {
        "steps": steps,
        "objectives": names,
        "parameter_gradient_norms": _listed(norms),
        "pulls_at_hidden_states": _listed(pulls),
        "root_of_summed_squares": _listed(tokens),
        "spread_of_true_norms": round(float(np.exp(np.abs(spread[known]).mean())), 3),
        "left_after_dividing_by_pulls": round(float(np.exp(np.abs(error[known]).mean())), 3),
        "left_after_dividing_by_root_of_squares": round(
            float(np.exp(np.abs(token_error[known]).mean())), 3
        ),
        "correlation_of_logs": round(
            float(np.corrcoef(spread[known], (error + spread)[known])[0, 1]), 3
        ),
    }


def _listed(table: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(x) else round(float(x), 3) for x in row] for row in table]


def _cost() -> dict[str, float | str]:
    """Milliseconds of the loss, median of rounds taken in turns, in the dtype that a run takes."""
    torch.manual_seed(0)
    dtype = compute_dtype("auto", torch.device("cpu"))
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype).mul_(0.04).requires_grad_()
    kinds = torch.full((TOKENS,), -1)
    kinds[TOKENS // 2 :] = OBJECTIVES - 1
    arguments = {
        "targets": torch.randint(0, VOCABULARY, (TOKENS,)),
        "sequence_ids": torch.arange(TOKENS) // 128,
        "advantages": torch.randn(TOKENS // 128, OBJECTIVES),
        "token_objectives": kinds,
        "impl": "torch",
    }
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for wanted, found in seconds.items():
            start = time.perf_counter()
            fused_linear_policy_loss(hidden, weight, objective_gradients=wanted, **arguments)
            found.append(time.perf_counter() - start)
    without, beside = (1e3 * statistics.median(seconds[wanted][1:]) for wanted in (False, True))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "loss_ms": round(without, 1),
        "with_objective_gradients_ms": round(beside, 1),
        "percent": round(100 * (beside / without - 1), 2),
    }


if __name__ == "__main__":
    main()
