"""recap-fast: GRPO with replay, dynamic objective weights and fused losses.

Names are resolved on first use (`recap_fast.lazy`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on
from recap_fast.version import __version__

if TYPE_CHECKING:
    from recap_fast.config import TrainConfig, load_config
    from recap_fast.ops.advantages import group_advantages
    from recap_fast.ops.logprobs import (
        linear_logprobs,
        linear_token_statistics,
        selective_logprobs,
    )
    from recap_fast.ops.loss_config import PolicyLossConfig
    from recap_fast.ops.output import PolicyLossOutput, TokenStatistics
    from recap_fast.ops.policy_loss import fused_linear_policy_loss
    from recap_fast.reweighting.recap import RecapReweighter, make_reweighter
    from recap_fast.trainer import Trainer

__all__ = [
    "PolicyLossConfig",
    "PolicyLossOutput",
    "RecapReweighter",
    "TokenStatistics",
    "TrainConfig",
    "Trainer",
    "fused_linear_policy_loss",
    "group_advantages",
    "linear_logprobs",
    "linear_token_statistics",
    "load_config",
    "make_reweighter",
    "selective_logprobs",
    "__version__",
]

__getattr__ = hand_on(
    __name__,
    {
        "RecapReweighter": "reweighting.recap",
        "make_reweighter": "reweighting.recap",
        "group_advantages": "ops.advantages",
        "linear_logprobs": "ops.logprobs",
        "linear_token_statistics": "ops.logprobs",
        "selective_logprobs": "ops.logprobs",
        "fused_linear_policy_loss": "ops.policy_loss",
        "PolicyLossConfig": "ops.loss_config",
        "PolicyLossOutput": "ops.output",
        "TokenStatistics": "ops.output",
        "TrainConfig": "config",
        "load_config": "config",
        "Trainer": "trainer",
    },
)
