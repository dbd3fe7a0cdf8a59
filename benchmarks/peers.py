"""The same policy-gradient step through recap-fast and its peers, each in its fastest CPU setting.

The step: on-policy clipped GRPO with one objective, no KL, mean over tokens; forward and backward.
Shapes: B sequences of T tokens (N = B * T), H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Operands of one step. Gradients are left in `.grad` of hidden and weight."""

    hidden: Tensor  # [B, T, H], requires grad
    weight: Tensor  # [V, H], requires grad
    targets: Tensor  # [B, T] int64
    advantages: Tensor  # [B] float32

    @classmethod
    def random(
        cls, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, seed: int = 0
    ) -> Inputs:
        """Logits of unit variance, 16 sequences. The same numbers in every process."""
        if tokens % 16:
            raise ValueError(f"tokens: wanted a multiple of 16 (sequences), got {tokens}")
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(16, tokens // 16, hidden, generator=generator)
        weight = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
        return cls(
            hidden=states.to(dtype).requires_grad_(),
            weight=weight.to(dtype).requires_grad_(),
            targets=torch.randint(vocabulary, states.shape[:2], generator=generator),
            advantages=torch.randn(16, generator=generator),
        )


Step = Callable[[Inputs], Tensor]
"""Runs forward and backward once; returns the loss []."""


def three_gemms(inputs: Inputs) -> Tensor:
    """The floor: logits, hidden's gradient, weight's gradient, and nothing else."""
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    logits = hidden @ weight.t()
    inputs.hidden.grad = (logits @ weight).view_as(inputs.hidden)
    inputs.weight.grad = logits.t() @ hidden
    return logits.new_zeros(())


def recap_fast(inputs: Inputs) -> Tensor:
    """fused_linear_policy_loss(impl="torch")."""
    from recap_fast.ops import fused_linear_policy_loss

    b, t, _ = inputs.hidden.shape
    loss = fused_linear_policy_loss(
        inputs.hidden.flatten(0, 1),
        inputs.weight,
        inputs.targets.flatten(),
        sequence_ids=torch.arange(b).repeat_interleave(t),
        advantages=inputs.advantages.unsqueeze(1),
        impl="torch",
    ).loss
    loss.backward()
    return loss


def clipped_mean(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The loss from log-probs [B, T], as a trainer writes it."""
    ratio = torch.exp(logprobs - logprobs.detach())
    advantages = advantages.unsqueeze(1)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def eager(inputs: Inputs) -> Tensor:
    """Plain torch: logits, float32 log_softmax, gather."""
    logits = torch.nn.functional.linear(inputs.hidden, inputs.weight)
    logprobs = torch.log_softmax(logits.float(), -1)
    picked = logprobs.gather(-1, inputs.targets.unsqueeze(-1)).squeeze(-1)
    loss = clipped_mean(picked, inputs.advantages)
    loss.backward()
    return loss


def trl(inputs: Inputs) -> Tensor:
    """TRL's selective_log_softmax over eager logits, its path without Liger."""
    from trl.trainer.utils import selective_log_softmax

    logits = torch.nn.functional.linear(inputs.hidden, inputs.weight)
    loss = clipped_mean(selective_log_softmax(logits, inputs.targets), inputs.advantages)
    loss.backward()
    return loss


def liger(inputs: Inputs) -> Tensor:
    """Liger's chunked GRPO loss.

    All sequences in one chunk, its fastest setting on CPU: it streams over the vocabulary in any
    case, and every further chunk adds one pass over a weight-sized gradient. Not compiled: only
    the loss of [B, T] log-probs would be.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=inputs.hidden.shape[0],
        loss_type="bnpo",
    )
    loss, _ = module(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        torch.ones_like(inputs.targets),
        inputs.advantages,
    )
    loss.backward()
    return loss


FLOOR = "3 bare GEMMs"
OURS = "recap-fast (torch)"
EAGER = "eager torch"
STEPS: dict[str, tuple[Step, str | None]] = {
    FLOOR: (three_gemms, None),
    OURS: (recap_fast, None),
    EAGER: (eager, None),
    "TRL selective_log_softmax": (trl, "trl"),
    "Liger chunked GRPO": (liger, "liger_kernel"),
}
"""Each implementation by name, with the package that it needs."""
