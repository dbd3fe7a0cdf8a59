"""Public operations. Each has an eager oracle in `reference` that shares no code with it."""

from recap_fast.loss_config import PolicyLossConfig
from recap_fast.ops.advantages import group_advantages
from recap_fast.ops.logprobs import linear_logprobs, selective_logprobs
from recap_fast.ops.output import PolicyLossOutput
from recap_fast.ops.policy_loss import fused_linear_policy_loss

__all__ = [
    "PolicyLossConfig",
    "PolicyLossOutput",
    "fused_linear_policy_loss",
    "group_advantages",
    "linear_logprobs",
    "selective_logprobs",
]
