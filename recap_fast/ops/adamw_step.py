"""What a step of AdamW is told, beside a parameter's tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdamWStep:
    """Settings of one step.

    Attributes:
        grad_scale: [] float32; gradients are divided by it.
        found_inf: [] float32; where it is not 0, nothing changes.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: Tensor
    found_inf: Tensor
