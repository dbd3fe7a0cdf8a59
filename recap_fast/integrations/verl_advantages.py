"""RECAP as an advantage estimator of verl, called "recap".

Each objective's rewards are normalised in their groups by themselves; then

    A = sum_k w_k lambda_k A_k,   lambda from a reweighter of the batch's mean rewards.

verl hands an estimator one reward a sequence. The others, which a `compute_score` that returns
{"score": ..., "accuracy": ..., "format": ...} leaves beside it, are delivered by its trainer
(`verl_trainer`). verl computes the advantages of a whole batch in its driver, so that means over
the batch need no collective.

Options, under `+algorithm.recap`: `objectives`, the names; `weights`, the w_k, 1 by default;
`method`, "recap" by default; `parameters` of that method (see `make_reweighter`).

Shapes: S sequences, T response tokens, K objectives.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.core_algos import register_adv_est

from recap_fast.ops.advantages import group_advantages
from recap_fast.reweighting.base import is_number
from recap_fast.reweighting.recap import Reweighter, make_reweighter
from recap_fast.training.step_metrics import column_deviations, column_means

__all__ = ["recap_advantages"]

logger = logging.getLogger(__name__)

NAME = "recap"
_EPS = 1e-6  # verl's, added to the deviation


@dataclass(frozen=True)
class Options:
    """What stands under algorithm.recap."""

    objectives: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    parameters: dict[str, Any]

    @classmethod
    def read(cls, algorithm: Any) -> Options:
        """From verl's `config.algorithm`.

        Raises:
            ValueError: none there, a key that is no option, or an option of verl's that does
                not go with it.
        """
        section = algorithm.get(NAME) if algorithm is not None else None
        if not section or not section.get("objectives"):
            raise ValueError(
                "adv_estimator=recap: wanted the names of the rewards, "
                "'+algorithm.recap.objectives=[accuracy,format]', got none"
            )
        known = ("objectives", "weights", "method", "parameters")
        for key in section:
            if key not in known:
                raise ValueError(f"algorithm.recap.{key}: wanted one of {known}")
        if algorithm.get("use_kl_in_reward"):
            raise ValueError(
                "adv_estimator=recap: algorithm.use_kl_in_reward=True is not supported, as KL is "
                "no part of an objective's reward; set actor_rollout_ref.actor.use_kl_loss=True"
            )
        objectives = section["objectives"]
        if not _is_sequence(objectives) or len(set(objectives)) < len(objectives):
            raise ValueError(
                "algorithm.recap.objectives: wanted a list of different names, as in "
                f"[accuracy,format], got {objectives}"
            )
        weights = section.get("weights") or [1.0] * len(objectives)
        if (
            not _is_sequence(weights)
            or len(weights) != len(objectives)
            or not all(map(is_number, weights))
        ):
            raise ValueError(
                f"algorithm.recap.weights: wanted a finite number for each of {list(objectives)}, "
                f"got {weights}"
            )
        parameters = {
            key: list(value) if _is_sequence(value) else value
            for key, value in (section.get("parameters") or {}).items()
        }
        if "device" in parameters:
            raise ValueError(
                "algorithm.recap.parameters.device is not supported: verl's driver has no GPU"
            )
        return cls(
            tuple(map(str, objectives)),
            tuple(map(float, weights)),
            str(section.get("method") or NAME),
            parameters,
        )

    def dumps(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


_reweighters: dict[str, Reweighter] = {}

named: set[str] = set()
"""Options (dumped) whose objectives have all had a reward: from then on a batch may lack one."""


def reweighter_of(options: Options) -> Reweighter:
    """The process's one reweighter of these options, made at the first call."""
    key = options.dumps()
    if key not in _reweighters:
        parameters = {"signals": "reward"} | options.parameters
        _reweighters[key] = make_reweighter(
            options.method, len(options.objectives), device="cpu", **parameters
        )
    return _reweighters[key]


@dataclass
class Delivery:
    """What the trainer hands over to the estimator, which verl calls in between."""

    rewards: Mapping[str, Sequence[Any]]
    """By objective, [S]; None or NaN where a sequence has none."""
    sources: Tensor | None = None
    """[S] int64: the row whose advantage each row takes (a session's last); None: its own."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Filled by the estimator."""


_delivery: ContextVar[Delivery | None] = ContextVar("delivery", default=None)


@contextmanager
def delivered(delivery: Delivery) -> Iterator[Delivery]:
    token = _delivery.set(delivery)
    try:
        yield delivery
    finally:
        _delivery.reset(token)


