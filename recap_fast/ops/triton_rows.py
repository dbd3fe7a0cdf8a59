"""Launches the row kernels: `kernels/logprobs.py` and `kernels/policy_loss.py`.

Shapes: C rows of a chunk, N tokens, V vocabulary, S sequences, K objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recap_fast.kernels.logprobs import logprobs_kernel
from recap_fast.kernels.policy_loss import APPLIES, CLIPPED, policy_loss_kernel
from recap_fast.ops.arguments import LossArguments
from recap_fast.ops.chunked import Head, Swept
from recap_fast.ops.launch import launch
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.ops.rows import Diagnostics, RowGradient
from recap_fast.ops.tokens import TokenScales

KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}
BLOCK_SEQUENCES = 64
TILE = 2048
"""Rewards [sequences, objectives] of a block at most, so that registers hold them whatever K."""

MAX_REGISTERS = 128
"""Of a thread. Without a bound of ours the assembler spills a few to fit one more program."""
ALIGNMENT = 16
"""Triton moves 16 bytes at once where everything that indexes a row divides by this."""


@dataclass(frozen=True, slots=True)
class RowLaunch:
    """How a row kernel runs."""

    block: int  # columns
    group: int  # consecutive columns of a block that one thread holds
    warps: int
    registers: int = MAX_REGISTERS


# Static, so that no shape meets an untuned first call and nothing is tuned on live buffers.
LAUNCHES = {2: RowLaunch(16384, 8, 32, 64), 4: RowLaunch(8192, 4, 16, 64)}
"""By the bytes of a logit, for aligned rows. Not yet tuned on a GPU. 16 bytes a thread and load. A
program of 32 warps and 64 registers has a multiprocessor for itself, so that the 132 rows in flight
(40 MB of 16-bit logits) are still in the L2 cache for the second pass; float32 rows never fit."""
UNALIGNED_LAUNCHES = {2: RowLaunch(4096, 1, 8), 4: RowLaunch(2048, 1, 8)}
SMALL_WARPS = 4
"""For vocabularies of less than a block."""


def row_launch(logits: Tensor) -> RowLaunch:
    """The configuration for rows of logits [C, V]; smaller blocks for small vocabularies."""
    offsets = (logits.shape[1], logits.stride(0), logits.data_ptr())
    aligned = all(offset % ALIGNMENT == 0 for offset in offsets)
    best = (LAUNCHES if aligned else UNALIGNED_LAUNCHES)[logits.element_size()]
    columns = max(next_power_of_2(logits.shape[1]), ALIGNMENT)
    return best if columns >= best.block else RowLaunch(columns, best.group, SMALL_WARPS)


def next_power_of_2(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def rewards_block(num_objectives: int) -> int:
    """Sequences of a block of rewards [S, K]."""
    return min(BLOCK_SEQUENCES, max(1, TILE // next_power_of_2(num_objectives)))


def warps_for_tile(elements: int) -> int:
    """Warps for a tile of float64 that stays in registers, a power of 2: 4 elements a thread."""
    return min(max(1, elements // 128), 8)


def logprobs_rows(
    logits: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    *,
    temperature: float,
    softcap: float | None = None,
    gradient: Tensor | None = None,
    by_logprob: Tensor | None = None,
    by_entropy: Tensor | None = None,
    diagnostics: Diagnostics | None = None,
) -> None:
    """Fill logprobs [C], entropy [C] and `diagnostics` [C] from logits [C, V], rows contiguous.

    With `gradient` [C, V], which may be the logits, also by_logprob * d logprob + by_entropy * d H.
    """
    how = _row_arguments(logits, gradient, temperature, softcap)
    if diagnostics is not None:  # 64 would spill; the columns stay those of `linear_logprobs`
        how["maxnreg"] = MAX_REGISTERS
    launch(
        logprobs_kernel,
        (logits.shape[0],),
        logits.device,
        targets_ptr=targets.contiguous(),
        logprobs_ptr=logprobs,
        entropy_ptr=entropy,
        log_sum_sq_probs_ptr=None if diagnostics is None else diagnostics.log_sum_sq_probs,
        mean_logits_ptr=None if diagnostics is None else diagnostics.mean_logits,
        is_top1_ptr=None if diagnostics is None else diagnostics.is_top1,
        by_logprob_ptr=None if by_logprob is None else by_logprob.contiguous(),
        by_entropy_ptr=None if by_entropy is None else by_entropy.contiguous(),
        **how,
    )


def _row_arguments(
    logits: Tensor, gradient: Tensor | None, temperature: float, softcap: float | None
) -> dict[str, Any]:
    """What both row kernels are launched with: the rows [C, V], their scale, and how to run."""
    how = row_launch(logits)
    return {
        "logits_ptr": logits,
        "logits_stride": logits.stride(0),
        "gradient_ptr": gradient,
        "gradient_stride": 0 if gradient is None else gradient.stride(0),
        "size": logits.shape[1],
        "softcap": softcap or 1.0,
        "inverse_temperature": 1.0 / temperature,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_V": how.block,
        "GROUP": how.group,
        "num_warps": how.warps,
        "maxnreg": how.registers,
    }


class LogprobsRows:
    """`HeadStage` whose gradient's factors are known beforehand."""

    def __init__(
        self,
        head: Head,
        row_gradient: RowGradient | None = None,
        diagnostics: Diagnostics | None = None,
    ) -> None:
        self._head = head
        self._row_gradient = row_gradient
        self._diagnostics = diagnostics

    def run(self, logits: Tensor, rows: slice, gradient: Tensor | None, result: Swept) -> None:
        logprobs, entropy = result.logprobs[rows], result.entropy[rows]
        by_logprob = by_entropy = None
        if gradient is not None:
            assert self._row_gradient is not None
            by_logprob, by_entropy = self._row_gradient(rows, logprobs, entropy)
        logprobs_rows(
            logits,
            self._head.targets[rows],
            logprobs,
            entropy,
            temperature=self._head.temperature,
            softcap=self._head.softcap,
            gradient=gradient,
            by_logprob=by_logprob,
            by_entropy=by_entropy,
            diagnostics=None if self._diagnostics is None else self._diagnostics[rows],
        )


