"""recap-fast: GRPO with replay, dynamic objective weights and fused losses.

Names are resolved on first use, so that `import recap_fast` costs no import of torch: reward
workers and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recap_fast.config import TrainConfig, load_config
    from recap_fast.ops import (
        PolicyLossConfig,
        PolicyLossOutput,
        fused_linear_policy_loss,
        group_advantages,
        linear_logprobs,
        selective_logprobs,
    )
    from recap_fast.reweighting import RecapReweighter, make_reweighter
    from recap_fast.trainer import Trainer

__version__ = "0.1.0"

_HOME = {
    "RecapReweighter": "reweighting",
    "make_reweighter": "reweighting",
    "group_advantages": "ops",
    "linear_logprobs": "ops",
    "selective_logprobs": "ops",
    "fused_linear_policy_loss": "ops",
    "PolicyLossConfig": "loss_config",
    "PolicyLossOutput": "ops",
    "TrainConfig": "config",
    "load_config": "config",
    "Trainer": "trainer",
}
__all__ = [
    "PolicyLossConfig",
    "PolicyLossOutput",
    "RecapReweighter",
    "TrainConfig",
    "Trainer",
    "fused_linear_policy_loss",
    "group_advantages",
    "linear_logprobs",
    "load_config",
    "make_reweighter",
    "selective_logprobs",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"recap_fast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'recap_fast' has no attribute {name!r}")
