"""Public operations: fused losses, log-probs, advantages, and the launchers of their kernels.

Each has an eager oracle in `reference` that shares no code with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on

if TYPE_CHECKING:
    from recap_fast.ops.advantages import group_advantages
    from recap_fast.ops.combination import combined_advantages
    from recap_fast.ops.logprobs import (
        linear_logprobs,
        linear_token_statistics,
        selective_logprobs,
    )
    from recap_fast.ops.loss_config import PolicyLossConfig
    from recap_fast.ops.output import PolicyLossOutput, TokenStatistics, gradient_norms
    from recap_fast.ops.policy_loss import fused_linear_policy_loss

__all__ = [
    "PolicyLossConfig",
    "PolicyLossOutput",
    "TokenStatistics",
    "combined_advantages",
    "fused_linear_policy_loss",
    "gradient_norms",
    "group_advantages",
    "linear_logprobs",
    "linear_token_statistics",
    "selective_logprobs",
]

__getattr__ = hand_on(
    __name__,
    {
        "combined_advantages": "combination",
        "group_advantages": "advantages",
        "linear_logprobs": "logprobs",
        "linear_token_statistics": "logprobs",
        "selective_logprobs": "logprobs",
        "fused_linear_policy_loss": "policy_loss",
        "PolicyLossConfig": "loss_config",
        "PolicyLossOutput": "output",
        "gradient_norms": "output",
        "TokenStatistics": "output",
    },
)
