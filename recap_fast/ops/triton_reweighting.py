"""Launches `kernels/reweighting.py`. Shapes: K objectives, W the window."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recap_fast.kernels.reweighting import recap_update_kernel
from recap_fast.ops.launch import launch
from recap_fast.ops.triton_rows import MAX_REGISTERS, next_power_of_2, warps_for_tile

TILE = 1024
"""Values of the ring that a block holds at most: few enough for registers whatever K."""


@torch.library.custom_op(
    "recap_fast::recap_update",
    mutates_args=(
        "ring",
        "counts",
        "weights",
        "rates",
        "instabilities",
        "priorities",
        "best",
        "noise",
        "retentions",
    ),
)
def recap_update(
    values: Tensor,
    present: Tensor | None,
    is_reward: Tensor,
    ring: Tensor,
    counts: Tensor,
    weights: Tensor,
    rates: Tensor,
    instabilities: Tensor,
    priorities: Tensor,
    best: Tensor | None,
    noise: Tensor | None,
    retentions: Tensor | None,
    *,
    temperature: float,
    alpha: float | None,
    max_rate: float | None,
    from_current_mean: bool,
    retention: float,
) -> Tensor:
    """One update in one launch: the state is advanced in place; returns a copy of its weights [K].

    Args:
        values: [K] floating. NaN and infinite ones count as absent.
        present: [K] bool, or None.
        is_reward: [K] bool: which signals improve by rising.
        ring: [K, 2W] float64, the state, as is what follows: buffers at fixed addresses.
        counts: [K] int64.
        weights, rates, instabilities, priorities: [K] float32; only written.
        best, noise: [K] float64, and retentions [K] float32, only written; None: no retention.
        alpha, max_rate, from_current_mean, retention: see `RecapReweighter`.
    """
    k, columns = ring.shape
    block_k = next_power_of_2(k)
    pressure = 1 if best is None else 2  # a block's value and the one before it
    block_columns = min(next_power_of_2(columns), max(1, TILE // pressure // block_k))
    returned = torch.empty_like(weights)
    launch(
        recap_update_kernel,
        (1,),
        values.device,
        values_ptr=values,  # with its stride: a copy would be another launch
        values_stride=values.stride(0),
        present_ptr=present,
        present_stride=0 if present is None else present.stride(0),
        is_reward_ptr=is_reward,
        ring_ptr=ring,
        counts_ptr=counts,
        weights_ptr=weights,
        returned_ptr=returned,
        rates_ptr=rates,
        instabilities_ptr=instabilities,
        priorities_ptr=priorities,
        best_ptr=best,
        noise_ptr=noise,
        retentions_ptr=retentions,
        num_objectives=k,
        num_columns=columns,
        temperature=temperature,
        alpha=0.0 if alpha is None else alpha,
        max_rate=math.inf if max_rate is None else max_rate,
        retention=retention,
        SUM=alpha is None,
        CURRENT=from_current_mean,
        BLOCK_K=block_k,
        BLOCK_C=block_columns,
        num_warps=warps_for_tile(pressure * block_k * block_columns),
        maxnreg=MAX_REGISTERS,
    )
    return returned


@recap_update.register_fake
def _(values: Tensor, *others: Tensor | None, **settings: object) -> Tensor:
    return values.new_empty(values.shape, dtype=torch.float32)
