"""Log-probs and entropies of given targets.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recap_fast.ops import reference
from recap_fast.ops._autograd import refuse_double_backward
from recap_fast.ops._validate import (
    COMPUTE_DTYPES,
    check_head,
    check_scale,
    check_tensor,
    resolve_impl,
    statistics_dtype,
)
from recap_fast.ops.chunked import Wanted, make_head, sweep
from recap_fast.ops.rows import RowGradient, RowPass, blocks


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies under softcap(hidden @ weight.T + bias) / temperature.

    Holds the logits of a few tokens at a time and recomputes them in backward: 4 GEMMs in all.

    Args:
        hidden: [N, H] float32, bfloat16 or float64; already predicts `targets`. Its dtype is that
            of the GEMMs; weight and bias are cast to it.
        weight: [V, H].
        targets: [N] int64; -100 is ignored.
        bias: [V].
        temperature: divides the logits, after the softcap.
        logit_softcap: logits become cap * tanh(logits / cap).
        impl: "torch" (chunked), "reference" (eager, holds [N, V]), "triton", or "auto".

    Returns:
        logprobs [N] and entropy [N], in nats, float32 (float64 for float64 hidden), both
        differentiable once. Ignored targets give 0 and no gradient.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
        NotImplementedError: impl="triton".
        RuntimeError: double backward; impl="reference" has it.
    """
    hidden, weight, targets, bias = check_head(hidden, weight, targets, bias)
    check_scale(temperature, logit_softcap)
    if resolve_impl(impl) == "reference":
        return reference.linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=logit_softcap
        )
    operands = (hidden, weight, bias, targets, temperature, logit_softcap)
    logprobs, entropy = _LinearLogprobs.apply(*operands)
    return logprobs, entropy


def selective_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies under logits / temperature.

    Args:
        logits: [N, V] float32, bfloat16 or float64.
        targets: [N] int64; -100 is ignored.
        temperature: divides the logits.

    Returns:
        logprobs [N] and entropy [N], in nats, float32 (float64 for float64 logits), both
        differentiable once. Ignored targets give 0 and no gradient.

    Raises:
        ValueError: a wrong shape, dtype, device or number.
        RuntimeError: double backward.
    """
    logits = check_tensor("logits", logits, [("N", None), ("V", None)], COMPUTE_DTYPES)
    n, v = logits.shape
    if v == 0:
        raise ValueError(f"logits: wanted at least one vocabulary column, got {[n, v]}")
    targets = check_tensor("targets", targets, [("N", n)], (torch.int64,), logits.device)
    check_scale(temperature, None)
    logprobs, entropy = _SelectiveLogprobs.apply(logits, targets, temperature)
    return logprobs, entropy


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.scale = (temperature, softcap)
        swept = sweep(make_head(hidden, weight, bias, targets, temperature, softcap), Wanted())
        return swept.logprobs, swept.entropy

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Any, ...]:
        refuse_double_backward("linear_logprobs")
        rule = _given(by_logprob, by_entropy)
        if rule is None:
            return (None,) * 6
        hidden, weight, bias, targets = ctx.saved_tensors
        head = make_head(hidden, weight, bias, targets, *ctx.scale)
        swept = sweep(head, Wanted(*ctx.needs_input_grad[:3]), rule)
        return (
            swept.d_hidden,
            None if swept.d_weight is None else swept.d_weight.to(weight.dtype),
            None if swept.d_bias is None else swept.d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


class _SelectiveLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        return _pass_over(logits, targets, temperature)

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Any, ...]:
        refuse_double_backward("selective_logprobs")
        rule = _given(by_logprob, by_entropy)
        if rule is None:
            return (None,) * 3
        logits, targets = ctx.saved_tensors
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        _pass_over(logits, targets, ctx.temperature, rule, gradient)
        return gradient, None, None


def _given(by_logprob: Tensor | None, by_entropy: Tensor | None) -> RowGradient | None:
    """Row gradients [N] that autograd hands over; None for an output that was not used."""
    used = by_logprob if by_logprob is not None else by_entropy
    if used is None:
        return None
    first = used if by_logprob is not None else torch.zeros_like(used)

    def row_gradient(rows: slice, *_: Tensor) -> tuple[Tensor, Tensor | None]:
        return first[rows], None if by_entropy is None else by_entropy[rows]

    return row_gradient


def _pass_over(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    row_gradient: RowGradient | None = None,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of logits [N, V], their gradient into `gradient` [N, V]."""
    logprobs = logits.new_empty(logits.shape[0], dtype=statistics_dtype(logits.dtype))
    entropy = torch.empty_like(logprobs)
    row_pass = RowPass.allocate(logits, temperature, overwrite=False)
    for rows in blocks(logits, logits.shape[0]):
        out = None if gradient is None else gradient[rows]
        logprobs[rows], entropy[rows] = row_pass.run(
            logits[rows], targets[rows], rows, row_gradient, out
        )
    return logprobs, entropy
