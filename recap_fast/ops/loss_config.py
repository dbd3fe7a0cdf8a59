"""Configuration of the policy loss.

Free of torch, so that configurations load without it, and of pydantic, which whoever imports the
losses alone may lack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, slots=True)
class PolicyLossConfig:
    """Constants of `fused_linear_policy_loss`.

    Raises:
        ValueError: a value outside its range, or a combination that has no meaning.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    clip_low: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high] (PPO; DAPO's two bounds)."""
    clip_high: float = 0.2
    """At least 0; at least -1 for "cispo", which some bound below 1."""
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
    """Largest importance weight exp(old - rollout) of a token; None: its weight is 1.

    It corrects for the policy that sampled the token, by the log-prob recorded then: another
    engine, or an older version of the weights. `old` are the old log-probs where those are given
    (decoupled PPO, arXiv 2110.00641), else those of the policy that is being trained, through which
    no gradient flows; then the weight is the whole ratio to the sampler and there is none to clip.
    """
    rollout_is_mode: Literal["truncate", "mask"] = "truncate"
    """Of weights outside [rollout_is_min, rollout_is_cap]: "truncate" moves them to the bound
    (truncated importance sampling), "mask" makes them 0 (IcePop, arXiv 2510.18855). A masked token
    still counts in the denominators."""
    rollout_is_min: float | None = None
    """Smallest importance weight of a token; None: any."""
    logits_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the head's GEMM leaves the logits. Statistics are float32 in either case."""

    def __post_init__(self) -> None:
        choices = {
            "loss_type": ("clip", "cispo"),
            "ratio_level": ("token", "sequence"),
            "aggregation": ("token", "sequence", "constant"),
            "kl_estimator": ("k1", "k2", "k3"),
            "rollout_is_mode": ("truncate", "mask"),
            "logits_dtype": ("float32", "bfloat16"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {valid}, got {getattr(self, name)!r}")
        least = {"clip_low": 0, "clip_high": -1 if self.loss_type == "cispo" else 0, "kl_coef": 0}
        for name, minimum in least.items():
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= minimum):
                got = getattr(self, name)
                raise ValueError(f"{name} must be finite and >= {minimum}, got {got}")
        bounds = ("rollout_is_cap", "rollout_is_min")
        for name in ("clip_delta", "logit_softcap", *bounds, "temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef}")
        self._check_rollout_is()
        length = self.max_completion_length
        if self.aggregation == "constant" and (length is None or length < 1):
            raise ValueError(
                f'aggregation "constant" needs max_completion_length >= 1, got {length}'
            )

    def _check_rollout_is(self) -> None:
        cap, least = self.rollout_is_cap, self.rollout_is_min
        if cap is None and (least is not None or self.rollout_is_mode == "mask"):
            given = f"rollout_is_mode {self.rollout_is_mode!r} and rollout_is_min {least}"
            raise ValueError(f"rollout_is_cap must be given beside {given}, got None")
        if cap is not None and least is not None and least >= cap:
            raise ValueError(f"rollout_is_min must be below rollout_is_cap {cap}, got {least}")
