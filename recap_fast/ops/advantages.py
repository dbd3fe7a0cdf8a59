"""Group-relative advantages, one objective at a time.

Shapes: S sequences (rollouts), K objectives.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from recap_fast.ops import reference
from recap_fast.ops._validate import (
    FULL_DTYPES,
    INTEGER_DTYPES,
    check_tensor,
    resolve_impl,
    statistics_dtype,
)

Normalize = Literal["std", "none", "leave_one_out"]
_NORMALIZE = ("std", "none", "leave_one_out")


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    normalize: Normalize = "std",
    eps: float = 1e-4,
    impl: str = "auto",
) -> Tensor:
    """Advantage of each rollout over its group, for each objective by itself.

    Args:
        rewards: [S, K] float32; NaN where the objective is absent from the rollout.
        group_ids: [S] integers, any values and any order; equal ids are one group.
        normalize: "std": (r - mean) / (std + eps) with the unbiased deviation (GRPO,
            arXiv 2402.03300; eps as in TRL). "none": r - mean (Dr. GRPO, arXiv 2503.20783).
            "leave_one_out": r - mean of the others (RLOO, arXiv 2402.14740).
        eps: added to the deviation.
        impl: "triton" (one launch), "torch", "reference" (a loop that syncs), or "auto": Triton on
            CUDA unless the rewards are float64, else torch. An explicit name is run or refused.

    Returns:
        [S, K] float32 (float64 for float64 rewards). 0 where the objective is absent, where all
        rewards of the group are equal, and where only one member of the group has the objective.

    Raises:
        ValueError: a wrong shape, dtype or device, an unknown `normalize`, a negative `eps`, or
            impl="triton" where it cannot run.
    """
    rewards = check_tensor("rewards", rewards, [("S", None), ("K", None)], FULL_DTYPES)
    group_ids = check_tensor(
        "group_ids", group_ids, [("S", rewards.shape[0])], INTEGER_DTYPES, rewards.device
    )
    if normalize not in _NORMALIZE:
        raise ValueError(f"normalize: wanted one of {_NORMALIZE}, got {normalize!r}")
    if not eps >= 0:
        raise ValueError(f"eps: wanted a number >= 0, got {eps}")
    chosen = resolve_impl(impl, rewards.device, rewards.dtype)
    return _group_advantages(rewards.detach(), group_ids, normalize, eps, chosen)


@torch.library.custom_op("recap_fast::group_advantages", mutates_args=())
def _group_advantages(
    rewards: Tensor, group_ids: Tensor, normalize: str, eps: float, impl: str
) -> Tensor:
    return normalized_advantages(rewards, group_ids, normalize, eps, impl).contiguous()


@_group_advantages.register_fake
def _(rewards: Tensor, *others: Any) -> Tensor:
    return rewards.new_empty(rewards.shape)


def normalized_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    normalize: str = "std",
    eps: float = 1e-4,
    impl: str = "torch",
) -> Tensor:
    """`group_advantages` for checked arguments and a resolved `impl`."""
    if impl == "reference":
        return reference.group_advantages(rewards, group_ids, normalize, eps)
    if impl == "triton":
        from recap_fast.ops import triton_advantages

        return triton_advantages.group_advantages(rewards, group_ids, normalize, eps)
    present = ~rewards.isnan()
    # In float64 a sum does not depend, after rounding, on the order in which a GPU adds.
    values = rewards.double()
    group = dense_ids(group_ids)
    count = group_sum(present.double(), group)
    mean = group_sum(values.where(present, 0.0), group) / count
    varies = present & (_group_extreme(values, present, group, "amax") > values)
    varies |= present & (_group_extreme(values, present, group, "amin") < values)
    centred = (values - mean).where(varies, 0.0)
    if normalize == "std":
        variance = group_sum(centred.square(), group) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)
    elif normalize == "leave_one_out":
        centred = centred * count / (count - 1).clamp(min=1)
    return centred.where(varies, 0.0).to(statistics_dtype(rewards.dtype))


def dense_ids(group_ids: Tensor) -> Tensor:
    """Number the groups 0, 1, ... without learning on the host how many there are. [S] int64."""
    ordered, order = group_ids.long().sort(stable=True)
    starts = torch.ones_like(ordered)
    starts[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, starts.cumsum(0) - 1)


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """[S, K]: for each row the sum over the rows of its group."""
    return torch.zeros_like(values).index_add_(0, group, values).index_select(0, group)


def _group_extreme(values: Tensor, present: Tensor, group: Tensor, reduce: str) -> Tensor:
    """[S, K]: for each row the largest or smallest present value of its group."""
    worst = float("-inf") if reduce == "amax" else float("inf")
    filled = values.where(present, worst)
    index = group[:, None].expand_as(values)
    extreme = torch.full_like(values, worst).scatter_reduce(0, index, filled, reduce)
    return extreme.index_select(0, group)
