"""Everything about the tokens that is known before the first GEMM.

Shapes: N tokens, S sequences, K objectives.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from recap_fast.ops._validate import IGNORED_TARGET
from recap_fast.ops.arguments import LossArguments
from recap_fast.ops.loss_config import PolicyLossConfig


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Constants of each token in the loss. Shares are a_t / d_k, and 0 where k does not apply."""

    policy: Tensor  # [N] bool: policy-gradient token
    sequence: Tensor  # [N] int64
    advantages: Tensor  # [N, K]; 0 where k does not apply
    policy_share: Tensor  # [N, K]
    supervised_share: Tensor  # [N, K]
    regulariser_share: Tensor  # [N]: of KL and entropy
    old: Tensor | None  # [N]
    ref: Tensor | None  # [N]
    rollout: Tensor | None  # [N]
    importance: Tensor | None  # [N]
    weights: Tensor  # [K]: lambda_k / K
    policy_counts: Tensor  # [S]: policy tokens of each sequence

    def rows(self, rows: slice) -> TokenTable:
        """The same for some of the tokens."""
        cut = {
            f.name: getattr(self, f.name)[rows]
            for f in fields(self)
            if f.name not in ("weights", "policy_counts") and getattr(self, f.name) is not None
        }
        return replace(self, **cut)


@dataclass(frozen=True, slots=True)
class TokenScales:
    """How much each token counts. A token's share of L_k is a_t / d_k."""

    policy: Tensor  # [N] bool: policy-gradient token
    supervised: Tensor  # [N, K] bool: supervised token of k
    applies: Tensor  # [N, K] bool: policy token whose sequence has k
    sequence: Tensor  # [N] int64, 0 at ignored tokens
    scale: Tensor  # [N]: a_t
    denominators: Tensor  # [K]: d_k, at least 1
    regulariser: Tensor  # []: the denominator of KL and entropy, at least 1
    policy_counts: Tensor  # [S]: policy tokens of each sequence


def count(
    inputs: LossArguments, present: Tensor, config: PolicyLossConfig, dtype: torch.dtype
) -> TokenScales:
    """Scales and denominators from masks and presence [S, K] bool; denominators may be given."""
    num_sequences, k = present.shape
    valid = inputs.targets != IGNORED_TARGET
    # Ignored tokens may carry any sequence id, padding's -1 included.
    sequence = inputs.sequence_ids.long().where(valid, 0)
    if inputs.token_objectives is None:
        policy = valid
        supervised = valid.new_zeros(valid.shape[0], k)
    else:
        policy = valid & (inputs.token_objectives == -1)
        objectives = torch.arange(k, device=valid.device)
        supervised = valid.unsqueeze(1) & (inputs.token_objectives.unsqueeze(1) == objectives)
    applies = policy.unsqueeze(1) & present.index_select(0, sequence)

    def per_sequence(counted: Tensor) -> Tensor:
        return sum_over_sequences(counted.to(dtype), sequence, num_sequences)

    policy_counts = per_sequence(policy)
    by_token = config.aggregation == "token"
    if inputs.denominators is not None:
        denominators = inputs.denominators.detach().to(dtype)
    else:
        counts = per_sequence(applies | supervised)
        denominators = counts.sum(0) if by_token else (counts > 0).to(dtype).sum(0)
    regulariser = policy_counts.sum() if by_token else (policy_counts > 0).to(dtype).sum()
    if inputs.kl_denominator is not None:
        regulariser = regulariser.new_zeros(()) + inputs.kl_denominator
    return TokenScales(
        policy=policy,
        supervised=supervised,
        applies=applies,
        sequence=sequence,
        scale=_token_scale(per_sequence(valid), sequence, config),
        denominators=denominators.clamp(min=1),
        regulariser=regulariser.clamp(min=1),
        policy_counts=policy_counts,
    )


def tabulate(
    inputs: LossArguments, advantages: Tensor, present: Tensor, config: PolicyLossConfig
) -> TokenTable:
    """Spread advantages [S, K], presence [S, K] bool, scales and denominators over the tokens."""
    dtype = advantages.dtype
    scales = count(inputs, present, config, dtype)
    share = scales.scale.unsqueeze(1) / scales.denominators

    def full(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().to(dtype)

    weights = full(inputs.objective_weights)
    return TokenTable(
        policy=scales.policy,
        sequence=scales.sequence,
        advantages=advantages.index_select(0, scales.sequence).where(scales.applies, 0.0),
        policy_share=share.where(scales.applies, 0.0),
        supervised_share=share.where(scales.supervised, 0.0),
        regulariser_share=(scales.scale / scales.regulariser).where(scales.policy, 0.0),
        old=full(inputs.old_logprobs),
        ref=full(inputs.ref_logprobs),
        rollout=full(inputs.rollout_logprobs),
        importance=full(inputs.importance_weights),
        weights=(torch.ones_like(scales.denominators) if weights is None else weights)
        / present.shape[1],
        policy_counts=scales.policy_counts,
    )


def sum_over_sequences(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """[S, ...]: sums of values [N, ...] over the tokens of each sequence.

    In float64, where a sum, rounded, does not depend on the order in which a GPU adds.
    """
    sums = torch.zeros(num_sequences, *values.shape[1:], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, sequence, values.double()).to(values.dtype)


def _token_scale(lengths: Tensor, sequence: Tensor, config: PolicyLossConfig) -> Tensor:
    """a_t [N] from the number of not ignored tokens of each sequence [S]."""
    if config.aggregation == "sequence":
        return (1.0 / lengths.clamp(min=1)).index_select(0, sequence)
    scale = 1.0
    if config.aggregation == "constant":
        assert config.max_completion_length is not None
        scale = 1.0 / config.max_completion_length
    return lengths.new_full(sequence.shape, scale)
