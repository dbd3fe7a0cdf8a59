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
    """[K, H]: sum over tokens of d L_k / d hidden, before lambda; they add up over batches that
    share denominators. NaN for an objective that other objectives cancel on too many of its tokens.
    None unless asked for."""

    @property
    def gradient_norms(self) -> Tensor | None:
        """[K]: how strongly each objective pulls: the norms of `objective_gradients`, which is that
        of L_k's gradient in a bias added to the hidden states."""
        found = self.objective_gradients
        return None if found is None else torch.linalg.vector_norm(found, dim=1)


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
