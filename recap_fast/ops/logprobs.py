"""Log-probs and entropies of given targets.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recap_fast.ops import reference
from recap_fast.ops._autograd import empty_if_none, none_if_empty, refuse_double_backward
from recap_fast.ops._validate import (
    COMPUTE_DTYPES,
    check_head,
    check_scale,
    check_tensor,
    resolve_impl,
    statistics_dtype,
)
from recap_fast.ops.chunked import HeadStage, TorchRows, Wanted, make_head, sweep
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
        hidden: [N, H] float32, bfloat16, float16 or float64; already predicts `targets`. Its dtype
            is that of the GEMMs; weight and bias are cast to it.
        weight: [V, H].
        targets: [N] int64; -100 is ignored.
        bias: [V].
        temperature: divides the logits, after the softcap.
        logit_softcap: logits become cap * tanh(logits / cap).
        impl: "triton" (chunked, one kernel between the GEMMs), "torch" (chunked), "reference"
            (eager, holds [N, V]), or "auto": Triton on CUDA unless hidden is float64, else torch.
            An explicit name is run or refused, never replaced.

    Returns:
        logprobs [N] and entropy [N], in nats, float32 (float64 for float64 hidden), both
        differentiable once. Ignored targets give 0 and no gradient.

    Raises:
        ValueError: a wrong shape, dtype, device or number, or impl="triton" where it cannot run.
        RuntimeError: double backward; impl="reference" has it.
    """
    hidden, weight, targets, bias = check_head(hidden, weight, targets, bias)
    check_scale(temperature, logit_softcap)
    chosen = resolve_impl(impl, hidden.device, hidden.dtype)
    if chosen == "reference":
        return reference.linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=logit_softcap
        )
    logprobs, entropy = _linear_logprobs(
        hidden, weight, bias, targets, temperature, logit_softcap, chosen
    )
    return logprobs, entropy


def selective_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and entropies under logits / temperature.

    Args:
        logits: [N, V] float32, bfloat16, float16 or float64. Rows may be strided.
        targets: [N] int64; -100 is ignored.
        temperature: divides the logits.
        impl: "triton" (one kernel each way), "torch" (in blocks), "reference" (eager), or "auto":
            Triton on CUDA unless the logits are float64, else torch. An explicit name is run or
            refused, never replaced.

    Returns:
        logprobs [N] and entropy [N], in nats, float32 (float64 for float64 logits), both
        differentiable once. Ignored targets give 0 and no gradient.

    Raises:
        ValueError: a wrong shape, dtype, device or number, or impl="triton" where it cannot run.
        RuntimeError: double backward; impl="reference" has it.
    """
    logits = check_tensor("logits", logits, [("N", None), ("V", None)], COMPUTE_DTYPES)
    n, v = logits.shape
    if v == 0:
        raise ValueError(f"logits: wanted at least one vocabulary column, got {[n, v]}")
    targets = check_tensor("targets", targets, [("N", n)], (torch.int64,), logits.device)
    check_scale(temperature, None)
    chosen = resolve_impl(impl, logits.device, logits.dtype)
    if chosen == "reference":
        return reference.selective_logprobs(logits, targets, temperature)
    logprobs, entropy = _selective_logprobs(logits, targets, temperature, chosen)
    return logprobs, entropy


@torch.library.custom_op("recap_fast::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    head = make_head(hidden, weight, bias, targets, temperature, softcap)
    swept = sweep(head, Wanted(), _stage(impl)(head))
    return swept.logprobs, swept.entropy


@_linear_logprobs.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    logprobs = hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))
    return logprobs, torch.empty_like(logprobs)


@torch.library.custom_op("recap_fast::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    impl: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden, d_weight, d_bias; empty where not wanted."""
    head = make_head(hidden, weight, bias, targets, temperature, softcap)
    wanted = Wanted(want_hidden, want_weight, want_bias)
    swept = sweep(head, wanted, _stage(impl)(head, _given(by_logprob, by_entropy)))
    return (
        empty_if_none(swept.d_hidden, hidden),
        empty_if_none(swept.d_weight, weight).to(weight.dtype),
        empty_if_none(swept.d_bias, weight).to(weight.dtype if bias is None else bias.dtype),
    )


