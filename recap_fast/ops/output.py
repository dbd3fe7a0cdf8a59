"""What the policy loss returns."""

from __future__ import annotations

from dataclasses import dataclass

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
