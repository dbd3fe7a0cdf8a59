"""What a training step reports: figures from the device in one copy, and those the host has.

Shapes: S rollouts, K objectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from recap_fast.report.metrics import COMPLETION_QUANTILES
from recap_fast.reweighting.balance import GradientBalance
from recap_fast.reweighting.recap import Reweighter
from recap_fast.training.optimization import UpdateStats
from recap_fast.training.packing import PackedUpdate
from recap_fast.types import Objective, RewardTable, Rollout


def device_metrics(
    names: Sequence[str],
    reweighter: Reweighter,
    stats: UpdateStats,
    balance: GradientBalance | None = None,
) -> dict[str, float]:
    """The step's one copy from the device."""
    per_objective = {
        "weight": reweighter.weights if balance is None else balance.weights,
        "rate": reweighter.rates,
        "instability": reweighter.instabilities,
        "loss": stats.objective_losses,
        "clip_fraction": stats.clip_fraction,
    }
    optional = {
        "retention": reweighter.retentions,
        "unbalanced_weight": None if balance is None else reweighter.weights,
        "balance": None if balance is None else balance.factors,
        "gradient_norm": stats.gradient_norms,
        "parameter_gradient_norm": stats.parameter_norms,
    }
    per_objective |= {kind: values for kind, values in optional.items() if values is not None}
    scalars = {
        "entropy": stats.entropy,
        "kl": stats.kl,
        "grad_norm": stats.grad_norm,
        "skipped_updates": stats.skipped,
        "rollout/logprob_diff_mean": stats.logprob_diff_mean,
        "rollout/logprob_diff_max": stats.logprob_diff_max,
    }
    if stats.importance is not None:
        count, total, squares, bounded = stats.importance.unbind()
        # All masked, all sums are 0: then no sample is effective, where 0 / 0 would be unknown.
        effective = torch.where(squares > 0, total.square() / (count * squares), 0.0)
        scalars["importance/effective_sample_size"] = effective.where(count > 0, torch.nan)
        scalars["importance/bounded_fraction"] = bounded / count
    names = [f"{kind}/{name}" for kind in per_objective for name in names] + [*scalars]
    values = torch.cat([*per_objective.values(), torch.stack([*scalars.values()])])
    return dict(zip(names, values.tolist(), strict=True))


def host_metrics(
    objectives: Sequence[Objective],
    rollouts: Sequence[Rollout],
    rewards: RewardTable,
    updates: Sequence[PackedUpdate],
    skipped: Mapping[str, int],
) -> dict[str, float]:
    """Everything else that a step reports, from what the host knows."""
    metrics: dict[str, float] = {}
    means = column_means(rewards.values)
    zero_std = _zero_std_fractions(rollouts, rewards.values)
    for k, objective in enumerate(objectives):
        if objective.kind == "reward":
            name = objective.name
            metrics[f"reward/{name}"] = float(means[k])
            metrics[f"zero_std_fraction/{name}"] = zero_std[k]
    metrics["rollout/completions"] = len(rollouts)
    if rollouts:
        lengths = [len(r.token_ids) for r in rollouts]
        metrics["rollout/completion_tokens"] = float(np.mean(lengths))
        quantiles = np.quantile(lengths, list(COMPLETION_QUANTILES.values()))
        metrics |= dict(zip(COMPLETION_QUANTILES, quantiles.tolist(), strict=True))
        cut = [r.finish_reason == "length" for r in rollouts]
        metrics["rollout/truncated_fraction"] = float(np.mean(cut))
    metrics["train/policy_tokens"] = sum(u.num_policy_tokens for u in updates)
    metrics["train/packed_tokens"] = sum(u.num_packed_tokens for u in updates)
    metrics |= {f"failed/{key}": count for key, count in rewards.failures.items()}
    metrics |= {f"unreadable/{key}": count for key, count in rewards.unreadable.items()}
    metrics |= {f"skipped/{key}": count for key, count in skipped.items()}
    return metrics


def staleness_metrics(rollouts: Sequence[Rollout], policy_version: int) -> dict[str, float]:
    """How old the tokens are that a step trains on, where the engine says so.

    Args:
        policy_version: steps before this one.

    Returns:
        Mean and maximum over the tokens, in steps, and the share of each age.
    """
    ages = np.array([policy_version - version for r in rollouts for version in r.versions])
    if not len(ages):
        return {}
    shares = np.bincount(ages) / len(ages)
    return {
        "staleness/mean": float(ages.mean()),
        "staleness/max": int(ages.max()),
        **{f"staleness/share_{age}": float(share) for age, share in enumerate(shares)},
    }


def learnt_something(row: Mapping[str, float | int | None]) -> bool:
    """Whether a row of metrics is of a step that changed the model."""
    # Not finite, the norm of the gradient is that of a step that was skipped; or there was none.
    norm = row.get("grad_norm")
    return norm is not None and math.isfinite(norm) and norm > 0


def column_means(values: np.ndarray, dtype: type[np.floating[Any]] = np.float32) -> np.ndarray:
    """[S, K] -> [K] mean over the rows that are present; NaN where none is."""
    present = ~np.isnan(values)
    count = present.sum(0)
    sums = np.where(present, values, 0).sum(0, dtype=np.float64)
    return np.where(count > 0, sums / np.maximum(count, 1), np.nan).astype(dtype)


def column_deviations(values: np.ndarray) -> np.ndarray:
    """[S, K] -> [K] unbiased standard deviation over the rows that are present; else NaN."""
    present = ~np.isnan(values)
    count = present.sum(0)
    centred = np.where(present, values - column_means(values), 0)
    variance = np.square(centred, dtype=np.float64).sum(0) / np.maximum(count - 1, 1)
    return np.where(count > 1, np.sqrt(variance), np.nan).astype(np.float32)


def _zero_std_fractions(rollouts: Sequence[Rollout], values: np.ndarray) -> list[float]:
    """Per objective, the share of groups whose rewards are all equal; NaN without groups."""
    groups = np.array([r.group for r in rollouts])
    flat: list[list[bool]] = [[] for _ in range(values.shape[1])]
    for group in np.unique(groups):
        rows = values[groups == group]
        for k, column in enumerate(rows.T):
            present = column[~np.isnan(column)]
            if len(present):
                flat[k].append(bool(np.ptp(present) == 0))
    return [float(np.mean(found)) if found else float("nan") for found in flat]
