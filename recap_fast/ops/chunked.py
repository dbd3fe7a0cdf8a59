"""The chunk loop: logits of a few tokens at a time, statistics, and gradients where wanted.

A sweep runs one GEMM for the logits of each chunk and, where gradients are wanted, overwrites the
logits with their gradient and runs one GEMM each for hidden and weight. Nothing of size [N, V]
ever exists.

Shapes: N tokens, H hidden, V vocabulary, C tokens of a chunk. C depends on V and the device only,
so a token meets the same arithmetic whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from recap_fast.ops._autograd import empty_if_none
from recap_fast.ops._validate import statistics_dtype
from recap_fast.ops.rows import Diagnostics, RowGradient, RowPass, blocks

CHUNK_ELEMENTS = {"cpu": 37_800_000, "cuda": 625_000_000}
"""Logits of a chunk, whatever N is. Each chunk adds its dW to a float32 sum, a read and a write of
[V, H] that costs more than all element-wise passes unless chunks are few. CPU: 72 MiB of bfloat16
logits. CUDA: 4096 rows of a vocabulary of 152k (docs/performance.md)."""
GEMM_TILE = 128
"""Rows of a chunk are a multiple of it where they are more: 691 rows were slower than 512."""
HALF_SUM_CHUNKS = 3
"""Chunks whose dW a CPU sums in bfloat16. Its GEMM adds in float32 and rounds once, so c chunks
leave a rounding error of variance (1 + 2 + ... + c) / c; a float32 sum of the bfloat16 products
that torch's GEMM gives, rounded at the end, leaves 2. They are equal at 3."""
WEIGHT_ROWS = 4096
"""Rows of the weight gradient that one bfloat16 CPU GEMM makes before they are added in float32."""