@_linear_logprobs_backward.register_fake
def _(
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    impl: str,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    operands = (hidden, weight, weight if bias is None else bias)
    return tuple(
        x.new_empty(x.shape if want else 0) for x, want in zip(operands, wanted, strict=True)
    )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _linear_backward(
    ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None
) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_logprobs")
    if by_logprob is None and by_entropy is None:
        return (None,) * 7
    gradients = _linear_logprobs_backward(
        by_logprob, by_entropy, *ctx.saved_tensors, *ctx.settings, *ctx.needs_input_grad[:3]
    )
    return (*(none_if_empty(gradient) for gradient in gradients), None, None, None, None)


_linear_logprobs.register_autograd(_linear_backward, setup_context=_save_linear)


@torch.library.custom_op("recap_fast::selective_logprobs", mutates_args=())
def _selective_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, impl: str
) -> tuple[Tensor, Tensor]:
    logprobs, entropy = _new_statistics(logits)
    _pass_over(logits, targets, temperature, impl, logprobs, entropy)
    return logprobs, entropy


@_selective_logprobs.register_fake
def _(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _new_statistics(logits)


@torch.library.custom_op("recap_fast::selective_logprobs_backward", mutates_args=())
def _selective_logprobs_backward(
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    impl: str,
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rule = _given(by_logprob, by_entropy)
    _pass_over(logits, targets, temperature, impl, *_new_statistics(logits), rule, gradient)
    return gradient


@_selective_logprobs_backward.register_fake
def _(by_logprob: Tensor | None, by_entropy: Tensor | None, logits: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_selective(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])
    ctx.settings = inputs[2:]


def _selective_backward(
    ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None
) -> tuple[Tensor | None, ...]:
    refuse_double_backward("selective_logprobs")
    if by_logprob is None and by_entropy is None:
        return (None,) * 4
    gradient = _selective_logprobs_backward(
        by_logprob, by_entropy, *ctx.saved_tensors, *ctx.settings
    )
    return gradient, None, None, None


_selective_logprobs.register_autograd(_selective_backward, setup_context=_save_selective)


def _stage(impl: str) -> type[HeadStage]:
    if impl == "torch":
        return TorchRows
    from recap_fast.ops.triton_rows import LogprobsRows

    return LogprobsRows


def _given(by_logprob: Tensor | None, by_entropy: Tensor | None) -> RowGradient:
    """Row gradients [N] that autograd hands over, at least one; None for an unused output."""
    if by_logprob is None:
        assert by_entropy is not None
        by_logprob = torch.zeros_like(by_entropy)
    first = by_logprob

    def row_gradient(rows: slice, *_: Tensor) -> tuple[Tensor, Tensor | None]:
        return first[rows], None if by_entropy is None else by_entropy[rows]

    return row_gradient


def _new_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Places for log-probs and entropies [N]."""
    logprobs = logits.new_empty(logits.shape[0], dtype=statistics_dtype(logits.dtype))
    return logprobs, torch.empty_like(logprobs)


def _pass_over(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    impl: str,
    logprobs: Tensor,
    entropy: Tensor,
    row_gradient: RowGradient | None = None,
    gradient: Tensor | None = None,
) -> None:
    """Fill logprobs and entropy [N] from logits [N, V], and their gradient [N, V]."""
    if impl == "triton":
        from recap_fast.ops.triton_rows import logprobs_rows

        rows_are_dense = logits.shape[1] == 1 or logits.stride(1) == 1
        factors: tuple[Tensor | None, Tensor | None] = (None, None)
        if row_gradient is not None:
            factors = row_gradient(slice(None), logprobs, entropy)
        logprobs_rows(
            logits if rows_are_dense else logits.contiguous(),
            targets,
            logprobs,
            entropy,
            temperature=temperature,
            gradient=gradient,
            by_logprob=factors[0],
            by_entropy=factors[1],
        )
        return
    row_pass = RowPass.allocate(logits, temperature, overwrite=False)
    for rows in blocks(logits, logits.shape[0]):
        out = None if gradient is None else gradient[rows]
        logprobs[rows], entropy[rows] = row_pass.run(
            logits[rows], targets[rows], rows, row_gradient, out
        )
