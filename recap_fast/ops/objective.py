"""The policy loss as a function of the tokens' log-probs: values, and derivatives in closed form.

    L_k = - sum_t share_tk * w_t * min(r_t A_tk, clip(r_t) A_tk)      policy tokens
          - sum_t share_tk * logp_t                                   supervised tokens of k
    loss = sum_k weight_k L_k + kl_coef * sum_t share_t KL_t - entropy_coef * sum_t share_t H_t
with share_tk = a_t / d_k and weight_k = lambda_k / K.

Everything of size V is elsewhere. Shapes: N tokens (or the rows of one block), S sequences,
K objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.ops.tokens import TokenTable, sum_over_sequences

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp: beyond 5e8 a float32 sum loses everything else."""


def importance_ratio(
    tokens: TokenTable, logprobs: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Ratio r_t [N] and d log r / d (its argument) [N]: 1, or 0 where clamped. On-policy: 1 and 1.

    Level "sequence" (GSPO, arXiv 2507.18071): exp of the sequence's mean log-ratio for each token.
    """
    if tokens.old is None:
        ones = torch.ones_like(logprobs)
        return ones.where(~logprobs.isnan(), logprobs), ones  # NaN must show in the loss
    log_ratio = (logprobs - tokens.old).where(tokens.policy, 0.0)
    if config.ratio_level == "sequence":
        log_ratio = mean_over_sequence(tokens, log_ratio)
    inside = (log_ratio.abs() <= MAX_LOG_RATIO).to(logprobs.dtype)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), inside


def mean_over_sequence(tokens: TokenTable, values: Tensor) -> Tensor:
    """Mean of `values` [N] or [N, K], 0 off policy tokens, over the policy tokens of the sequence;
    of the same shape."""
    beside = (-1,) + (1,) * (values.dim() - 1)
    sums = sum_over_sequences(values, tokens.sequence, tokens.policy_counts.shape[0])
    means = sums / tokens.policy_counts.clamp(min=1).view(beside)
    return means.index_select(0, tokens.sequence).where(tokens.policy.view(beside), 0.0)


def importance_weight(
    tokens: TokenTable, logprobs: Tensor, config: PolicyLossConfig
) -> Tensor | None:
    """w_t [N], 0 off policy tokens: as given, or that of the rollout. None: 1 everywhere."""
    if tokens.importance is not None:
        return tokens.importance.where(tokens.policy, 0.0)
    weight, _ = rollout_weight(tokens, logprobs, config)
    return weight


def rollout_weight(
    tokens: TokenTable, logprobs: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """exp(old - rollout), truncated or masked, [N] and where it was [N] bool; 0 off policy tokens.

    (None, None) where there is no cap. No gradient flows through it.
    """
    if config.rollout_is_cap is None or tokens.rollout is None:
        return None, None
    old = logprobs if tokens.old is None else tokens.old
    log_weight = (old - tokens.rollout).where(tokens.policy, 0.0)
    weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = config.rollout_is_min or 0.0, config.rollout_is_cap
    outside = (weight < low) | (weight > high)
    masks = config.rollout_is_mode == "mask"
    weight = weight.where(~outside, 0.0) if masks else weight.clamp(low, high)
    return weight.where(tokens.policy, 0.0), outside & tokens.policy


def surrogate(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """What policy tokens maximise, [N, K], with its slope [N, K] and where the clip decides it.

    The slope is with respect to the log-ratio for "clip" (PPO, arXiv 1707.06347), and to the
    log-prob for "cispo" (arXiv 2506.13585), whose ratio is a constant.
    """
    ratio, upper = ratio.unsqueeze(1), 1.0 + config.clip_high
    if config.loss_type == "cispo":
        slope = ratio.clamp(max=upper) * advantages
        # An advantage of 0 times the log-prob -inf of a forbidden token is 0.
        value = torch.where(slope == 0, 0.0, slope * logprobs.unsqueeze(1))
        return value, slope, (ratio > upper).expand_as(advantages)
    lower = 1.0 - config.clip_low
    bound = float("inf") if config.clip_delta is None else config.clip_delta
    plain = ratio.clamp(max=bound) * advantages
    clipped = ratio.clamp(lower, upper) * advantages
    decides = clipped < plain
    moves = torch.where(decides, (ratio >= lower) & (ratio <= upper), ratio <= bound)
    return torch.minimum(plain, clipped), torch.where(moves, ratio * advantages, 0.0), decides


def kl_estimate(
    tokens: TokenTable, logprobs: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """KL(policy || reference) per token [N] and its slope in the log-prob [N].

    Estimators k1, k2, k3 of http://joschu.net/blog/kl-approx.html; 0 off policy tokens. k1's own
    slope, 1, knows nothing of the reference and averages to 0 over what the policy samples: it has
    k2's, whose mean on-policy is the gradient of the KL that k1 estimates.
    """
    assert tokens.ref is not None
    log_ratio = (tokens.ref - logprobs).where(tokens.policy, 0.0)
    if config.kl_estimator == "k1":
        return -log_ratio, -log_ratio
    if config.kl_estimator == "k2":
        return log_ratio.square() / 2, -log_ratio
    inside = log_ratio.abs() <= MAX_LOG_RATIO
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    growth = log_ratio.expm1()
    return growth - log_ratio, torch.where(inside, -growth, 0.0)


def is_constant(tokens: TokenTable, config: PolicyLossConfig) -> bool:
    """Whether d loss / d logprob is known before any log-prob is: on-policy, nothing to compare."""
    compares_kl = tokens.ref is not None and config.kl_coef != 0
    weighs = tokens.rollout is not None and config.rollout_is_cap is not None
    return tokens.old is None and not compares_kl and not weighs


def logprob_gradients(tokens: TokenTable, logprobs: Tensor, config: PolicyLossConfig) -> Tensor:
    """d L_k / d logprob_t [N, K]. Level "sequence" needs whole sequences in `tokens`."""
    ratio, inside = importance_ratio(tokens, logprobs, config)
    _, slope, _ = surrogate(ratio, tokens.advantages, logprobs, config)
    by_ratio = tokens.policy_share * slope
    weight = importance_weight(tokens, logprobs, config)
    if weight is not None:
        by_ratio = by_ratio * weight.unsqueeze(1)
    if config.loss_type == "clip":
        by_ratio = by_ratio * inside.unsqueeze(1)
        if config.ratio_level == "sequence":
            by_ratio = mean_over_sequence(tokens, by_ratio)
    return -by_ratio - tokens.supervised_share


def logprob_gradient(tokens: TokenTable, logprobs: Tensor, config: PolicyLossConfig) -> Tensor:
    """d loss / d logprob [N]. Level "sequence" needs whole sequences in `tokens`."""
    gradient = (logprob_gradients(tokens, logprobs, config) * tokens.weights).sum(1)
    if tokens.ref is not None and config.kl_coef != 0:
        _, kl_slope = kl_estimate(tokens, logprobs, config)
        gradient = gradient + config.kl_coef * tokens.regulariser_share * kl_slope
    return gradient


MIN_REMAINDER = 1e-3
"""A token's objectives cancel where less than this share of their sizes is left of their sum: what
is left is then rounding, from which no objective's part can be told."""


def objective_gradients(
    tokens: TokenTable,
    logprobs: Tensor,
    d_hidden: Tensor,
    config: PolicyLossConfig,
    loss_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sum over tokens of each objective's gradient at the hidden states [K, H], and [K, 2] of
    `PolicyLossOutput.objective_squares`.

    All of a token's gradients are multiples of that of its log-prob: what the loss times
    `loss_scale` [] gave to `d_hidden` [N, H] is d loss / d logprob of them, and L_k's part of it is
    d L_k / d logprob over that. Tokens whose objectives cancel have no gradient to be shared out
    and are left out.
    """
    by_objective = logprob_gradients(tokens, logprobs, config)
    weighted = by_objective * tokens.weights
    total, size = weighted.sum(1), weighted.abs().sum(1)
    if tokens.ref is not None and config.kl_coef != 0:
        _, kl_slope = kl_estimate(tokens, logprobs, config)
        penalty = config.kl_coef * tokens.regulariser_share * kl_slope
        total, size = total + penalty, size + penalty.abs()
    kept = total.abs() > MIN_REMAINDER * size
    parts = (by_objective / total.where(kept, 1.0).unsqueeze(1)).where(kept.unsqueeze(1), 0.0)
    if d_hidden.is_cuda and d_hidden.dtype != total.dtype:
        sums = torch.mm(parts.t().to(d_hidden.dtype), d_hidden, out_dtype=total.dtype)
    else:
        sums = torch.mm(parts.t().to(d_hidden.dtype), d_hidden).to(total.dtype)
    if loss_scale is not None:
        sums = sums / loss_scale
    squares = by_objective.square()
    left_out = squares.where(~kept.unsqueeze(1), 0.0)
    return sums, torch.stack([left_out.sum(0), squares.sum(0)], dim=1)


def entropy_gradient(tokens: TokenTable, config: PolicyLossConfig) -> Tensor | None:
    """d loss / d entropy [N]; None without an entropy bonus."""
    return None if config.entropy_coef == 0 else -config.entropy_coef * tokens.regulariser_share


def objective_losses(
    tokens: TokenTable, logprobs: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """L_k [K] and the share of its policy tokens for which the clip decides [K]."""
    ratio, _ = importance_ratio(tokens, logprobs, config)
    value, _, decides = surrogate(ratio, tokens.advantages, logprobs, config)
    weight = importance_weight(tokens, logprobs, config)
    if weight is not None:
        value = value * weight.unsqueeze(1)
    applies = tokens.policy_share > 0
    policy = (tokens.policy_share * value).where(applies, 0.0).sum(0)
    likelihood = tokens.supervised_share * logprobs.unsqueeze(1)
    supervised = likelihood.where(tokens.supervised_share > 0, 0.0).sum(0)
    clipped = (decides & applies).sum(0).to(logprobs.dtype)
    return -(policy + supervised), clipped / applies.sum(0).clamp(min=1)


def total_loss(
    tokens: TokenTable,
    losses: Tensor,
    entropy: Tensor,
    kl: Tensor | None,
    config: PolicyLossConfig,
) -> Tensor:
    """The scalar of the module docstring."""
    loss = (losses * tokens.weights).sum()
    if kl is not None and config.kl_coef != 0:
        loss = loss + config.kl_coef * (tokens.regulariser_share * kl).sum()
    if config.entropy_coef != 0:
        loss = loss - config.entropy_coef * (tokens.regulariser_share * entropy).sum()
    return loss
