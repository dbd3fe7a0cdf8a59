"""Launches `kernels/adamw.py`, a launch a parameter."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from recap_fast.kernels.adamw import adamw_8bit_kernel, adamw_bfloat16_kernel
from recap_fast.ops.adamw_step import AdamWStep
from recap_fast.ops.launch import launch

_VALUES = 1024
_BLOCKS = 4  # of 256 values


def _common(number: Tensor, step: AdamWStep) -> dict[str, Any]:
    return {
        "step_ptr": number,
        "grad_scale_ptr": step.grad_scale,
        "found_inf_ptr": step.found_inf,
        "lr": step.lr,
        "decay": step.lr * step.weight_decay,
        "rate1": 1 - step.beta1,
        "rate2": 1 - step.beta2,
        "log_beta1": math.log(step.beta1) if step.beta1 else -math.inf,
        "log_beta2": math.log(step.beta2) if step.beta2 else -math.inf,
        "eps": step.eps,
        "num_warps": 4,
    }


def adamw_bfloat16(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    number: Tensor,
    step: AdamWStep,
    key: int,
    first: int,
) -> None:
    """See `recap_fast.ops.adamw.adamw_bfloat16`."""
    size = parameter.numel()
    launch(
        adamw_bfloat16_kernel,
        (-(-size // _VALUES),),
        parameter.device,
        parameter_ptr=parameter,
        gradient_ptr=gradient,
        exp_avg_ptr=exp_avg,
        exp_avg_sq_ptr=exp_avg_sq,
        first=first,
        size=size,
        key=key,
        BLOCK=_VALUES,
        **_common(number, step),
    )


def adamw_8bit(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    tables: Tensor,
    number: Tensor,
    step: AdamWStep,
) -> None:
    """See `recap_fast.ops.adamw.adamw_8bit`; tensors of two dimensions."""
    launch(
        adamw_8bit_kernel,
        (-(-exp_avg_scale.numel() // _BLOCKS),),
        parameter.device,
        parameter_ptr=parameter,
        gradient_ptr=gradient,
        exp_avg_ptr=exp_avg,
        exp_avg_scale_ptr=exp_avg_scale,
        exp_avg_sq_ptr=exp_avg_sq,
        exp_avg_sq_scale_ptr=exp_avg_sq_scale,
        tables_ptr=tables,
        num_blocks=exp_avg_scale.numel(),
        blocks_per_row=exp_avg_scale.shape[1],
        num_columns=parameter.shape[1],
        BLOCKS=_BLOCKS,
        **_common(number, step),
    )
