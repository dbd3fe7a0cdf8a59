"""Our policy losses in verl's registry: "recap", "recap_gspo" and "recap_cispo".

Value, gradient and metrics are those of verl's "vanilla", "gspo" and "cispo". Options come from
verl's actor config: clip_ratio, clip_ratio_low, clip_ratio_high and, for "recap", clip_ratio_c (the
dual clip). The aggregation is verl's own, in every loss_agg_mode.

Shapes: B sequences of T response tokens each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.ops.objective import MAX_LOG_RATIO, surrogate

__all__ = ["cispo_policy_loss", "clip_policy_loss", "gspo_policy_loss"]

Metrics = dict[str, Any]


@register_policy_loss("recap")
def clip_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss (arXiv 1707.06347) with two bounds and a dual clip (arXiv 1912.09729).

    Args:
        old_log_prob, log_prob: [B, T] float32, of the sampled tokens.
        advantages: [B, T].
        response_mask: [B, T]; tokens where it is 0 may hold anything.
        loss_agg_mode: one of verl's.
        config: verl's ActorConfig.
        rollout_is_weights: [B, T] factors of the tokens' losses; None: 1.

    Returns:
        The loss [] and verl's metrics by name, read from the device at once.

    Raises:
        ValueError: no config, or a clip_ratio_c below 1 + clip_ratio_high.
    """
    settings = _settings(config, "recap")
    log_ratio = _log_ratio(old_log_prob, log_prob, response_mask)
    return _loss(
        log_ratio, log_ratio, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights, settings,
    )  # fmt: skip


@register_policy_loss("recap_gspo")
def gspo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """GSPO (arXiv 2507.18071): the ratio is a sequence's, its gradient a token's. No dual clip.

    Log-ratios are clamped to +-20, as in the other losses; verl clamps this one at 10.

    Arguments, result and errors are those of `clip_policy_loss`.
    """
    settings = _settings(config, "recap_gspo")
    mask = response_mask.bool()
    token = (log_prob - old_log_prob).where(mask, 0.0)
    mean = token.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    sequence = (log_prob - log_prob.detach() + mean.detach()).where(mask, 0.0)
    return _loss(
        sequence.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), token, log_prob, advantages, response_mask,
        loss_agg_mode, config, rollout_is_weights, settings,
    )  # fmt: skip


@register_policy_loss("recap_cispo")
def cispo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """CISPO (arXiv 2506.13585): the log-prob times a ratio that is clipped and a constant.

    Arguments, result and errors are those of `clip_policy_loss`. As in verl, the ratio is clipped
    from below too.
    """
    settings = _settings(config, "recap_cispo")
    log_ratio = _log_ratio(old_log_prob, log_prob, response_mask)
    return _loss(
        log_ratio.detach(), log_ratio, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights, settings,
    )  # fmt: skip


def _settings(config: Any, name: str) -> PolicyLossConfig:
    if config is None:
        raise ValueError(f"policy loss {name!r}: wanted verl's ActorConfig, got None")
    low, high = (
        config.clip_ratio if bound is None else bound
        for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    if name == "recap_cispo":
        return PolicyLossConfig(clip_low=low, clip_high=high, loss_type="cispo")
    if name == "recap_gspo":
        return PolicyLossConfig(clip_low=low, clip_high=high)
    # Below that, verl's dual clip would also cut what the clip itself lets through.
    bound = config.get("clip_ratio_c", 3.0)
    if not bound >= 1 + high:
        raise ValueError(
            f"policy loss {name!r}: wanted clip_ratio_c >= 1 + clip_ratio_high = {1 + high}, "
            f"got {bound}"
        )
    return PolicyLossConfig(clip_low=low, clip_high=high, clip_delta=bound)


def _log_ratio(old_log_prob: Tensor, log_prob: Tensor, response_mask: Tensor) -> Tensor:
    log_ratio = (log_prob - old_log_prob).where(response_mask.bool(), 0.0)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _loss(
    log_ratio: Tensor,
    divergence: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None,
    settings: PolicyLossConfig,
) -> tuple[Tensor, Metrics]:
    """The loss of log-ratios [B, T], 0 where masked; `divergence` [B, T] is what KL comes from."""
    mask = response_mask.bool()
    ratio = log_ratio.exp()
    below = ratio < 1 - settings.clip_low
    if settings.loss_type == "cispo":
        ratio = ratio.clamp(min=1 - settings.clip_low)
    value, _, decides = surrogate(
        ratio.flatten(),
        advantages.where(mask, 0.0).reshape(-1, 1),
        log_prob.where(mask, 0.0).flatten(),
        settings,
    )
    losses = -value.view(mask.shape)
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights.where(mask, 0.0)
    loss = agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info)
    clipped = decides.view(mask.shape)
    if settings.loss_type == "cispo":
        clipped = clipped | below
    bound = math.inf if settings.clip_delta is None else settings.clip_delta
    metrics = {
        "actor/pg_clipfrac": _mean(clipped, mask),
        "actor/ppo_kl": _mean(-divergence, mask),
        "actor/pg_clipfrac_lower": _mean((ratio > bound) & (advantages < 0), mask),
    }
    return loss, dict(zip(metrics, torch.stack([*metrics.values()]).tolist(), strict=True))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B, T] over mask [B, T], [] float32; 0 of nothing."""
    return values.detach().where(mask, 0).sum(dtype=torch.float32) / mask.sum().clamp(min=1)