class PolicyRows:
    """`RowStage` that also computes the loss, token by token, and keeps its terms.

    Args:
        table: [S, K] float32: rewards where `group_ids` [S] are given, which the kernel turns into
            advantages, else advantages. NaN where absent.
    """

    def __init__(
        self,
        arguments: LossArguments,
        table: Tensor,
        group_ids: Tensor | None,
        scales: TokenScales,
        config: PolicyLossConfig,
    ) -> None:
        n, k = arguments.targets.shape[0], table.shape[1]
        self._arguments = arguments
        self._table = table.contiguous()
        self._group_ids = None if group_ids is None else group_ids.contiguous()
        self._scales = scales
        self._config = config

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=table.device)

        has_kl = arguments.ref_logprobs is not None
        self.kl = new(n) if has_kl else None
        self.penalty = new(n) if has_kl or config.entropy_coef != 0 else None
        has_weight = config.rollout_is_cap is not None
        self.rollout_weight = new(n) if has_weight else None
        self.is_bounded = new(n, dtype=torch.bool) if has_weight else None
        self._terms = new(n, k)
        self._applied = new(n, k, dtype=torch.int8)

    def run(self, logits: Tensor, rows: slice, gradient: Tensor | None, result: Swept) -> None:
        a, c = self._arguments, self._config

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows].contiguous()

        def part32(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows].float().contiguous()

        launch(
            policy_loss_kernel,
            (logits.shape[0],),
            logits.device,
            targets_ptr=part(a.targets),
            sequence_ids_ptr=part(a.sequence_ids),
            token_objectives_ptr=part(a.token_objectives),
            scale_ptr=part(self._scales.scale),
            table_ptr=self._table,
            group_ids_ptr=self._group_ids,
            denominators_ptr=self._scales.denominators,
            regulariser_ptr=self._scales.regulariser,
            weights_ptr=_float32(a.objective_weights),
            old_ptr=part32(a.old_logprobs),
            ref_ptr=part32(a.ref_logprobs),
            rollout_ptr=None if c.rollout_is_cap is None else part32(a.rollout_logprobs),
            importance_ptr=part32(a.importance_weights),
            loss_scale_ptr=_float32(a.loss_scale),
            logprobs_ptr=result.logprobs[rows],
            entropy_ptr=result.entropy[rows],
            kl_ptr=part(self.kl),
            penalty_ptr=part(self.penalty),
            rollout_weight_ptr=part(self.rollout_weight),
            is_bounded_ptr=part(self.is_bounded),
            terms_ptr=self._terms[rows],
            applied_ptr=self._applied[rows],
            num_sequences=self._table.shape[0],
            num_objectives=self._table.shape[1],
            lower=1.0 - c.clip_low,
            upper=1.0 + c.clip_high,
            unclipped_bound=float("inf") if c.clip_delta is None else c.clip_delta,
            rollout_min=c.rollout_is_min or 0.0,
            rollout_cap=c.rollout_is_cap or 0.0,
            kl_coef=c.kl_coef,
            entropy_coef=c.entropy_coef,
            CISPO=c.loss_type == "cispo",
            MASKS_ROLLOUT=c.rollout_is_mode == "mask",
            KL_ESTIMATOR=KL_ESTIMATORS[c.kl_estimator],
            HAS_ENTROPY=c.entropy_coef != 0,
            BLOCK_S=rewards_block(self._table.shape[1]),
            BLOCK_K=next_power_of_2(self._table.shape[1]),
            **_row_arguments(logits, gradient, c.temperature, c.logit_softcap),
        )

    def losses(self) -> tuple[Tensor, Tensor]:
        """L_k [K] and the share of its policy tokens for which the clip decides [K]."""
        applies = (self._applied >= APPLIES.value).sum(0).clamp(min=1)
        clipped = (self._applied == CLIPPED.value).sum(0).float()
        # Sums in a fixed order, so that runs are equal to the bit.
        return -self._terms.sum(0), clipped / applies


def _float32(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().float().contiguous()
