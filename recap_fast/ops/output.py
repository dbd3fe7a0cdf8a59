"""What the operations on the head return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PolicyLossOutput:
    """Result of `fused_linear_policy_loss`. Everything but `loss` is detached.

    Shapes: N tokens, S sequences, K objectives. Dtype float32; float64 where hidden is float64.
    """

    loss: Tensor
    """[]: 1/K * sum_k lambda_k L_k + kl_coef * KL - entropy_coef * H; differentiable."""
    objective_losses: Tensor
    """[K]: L_k before lambda."""
    logprobs: Tensor
    """[N], nats: log-prob of the target under the tempered distribution; 0 at ignored targets."""
    entropy: Tensor
    """[N], nats: entropy of the tempered distribution; 0 at ignored targets."""
    kl: Tensor | None
    """[N], nats: per-token KL estimate, 0 off policy tokens; None without ref_logprobs."""
    clip_fraction: Tensor
    """[K]: share of the policy tokens of k for which the clip decides the surrogate."""
    advantages: Tensor
    """[S, K]: 0 where the objective is absent."""
    importance_weights: Tensor | None
    """[N]: w_t of `rollout_is_cap`, 0 off policy tokens; None without it."""
    importance_bounded: Tensor | None
    """[N] bool: whether exp(old - rollout) was truncated or masked; None likewise."""
    objective_gradients: Tensor | None = None
    """[K, H]: sum over tokens of d L_k / d hidden, before lambda and `loss_scale`. Tokens whose
    objectives cancel each other are left out. None unless asked for."""
    objective_squares: Tensor | None = None
    """[K, 2]: sum over tokens of (d L_k / d logprob)^2: of those that were left out, and of all.
    None likewise."""

    @property
    def gradient_norms(self) -> Tensor | None:
        """[K]: `gradient_norms` of this batch."""
        if self.objective_gradients is None or self.objective_squares is None:
            return None
        return gradient_norms(self.objective_gradients, self.objective_squares)


MAX_LEFT_OUT = 0.1
"""Share of an objective's sum of squares that tokens which are left out may have."""


def gradient_norms(gradients: Tensor, squares: Tensor) -> Tensor:
    """How strongly each objective pulls, [K]: the norm of L_k's gradient in a bias added to the
    hidden states. NaN where more than `MAX_LEFT_OUT` of an objective was left out.

    Args:
        gradients: [K, H], `PolicyLossOutput.objective_gradients`, or their sum over the batches
            (of whatever process) that share denominators.
        squares: [K, 2], `PolicyLossOutput.objective_squares`, or the same sum.
    """
    left_out, whole = squares.unbind(1)
    norms = torch.linalg.vector_norm(gradients, dim=1)
    return norms.where(left_out <= MAX_LEFT_OUT * whole, torch.nan)


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Result of `linear_token_statistics`: what the tempered distribution p says of each token.

    Shapes: N tokens, V vocabulary. Dtype float32; float64 where hidden is float64. All of it is 0,
    or False, at ignored targets. Only the first two carry a gradient.
    """

    logprobs: Tensor
    """[N], nats: log p of the target; differentiable."""
    entropy: Tensor
    """[N], nats: -sum_v p_v log p_v; differentiable."""
    log_sum_sq_probs: Tensor
    """[N]: log(sum_v p_v^2), the log of the chance that two samples are equal."""
    mean_logits: Tensor
    """[N]: mean over the vocabulary of the logits after softcap and temperature."""
    is_top1: Tensor
    """[N] bool: whether the target is the first of the largest logits. False beside NaN."""
