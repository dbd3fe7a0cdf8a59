"""Configuration of the policy loss. Free of torch, so that configs load without it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict


@dataclass(frozen=True, slots=True)
class PolicyLossConfig:
    """Constants of `fused_linear_policy_loss`.

    Raises:
        ValueError: a value outside its range, or a combination that has no meaning.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high] (PPO; DAPO's two bounds)."""
    clip_high: float = 0.2
    clip_delta: float | None = None
    """Upper bound of the ratio in the unclipped branch (two-sided clipping); None: none."""
    loss_type: Literal["clip", "cispo"] = "clip"
    ratio_level: Literal["token", "sequence"] = "token"
    """"sequence" is GSPO: one ratio a sequence, the exponential of its mean log-ratio."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    max_completion_length: int | None = None
    """The constant of aggregation "constant", in tokens."""
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = ref - logp: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1. On-policy, k2's gradient is
    on average that of KL(policy || reference), and k1 takes it; k3's that of the reverse.
    """
    entropy_coef: float = 0.0
    temperature: float = 1.0
    logit_softcap: float | None = None
    """logits become cap * tanh(logits / cap), before the temperature."""
    rollout_is_cap: float | None = None
    """Cap of the truncated importance weight exp(old - rollout); None: weight 1."""
    logits_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the head's GEMM leaves the logits. Statistics are float32 in either case."""

    def __post_init__(self) -> None:
        choices = {
            "loss_type": ("clip", "cispo"),
            "ratio_level": ("token", "sequence"),
            "aggregation": ("token", "sequence", "constant"),
            "kl_estimator": ("k1", "k2", "k3"),
            "logits_dtype": ("float32", "bfloat16"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {valid}, got {getattr(self, name)!r}")
        for name in ("clip_low", "clip_high", "kl_coef"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        for name in ("clip_delta", "logit_softcap", "rollout_is_cap", "temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef}")
        length = self.max_completion_length
        if self.aggregation == "constant" and (length is None or length < 1):
            raise ValueError(
                f'aggregation "constant" needs max_completion_length >= 1, got {length}'
            )
