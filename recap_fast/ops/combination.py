"""Advantages that combine a rollout's rewards into one number, as rivals of weights do.

GDPO, GD2PO and DVAO know no weights that change with the step: they say how the rewards of a
rollout become the one advantage that all its tokens share. docs/recap.md has the formulas side by
side, and what was read where.

Shapes: S sequences (rollouts), K objectives.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from recap_fast.ops._validate import (
    FULL_DTYPES,
    INTEGER_DTYPES,
    check_tensor,
    statistics_dtype,
)
from recap_fast.ops.advantages import dense_ids, group_sum, normalized_advantages

Combination = Literal["gdpo", "gd2po", "dvao"]

_LEAST_ADVANTAGE = 1e-5
"""Advantages (in deviations of their group) of a smaller magnitude have no sign: a reward that is
the mean of its group is off it by the rounding of float32. GD2PO's code has 1e-8, in float32, where
rounding alone can mask a rollout."""


def combined_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    weights: Tensor,
    *,
    method: Combination,
    eps: float = 1e-4,
) -> Tensor:
    """One advantage a rollout, in the column of each objective that it has.

    A[s, k] is `group_advantages` with normalize="std", w the weights, sigma[g, k] the unbiased
    deviation of reward k in group g, and absent objectives count as 0 in the sums:

    - "gdpo" (arXiv 2601.05242; the authors' code, and `normalize_then_sum` of TRL):
      V[s] = sum_k w_k A[s, k]; V / (std(V) + eps) over all rollouts. The published formula
      subtracts the mean of V too, which is 0, because it is 0 in each group.
    - "gd2po" (arXiv 2606.16771, the variant "hard" of the authors' code): a rollout is masked
      where one of its A[s, k] with w_k > 0 is positive and another negative. With the unmasked
      share of its group, V[s] = share[g] sum_k w_k A[s, k]; (V - mean(V)) / (std(V) + eps) over
      the unmasked rollouts, and 0 for the masked ones, which stay in all denominators.
    - "dvao" (arXiv 2605.25604): sum_k w_k sigma[g, k] A[s, k] / sum_k w_k sigma[g, k].

    Deviations are unbiased. With one column for all, the loss sum_k lambda_k / K L_k is the mean of
    the objectives' losses in each of which the published advantage stands, so that clipping sees
    that advantage; a published loss has it once.

    Nothing waits for the device.

    Args:
        rewards: [S, K] float32 of a whole step, NaN where the objective is absent: the deviation
            over a part of the step is another one.
        group_ids: [S] integers, any values and any order; equal ids are one group.
        weights: [K] floating, w >= 0.
        method: whose combination.
        eps: added to deviations.

    Returns:
        [S, K] float32 (float64 for float64 rewards); 0 where the objective is absent.

    Raises:
        ValueError: a wrong shape, dtype or device, an unknown `method`, or a negative `eps`.
    """
    rewards = check_tensor("rewards", rewards, [("S", None), ("K", None)], FULL_DTYPES)
    size, objectives = rewards.shape
    device = rewards.device
    group_ids = check_tensor("group_ids", group_ids, [("S", size)], INTEGER_DTYPES, device)
    weights = check_tensor("weights", weights, [("K", objectives)], FULL_DTYPES, device)
    if method not in get_args(Combination):
        raise ValueError(f"method: wanted one of {get_args(Combination)}, got {method!r}")
    if not eps >= 0:
        raise ValueError(f"eps: wanted a number >= 0, got {eps}")
    rewards = rewards.detach()
    values = rewards.double()
    present = ~values.isnan()
    weights = weights.detach().double()
    alone = normalized_advantages(values, group_ids, "std", eps)  # [S, K], 0 where absent
    weighted = alone * weights
    group = dense_ids(group_ids)
    scored = present.any(dim=1)  # [S]
    if method == "gdpo":
        combined = weighted.sum(dim=1)
        combined = combined / (_moments(combined, scored)[1] + eps)
    elif method == "gd2po":
        kept = scored & ~_conflicts(alone.where(weights > 0, 0.0))
        share = group_sum(kept.double(), group) / group_sum(scored.double(), group).clamp(min=1)
        combined = share * weighted.sum(dim=1)
        mean, deviation = _moments(combined, kept)
        combined = ((combined - mean) / (deviation + eps)).where(kept, 0.0)
    else:
        combined = _by_deviation(values, present, weighted, weights, group)
    table = combined.unsqueeze(1).where(present, 0.0)
    return table.to(statistics_dtype(rewards.dtype))


def _conflicts(advantages: Tensor) -> Tensor:
    """[S] bool from [S, K]: whether a rollout is better than its group in one and worse in
    another."""
    better = (advantages > _LEAST_ADVANTAGE).any(dim=1)
    return better & (advantages < -_LEAST_ADVANTAGE).any(dim=1)


def _by_deviation(
    rewards: Tensor, present: Tensor, weighted: Tensor, weights: Tensor, group: Tensor
) -> Tensor:
    """DVAO's advantages [S] from rewards [S, K] and w_k A[s, k]."""
    filled = rewards.where(present, 0.0)
    count = group_sum(present.double(), group)
    centred = (filled - group_sum(filled, group) / count.clamp(min=1)).where(present, 0.0)
    variance = group_sum(centred.square(), group) / (count - 1).clamp(min=1)
    deviation = variance.sqrt().where(present, 0.0)
    total = (weights * deviation).sum(dim=1)
    # Where no reward varies, all advantages are 0, and so are those of the quotient.
    return (weighted * deviation).sum(dim=1) / total.where(total > 0, 1.0)


def _moments(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation [] of the chosen values [S]; 0 where there are too few."""
    count = chosen.sum()
    mean = values.where(chosen, 0.0).sum() / count.clamp(min=1)
    squares = (values - mean).where(chosen, 0.0).square().sum()
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()
