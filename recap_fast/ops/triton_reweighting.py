"""Launches `kernels/reweighting.py`. Shapes: K objectives, W the window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recap_fast.kernels.reweighting import recap_update_kernel
from recap_fast.ops.launch import launch
from recap_fast.ops.triton_rows import MAX_REGISTERS, next_power_of_2, warps_for_tile

TILE = 1024
"""Values of the ring that a block holds at most: few enough for registers whatever K."""


@dataclass(frozen=True, slots=True)
class RecapState:
    """Buffers at fixed addresses, which an update overwrites."""

    ring: Tensor  # [K, 2W] float64
    counts: Tensor  # [K] int64
    weights: Tensor  # [K] float32, like the rest
    rates: Tensor  # [K]
    instabilities: Tensor  # [K]
    priorities: Tensor  # [K]


def recap_update(
    values: Tensor,
    present: Tensor | None,
    is_reward: Tensor,
    state: RecapState,
    *,
    temperature: float,
    alpha: float | None,
    max_rate: float | None,
    from_current_mean: bool,
) -> Tensor:
    """One update in one launch: `state` is advanced; returns a copy of its weights [K].

    Args:
        values: [K] floating. NaN and infinite ones count as absent.
        present: [K] bool, or None.
        is_reward: [K] bool: which signals improve by rising.
        alpha, max_rate, from_current_mean: see `RecapReweighter`.
    """
    k, columns = state.ring.shape
    block_k = next_power_of_2(k)
    block_columns = min(next_power_of_2(columns), max(1, TILE // block_k))
    returned = torch.empty_like(state.weights)
    launch(
        recap_update_kernel,
        (1,),
        values.device,
        values_ptr=values,  # with its stride: a copy would be another launch
        values_stride=values.stride(0),
        present_ptr=present,
        present_stride=0 if present is None else present.stride(0),
        is_reward_ptr=is_reward,
        ring_ptr=state.ring,
        counts_ptr=state.counts,
        weights_ptr=state.weights,
        returned_ptr=returned,
        rates_ptr=state.rates,
        instabilities_ptr=state.instabilities,
        priorities_ptr=state.priorities,
        num_objectives=k,
        num_columns=columns,
        temperature=temperature,
        alpha=0.0 if alpha is None else alpha,
        max_rate=math.inf if max_rate is None else max_rate,
        SUM=alpha is None,
        CURRENT=from_current_mean,
        BLOCK_K=block_k,
        BLOCK_C=block_columns,
        num_warps=warps_for_tile(block_k * block_columns),
        maxnreg=MAX_REGISTERS,
    )
    return returned
