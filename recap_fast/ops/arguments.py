"""The arguments of the policy loss as one record, and their checks.

Shapes: N tokens, H hidden, V vocabulary, S sequences, K objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recap_fast.ops._validate import (
    FULL_DTYPES,
    IGNORED_TARGET,
    INTEGER_DTYPES,
    NUMBER_DTYPES,
    check_head,
    check_tensor,
    statistics_dtype,
)
from recap_fast.ops.loss_config import PolicyLossConfig


@dataclass(frozen=True, slots=True)
class LossArguments:
    """Arguments of `fused_linear_policy_loss`, which documents them. None: not given."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    sequence_ids: Tensor  # [N]
    rewards: Tensor | None  # [S, K]
    advantages: Tensor | None  # [S, K]
    group_ids: Tensor | None  # [S]
    objective_weights: Tensor | None  # [K]
    token_objectives: Tensor | None  # [N]
    old_logprobs: Tensor | None  # [N]
    ref_logprobs: Tensor | None  # [N]
    rollout_logprobs: Tensor | None  # [N]
    importance_weights: Tensor | None  # [N]
    bias: Tensor | None  # [V]
    denominators: Tensor | None  # [K]
    kl_denominator: Tensor | float | None  # []
    loss_scale: Tensor | None  # []
    weight_grad: Tensor | None  # [V, H]

    def check(self, config: PolicyLossConfig) -> None:
        """Raise ValueError for a wrong shape, dtype, device or combination."""
        check_head(self.hidden, self.weight, self.targets, self.bias)
        s, k = self._check_table()
        self._check_tokens()
        device = self.hidden.device
        for name in ("objective_weights", "denominators"):
            if (value := getattr(self, name)) is not None:
                check_tensor(name, value, [("K", k)], NUMBER_DTYPES, device)
        if isinstance(self.kl_denominator, Tensor):
            check_tensor("kl_denominator", self.kl_denominator, [], NUMBER_DTYPES, device)
        elif not isinstance(self.kl_denominator, (int, float, type(None))):
            got = type(self.kl_denominator).__name__
            raise ValueError(f"kl_denominator: wanted a number or a tensor of shape [], got {got}")
        if self.loss_scale is not None:
            check_tensor("loss_scale", self.loss_scale, [], FULL_DTYPES, device)
        self._check_weight_grad()
        if config.kl_coef != 0 and self.ref_logprobs is None:
            raise ValueError(f"kl_coef={config.kl_coef}: wanted ref_logprobs [N], got None")
        if config.rollout_is_cap is not None and self.rollout_logprobs is None:
            cap = config.rollout_is_cap
            raise ValueError(f"rollout_is_cap={cap}: wanted rollout_logprobs [N], got None")
        if config.rollout_is_cap is not None and self.importance_weights is not None:
            cap = config.rollout_is_cap
            raise ValueError(
                f"importance_weights: wanted None beside rollout_is_cap={cap}, got a tensor"
            )

    @property
    def num_objectives(self) -> int:
        table = self.advantages if self.rewards is None else self.rewards
        assert table is not None
        return table.shape[1]

    def objectives_exist(self) -> Tensor | None:
        """[] bool: each token that counts is of an objective or -1. None: no tokens' objectives."""
        if self.token_objectives is None:
            return None
        kind = self.token_objectives
        exists = (kind >= -1) & (kind < self.num_objectives)
        return (exists | (self.targets == IGNORED_TARGET)).all()

    def check_values(self) -> None:
        """Raise ValueError for an objective that does not exist, where looking costs no sync."""
        exist = self.objectives_exist()
        if exist is None or exist.device.type != "cpu":
            return
        try:
            torch._assert_async(
                exist, ""
            )  # .item() of a tensor on the CPU, unseen by torch.compile
        except RuntimeError:
            assert self.token_objectives is not None
            kind = self.token_objectives[self.targets != IGNORED_TARGET]
            k = self.num_objectives
            wrong = next(value for value in kind.tolist() if not -1 <= value < k)
            raise ValueError(
                f"token_objectives: wanted -1, or an objective in [0, {k}), got {wrong}"
            ) from None

    def _check_weight_grad(self) -> None:
        if self.weight_grad is None:
            return
        if self.loss_scale is not None:  # the buffer would get the scaled gradient
            raise ValueError("weight_grad: wanted None beside loss_scale, got a tensor")
        shape = [("V", self.weight.shape[0]), ("H", self.weight.shape[1])]
        full = (statistics_dtype(self.hidden.dtype),)
        grad = check_tensor("weight_grad", self.weight_grad, shape, full, self.hidden.device)
        if not grad.is_contiguous() or grad.requires_grad:
            raise ValueError("weight_grad: wanted a contiguous tensor that needs no gradient")

    def _check_table(self) -> tuple[int, int]:
        """Check rewards, advantages and group_ids; return S and K."""
        if (self.rewards is None) == (self.advantages is None):
            got = "neither" if self.rewards is None else "both"
            raise ValueError(f"wanted exactly one of rewards and advantages, got {got}")
        name = "advantages" if self.rewards is None else "rewards"
        shape = [("S", None), ("K", None)]
        device = self.hidden.device
        s, k = check_tensor(name, getattr(self, name), shape, FULL_DTYPES, device).shape
        if k == 0 or (s == 0 and self.targets.shape[0] > 0):
            raise ValueError(f"{name}: wanted at least one sequence and objective, got {[s, k]}")
        if self.rewards is not None and self.group_ids is None:
            raise ValueError("rewards: wanted group_ids [S] beside them, got None")
        if self.group_ids is not None:
            check_tensor("group_ids", self.group_ids, [("S", s)], INTEGER_DTYPES, device)
        return s, k

    def _check_tokens(self) -> None:
        n, device = self.hidden.shape[0], self.hidden.device
        ids = INTEGER_DTYPES[:2]
        check_tensor("sequence_ids", self.sequence_ids, [("N", n)], ids, device)
        if self.token_objectives is not None:
            check_tensor(
                "token_objectives", self.token_objectives, [("N", n)], INTEGER_DTYPES, device
            )
        for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "importance_weights"):
            if (value := getattr(self, name)) is not None:
                check_tensor(name, value, [("N", n)], FULL_DTYPES, device)
