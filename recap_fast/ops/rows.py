"""The element-wise passes over a few rows of logits: statistics, then the logits' gradient.

With z the scaled logits of a row, p = softmax(z), y its target and H its entropy:
    logprob = z_y - logsumexp(z)        d logprob / d z_j = [j = y] - p_j
    H = -sum_j p_j log p_j              d H / d z_j = -p_j (log p_j + H)

Shapes: R rows of a block, V vocabulary. A block is small enough for the passes to stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recap_fast.ops._validate import IGNORED_TARGET, statistics_dtype

BLOCK_ELEMENTS = {"cpu": 3 << 19, "cuda": 1 << 26}
"""Elements of a block. CPU: 6 MiB of float32, a compromise: smaller blocks stay nearer the core,
but each pass over one is a rendezvous of threads, dear on a busy machine. GPU: bounds scratch."""
NEGLIGIBLE = -200.0
"""exp of anything below is 0 in float32 (1e-87 in float64) beside a maximum of 1, and
0 * NEGLIGIBLE is 0 where 0 * -inf is NaN."""

RowGradient = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(rows, logprobs [R], entropy [R]) -> (d loss / d logprob [R], d loss / d entropy [R] or None)."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Statistics of N rows through which no gradient flows; see `TokenStatistics`."""

    log_sum_sq_probs: Tensor  # [N]
    mean_logits: Tensor  # [N]
    is_top1: Tensor  # [N] bool

    @classmethod
    def allocate(cls, like: Tensor) -> Diagnostics:
        """Places for those of rows [N, ...], such as hidden states."""
        values = like.new_empty(like.shape[0], dtype=statistics_dtype(like.dtype))
        return cls(values, torch.empty_like(values), torch.empty_like(values, dtype=torch.bool))

    def __getitem__(self, rows: slice) -> Diagnostics:
        return Diagnostics(self.log_sum_sq_probs[rows], self.mean_logits[rows], self.is_top1[rows])

    def take_logits(self, scaled: Tensor, targets: Tensor) -> None:
        """Fill what needs the scaled logits [N, V]."""
        torch.mean(scaled, -1, out=self.mean_logits)
        torch.eq(scaled.argmax(-1), targets, out=self.is_top1)

    def take_probs(self, probs: Tensor, logprobs: Tensor, valid: Tensor) -> None:
        """Fill the rest from probabilities [N, V], which are used up, and clear ignored rows."""
        self.log_sum_sq_probs.copy_(probs.square_().sum(-1).log_().where(valid, 0.0))
        self.mean_logits.copy_(self.mean_logits.where(valid, 0.0))
        self.is_top1.logical_and_(~logprobs.isnan())  # argmax takes NaN for the largest


@dataclass(frozen=True, slots=True)
class RowPass:
    """Scratch and constants of the passes over one block after another."""

    temperature: float
    softcap: float | None
    shifted: Tensor | None  # [R, V]; None: the logits are overwritten
    weights: Tensor  # [R, V]
    capped: Tensor | None  # [R, V], only with a softcap

    @classmethod
    def allocate(
        cls,
        logits: Tensor,
        temperature: float,
        softcap: float | None = None,
        *,
        overwrite: bool,
    ) -> RowPass:
        """Scratch for logits [C, V]; `overwrite` lets the passes use them as scratch too."""
        full = statistics_dtype(logits.dtype)
        rows = rows_of_block(logits)

        def scratch() -> Tensor:
            return torch.empty(rows, logits.shape[1], dtype=full, device=logits.device)

        return cls(
            temperature=temperature,
            softcap=softcap,
            shifted=None if overwrite and logits.dtype == full else scratch(),
            weights=scratch(),
            capped=None if softcap is None else scratch(),
        )

    def run(
        self,
        logits: Tensor,
        targets: Tensor,
        rows: slice,
        row_gradient: RowGradient | None = None,
        out: Tensor | None = None,
        diagnostics: Diagnostics | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [R] of logits [R, V]; their gradient into `out` [R, V].

        `rows` only names the rows to `row_gradient`. `out` may be `logits`. `diagnostics` [R] are
        filled where there is no gradient to make.
        """
        size = logits.shape[0]
        shifted = logits if self.shifted is None else self.shifted[:size].copy_(logits)
        weights = self.weights[:size]
        capped = None if self.capped is None else self.capped[:size]
        valid = targets != IGNORED_TARGET
        target = targets.where(valid, 0).unsqueeze(1)

        self._scale(shifted, capped)
        if diagnostics is not None:
            diagnostics.take_logits(shifted, targets)
        shifted -= shifted.amax(-1, keepdim=True)
        target_shifted = shifted.gather(1, target).squeeze(1)
        shifted.clamp_(min=NEGLIGIBLE)
        torch.softmax(shifted, -1, out=weights)
        # The largest weight is 1 / sum(exp(shifted)): well conditioned, cheaper than logsumexp.
        log_largest = weights.amax(-1).log()
        products = shifted.mul_(weights)
        logprobs = (target_shifted + log_largest).where(valid, 0.0)
        entropy = (-log_largest - products.sum(-1)).where(valid, 0.0)
        if row_gradient is None or out is None:
            if diagnostics is not None:
                diagnostics.take_probs(weights, logprobs, valid)
            return logprobs, entropy

        by_logprob, by_entropy = row_gradient(rows, logprobs, entropy)
        by_logprob = by_logprob.where(valid, 0.0)
        if by_entropy is None:
            weights.mul_(-by_logprob.unsqueeze(1))
        else:
            by_entropy = by_entropy.where(valid, 0.0)
            # log p_j = shifted_j + log_largest, and products_j = p_j * shifted_j.
            weights.mul_((-by_logprob - by_entropy * (entropy + log_largest)).unsqueeze(1))
            weights.addcmul_(products, by_entropy.unsqueeze(1), value=-1.0)
        weights.scatter_add_(1, target, by_logprob.unsqueeze(1))
        self._unscale(weights, capped)
        out.copy_(weights)
        return logprobs, entropy

    def _scale(self, values: Tensor, capped: Tensor | None) -> None:
        """Softcap, then temperature, in place; keep tanh(z / cap) in `capped`."""
        if self.softcap is not None and capped is not None:
            torch.mul(values, 1.0 / self.softcap, out=capped).tanh_()
            torch.mul(capped, self.softcap / self.temperature, out=values)
        elif self.temperature != 1.0:
            values.mul_(1.0 / self.temperature)

    def _unscale(self, gradient: Tensor, capped: Tensor | None) -> None:
        """Chain rule of `_scale`, in place; `capped` is used up."""
        if capped is not None:
            gradient.mul_(capped.square_().neg_().add_(1.0))
        if self.temperature != 1.0:
            gradient.mul_(1.0 / self.temperature)


def rows_of_block(logits: Tensor) -> int:
    """Rows R of a block of logits [C, V]."""
    kind = "cpu" if logits.device.type == "cpu" else "cuda"
    return max(1, min(logits.shape[0], BLOCK_ELEMENTS[kind] // logits.shape[1]))


def blocks(logits: Tensor, tokens: int) -> Iterator[slice]:
    """Consecutive blocks of the first `tokens` rows of logits [C, V]."""
    step = rows_of_block(logits)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))