@dataclass(frozen=True, slots=True)
class Head:
    """Operands of logits = softcap(hidden @ weight.T + bias) / temperature, in one dtype."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] int64
    temperature: float
    softcap: float | None
    bfloat16_logits: bool
    gradient_dtype: torch.dtype  # what the weight's gradient is cast to

    @property
    def gemm_dtype(self) -> torch.dtype:
        """What the logits' GEMM leaves. torch's CPU GEMMs leave the dtype of their operands."""
        is_half = self.hidden.dtype in (torch.bfloat16, torch.float16)
        if is_half and self.hidden.is_cuda and not self.bfloat16_logits:
            return torch.float32
        return self.hidden.dtype

    def weight_sum_dtype(self, chunks: int) -> torch.dtype:
        """In what dtype the weight's gradient is summed over chunks."""
        is_half = self.hidden.dtype == self.gradient_dtype == torch.bfloat16
        if is_half and self.hidden.device.type == "cpu" and chunks <= HALF_SUM_CHUNKS:
            return torch.bfloat16
        return statistics_dtype(self.hidden.dtype)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients a sweep makes."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def any(self) -> bool:
        return self.hidden or self.weight or self.bias

    def fake_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `Swept.gradients` gives, by shape and dtype only."""
        bias = weight if bias is None else bias
        dtype = weight_dtype or weight.dtype
        return (
            hidden.new_empty(hidden.shape if self.hidden else 0),
            weight.new_empty(weight.shape if self.weight else 0, dtype=dtype),
            bias.new_empty(bias.shape if self.bias else 0),
        )


@dataclass(frozen=True, slots=True)
class Swept:
    """Result of a sweep."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    d_hidden: Tensor | None  # [N, H], dtype of hidden
    d_weight: Tensor | None  # [V, H], dtype of `Head.weight_sum_dtype`
    d_bias: Tensor | None  # [V], in the statistics' dtype

    def gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the operands in their dtypes, the weight's in `weight_dtype` if that is given;
        empty where there is none, for operators."""
        bias = weight if bias is None else bias
        return (
            empty_if_none(self.d_hidden, hidden),
            empty_if_none(self.d_weight, weight).to(weight_dtype or weight.dtype),
            empty_if_none(self.d_bias, bias).to(bias.dtype),
        )

    @classmethod
    def allocate(
        cls, head: Head, wanted: Wanted, chunks: int, weight_grad: Tensor | None = None
    ) -> Swept:
        (n, h), v = head.hidden.shape, head.weight.shape[0]
        full = statistics_dtype(head.hidden.dtype)
        device = head.hidden.device
        # The first chunk writes d_weight without reading it; without tokens there is none.
        new = torch.empty if n else torch.zeros
        if wanted.weight and weight_grad is None:
            weight_grad = new(v, h, dtype=head.weight_sum_dtype(chunks), device=device)
        return cls(
            logprobs=torch.empty(n, dtype=full, device=device),
            entropy=torch.empty(n, dtype=full, device=device),
            d_hidden=head.hidden.new_empty(n, h) if wanted.hidden else None,
            d_weight=weight_grad if wanted.weight else None,
            d_bias=torch.zeros(v, dtype=full, device=device) if wanted.bias else None,
        )


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logits_dtype: str = "float32",
    weight_grad_dtype: torch.dtype | None = None,
) -> Head:
    """Bring weight and bias to hidden's dtype: fp32 master weights are cast once a call.

    float64 hidden, which asks for exactness, keeps float64 logits whatever `logits_dtype`.
    """
    return Head(
        hidden=hidden.detach(),
        weight=weight.detach().to(hidden.dtype),
        bias=None if bias is None else bias.detach().to(hidden.dtype),
        targets=targets,
        temperature=temperature,
        softcap=softcap,
        bfloat16_logits=logits_dtype == "bfloat16" and hidden.dtype != torch.float64,
        gradient_dtype=weight_grad_dtype or weight.dtype,
    )


class RowStage(Protocol):
    """What happens to a chunk of logits between its GEMMs."""

    def run(self, logits: Tensor, rows: slice, gradient: Tensor | None, result: Swept) -> None:
        """Write `rows` of result.logprobs and result.entropy from logits [C, V], and the gradient.

        `gradient` [C, V], in the dtype of hidden, may be the logits themselves. The logits are not
        read again.
        """


class HeadStage(RowStage, Protocol):
    """A stage made of the head, and of how the loss depends on each row or of more to find out."""

    def __init__(
        self,
        head: Head,
        row_gradient: RowGradient | None = None,
        diagnostics: Diagnostics | None = None,
    ) -> None: ...


class TorchRows:
    """`HeadStage` of torch operations."""

    def __init__(
        self,
        head: Head,
        row_gradient: RowGradient | None = None,
        diagnostics: Diagnostics | None = None,
    ) -> None:
        self._head = head
        self._row_gradient = row_gradient
        self._diagnostics = diagnostics
        self._pass: RowPass | None = None

    def run(self, logits: Tensor, rows: slice, gradient: Tensor | None, result: Swept) -> None:
        if self._pass is None:  # the first chunk is the largest
            scale = (self._head.temperature, self._head.softcap)
            self._pass = RowPass.allocate(logits, *scale, overwrite=True)
        for block in blocks(logits, logits.shape[0]):
            at = slice(rows.start + block.start, rows.start + block.stop)
            result.logprobs[at], result.entropy[at] = self._pass.run(
                logits[block],
                self._head.targets[at],
                at,
                None if gradient is None else self._row_gradient,
                None if gradient is None else gradient[block],
                None if self._diagnostics is None else self._diagnostics[at],
            )


@torch.no_grad()
def sweep(head: Head, wanted: Wanted, stage: RowStage, weight_grad: Tensor | None = None) -> Swept:
    """Visit every chunk once: 1 GEMM, and one more for each of hidden and weight if wanted.

    `weight_grad` [V, H] is added to, and becomes the result's d_weight.
    """
    n, v = head.hidden.shape[0], head.weight.shape[0]
    device, dtype = head.hidden.device, head.gemm_dtype
    chunk = max(1, min(n, chunk_rows(v, device)))
    result = Swept.allocate(head, wanted, ceil(n / chunk), weight_grad)
    logits = torch.empty(chunk, v, dtype=dtype, device=device)
    gradient = None
    if wanted.any():
        same = dtype == head.hidden.dtype
        gradient = logits if same else torch.empty_like(logits, dtype=head.hidden.dtype)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            tokens = rows.stop - start
            _logits_gemm(head, rows, logits[:tokens])
            part = None if gradient is None else gradient[:tokens]
            stage.run(logits[:tokens], rows, part, result)
            if part is not None:
                is_first = start == 0 and weight_grad is None
                _add_gradients(head, rows, part, result, is_first)
    return result


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens C of a chunk."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    rows = max(1, CHUNK_ELEMENTS[kind] // vocabulary)
    return rows - rows % GEMM_TILE if rows > GEMM_TILE else rows


def _logits_gemm(head: Head, rows: slice, out: Tensor) -> None:
    hidden, weight = head.hidden[rows], head.weight.t()
    if out.dtype != hidden.dtype:  # CUDA: bfloat16 operands, float32 result
        torch.mm(hidden, weight, out_dtype=out.dtype, out=out)
        if head.bias is not None:
            out += head.bias
    elif head.bias is not None:
        torch.addmm(head.bias, hidden, weight, out=out)
    else:
        torch.mm(hidden, weight, out=out)
    if head.bfloat16_logits and out.dtype != torch.bfloat16:
        out.copy_(out.bfloat16())


def _add_gradients(
    head: Head, rows: slice, gradient: Tensor, result: Swept, is_first: bool
) -> None:
    """GEMMs of one chunk from its logits' gradient [C, V]."""
    hidden = head.hidden[rows]
    if result.d_hidden is not None:
        torch.mm(gradient, head.weight, out=result.d_hidden[rows])
    if result.d_weight is not None:
        _accumulate_weight(result.d_weight, gradient, hidden, is_first)
    if result.d_bias is not None:
        result.d_bias.add_(gradient.sum(0, dtype=result.d_bias.dtype))


def _accumulate_weight(total: Tensor, gradient: Tensor, hidden: Tensor, is_first: bool) -> None:
    """total [V, H] += gradient [C, V].T @ hidden [C, H], summed over chunks in total's dtype."""
    beta = 0.0 if is_first else 1.0
    if total.dtype == hidden.dtype:
        torch.addmm(total, gradient.t(), hidden, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:  # torch's CPU GEMM has no float32 result for bfloat16 operands
        part = hidden.new_empty(min(WEIGHT_ROWS, total.shape[0]), total.shape[1])
        for start in range(0, total.shape[0], WEIGHT_ROWS):
            some = total[start : start + WEIGHT_ROWS]
            columns = gradient[:, start : start + WEIGHT_ROWS]
            product = torch.mm(columns.t(), hidden, out=part[: some.shape[0]])
            if is_first:
                some.copy_(product)
            else:
                some.add_(product)