@register_adv_est(NAME)
@torch.no_grad()
def recap_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    config: Any = None,
    non_tensor_batch: Mapping[str, Sequence[Any]] | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Advances the reweighter by the batch and returns sum_k w_k lambda_k A_k for every token.

    Args:
        token_level_rewards: [S, T], not read: the objectives' rewards are.
        response_mask: [S, T].
        index: [S], equal for the sequences of one group (verl's uid).
        config: verl's `config.algorithm`; its norm_adv_by_std_in_grpo holds here too.
        non_tensor_batch: the rewards [S] by objective, where no trainer delivers them.

    Returns:
        advantages [S, T] float32, 0 where masked, twice (verl's returns). Unlike verl's GRPO, a
        group of one gives 0: it says nothing about its only member.

    Raises:
        ValueError: no options or wrong ones; a run whose first batch does not name the reward of
            each objective (None will do); a reward that is no number; or one for another number
            of sequences.
    """
    options = Options.read(config)
    delivery = _delivery.get()
    if delivery is None:
        delivery = Delivery(non_tensor_batch or {})
    key = options.dumps()
    given = delivery.rewards
    rewards = _reward_table(given, options.objectives, len(response_mask), key not in named)
    named.add(key)
    _, groups = np.unique(np.asarray(index), return_inverse=True)
    advantages = group_advantages(
        torch.from_numpy(rewards),
        torch.from_numpy(groups),
        normalize="std" if config.get("norm_adv_by_std_in_grpo", True) else "none",
        eps=_EPS,
    )
    lambdas = _reweigh(reweighter_of(options), rewards)
    combined = advantages @ (torch.tensor(options.weights) * lambdas)
    if delivery.sources is not None:
        combined = combined[delivery.sources]
    delivery.metrics = _metrics(options, reweighter_of(options), rewards)
    logger.info("%s", delivery.metrics)
    result = combined.to(response_mask.device).unsqueeze(-1) * response_mask
    return result, result


def _reward_table(
    rewards: Mapping[str, Sequence[Any]],
    objectives: Sequence[str],
    num_sequences: int,
    must_be_named: bool,
) -> np.ndarray:
    """[S, K] float32, NaN where absent."""
    table = np.full((num_sequences, len(objectives)), np.nan, dtype=np.float32)
    for k, name in enumerate(objectives):
        if name not in rewards:
            if not must_be_named:
                continue
            raise ValueError(
                f"adv_estimator=recap: no sequence has a reward {name!r}; wanted a compute_score "
                f"whose result names it (None where it does not apply), "
                f"got {sorted(map(str, rewards))}"
            )
        column = _column(rewards[name])
        if column is None or len(column) != num_sequences:
            raise ValueError(
                f"adv_estimator=recap: reward {name!r}: wanted a finite number, None or NaN for "
                f"each of {num_sequences} sequences, got {list(rewards[name])}"
            )
        table[:, k] = column
    return table


def _column(values: Sequence[Any]) -> list[float] | None:
    """NaN for None; None where a value is no number or infinite."""
    try:
        column = [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        return None
    return None if any(map(math.isinf, column)) else column


def _reweigh(reweighter: Reweighter, rewards: np.ndarray) -> Tensor:
    deviations = None
    if reweighter.reads_deviations:
        deviations = torch.from_numpy(column_deviations(rewards))
    return reweighter.update(torch.from_numpy(column_means(rewards)), deviations=deviations)


def _metrics(options: Options, reweighter: Reweighter, rewards: np.ndarray) -> dict[str, float]:
    figures = {
        "weight": reweighter.weights.tolist(),
        "rate": reweighter.rates.tolist(),
        "instability": reweighter.instabilities.tolist(),
        "reward": column_means(rewards).tolist(),
    }
    if reweighter.retentions is not None:
        figures["retention"] = reweighter.retentions.tolist()
    return {
        f"recap/{kind}/{name}": value
        for kind, values in figures.items()
        for name, value in zip(options.objectives, values, strict=True)
        if math.isfinite(value)  # a rate is NaN until its windows are full
    }


_their_compute_advantage = ray_trainer.compute_advantage


def _compute_advantage(data: Any, adv_estimator: Any, *others: Any, **options: Any) -> Any:
    """verl's function of this name, for its legacy trainer, whose batch has the rewards."""
    if adv_estimator != NAME or _delivery.get() is not None:
        return _their_compute_advantage(data, adv_estimator, *others, **options)
    with delivered(Delivery(data.non_tensor_batch)):
        return _their_compute_advantage(data, adv_estimator, *others, **options)


ray_trainer.compute_advantage = _compute_advantage
