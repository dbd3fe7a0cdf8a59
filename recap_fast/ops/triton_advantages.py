"""Launches `kernels/advantages.py`. Shapes: S sequences, K objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from recap_fast.kernels import advantages as kernels
from recap_fast.ops.launch import launch
from recap_fast.ops.triton_rows import (
    MAX_REGISTERS,
    next_power_of_2,
    rewards_block,
    warps_for_tile,
)

NORMALIZATIONS = {
    "std": kernels.STD.value,
    "none": kernels.NONE.value,
    "leave_one_out": kernels.LEAVE_ONE_OUT.value,
}


def group_advantages(
    rewards: Tensor, group_ids: Tensor, normalize: str = "std", eps: float = 1e-4
) -> Tensor:
    """`ops.group_advantages` for checked float32 arguments, in one launch. [S, K]."""
    s, k = rewards.shape
    advantages = torch.empty(s, k, dtype=torch.float32, device=rewards.device)
    block_k = next_power_of_2(k)
    block_s = rewards_block(k)
    launch(
        kernels.group_advantages_kernel,
        (s if k else 0,),
        rewards.device,
        rewards_ptr=rewards.contiguous(),
        group_ids_ptr=group_ids.contiguous(),
        advantages_ptr=advantages,
        num_sequences=s,
        num_objectives=k,
        eps=eps,
        NORMALIZE=NORMALIZATIONS[normalize],
        BLOCK_K=block_k,
        BLOCK_S=block_s,
        num_warps=warps_for_tile(block_k * block_s),
        maxnreg=MAX_REGISTERS,
    )
    return advantages
