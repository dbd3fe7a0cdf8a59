"""Log-probs and entropies of given targets, and more statistics of their distributions.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recap_fast.ops import reference
from recap_fast.ops._autograd import none_if_empty, refuse_double_backward
from recap_fast.ops._validate import (
    COMPUTE_DTYPES,
    check_head,
    check_scale,
    check_tensor,
    resolve_impl,
    statistics_dtype,
)
from recap_fast.ops.autocast import follow_autocast
from recap_fast.ops.chunked import HeadStage, TorchRows, Wanted, make_head, sweep
from recap_fast.ops.output import TokenStatistics
from recap_fast.ops.rows import Diagnostics, RowGradient, RowPass, blocks


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
            is that of the GEMMs; weight and bias are cast to it. Under torch.autocast it is cast
            first, as torch.nn.functional.linear casts it.
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
    hidden, chosen = _checked(hidden, weight, targets, bias, temperature, logit_softcap, impl)
    if chosen == "reference":
        return reference.linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=logit_softcap
        )
    logprobs, entropy = _linear_logprobs(
        hidden, weight, bias, targets, temperature, logit_softcap, chosen
    )
    return logprobs, entropy


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    impl: str = "auto",
) -> TokenStatistics:
    """`linear_logprobs`, and what else the same pass over the logits can tell without a gradient.

    The GEMMs and the memory are those of `linear_logprobs`, and so are all arguments and errors.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64; follows torch.autocast.
        weight: [V, H].
        targets: [N] int64; -100 is ignored.
        bias: [V].
        temperature: divides the logits, after the softcap.
        logit_softcap: logits become cap * tanh(logits / cap).
        impl: "triton", "torch", "reference" or "auto".

    Returns:
        TokenStatistics: five tensors [N]; logprobs and entropy are differentiable once.

    Raises:
        ValueError: a wrong shape, dtype, device or number, or impl="triton" where it cannot run.
        RuntimeError: double backward; impl="reference" has it.
    """
    hidden, chosen = _checked(hidden, weight, targets, bias, temperature, logit_softcap, impl)
    if chosen == "reference":
        return reference.linear_token_statistics(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=logit_softcap
        )
    return TokenStatistics(
        *_linear_token_statistics(hidden, weight, bias, targets, temperature, logit_softcap, chosen)
    )


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


def _checked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    impl: str,
) -> tuple[Tensor, str]:
    """Hidden as the GEMMs take it, and the implementation to run, after all checks."""
    check_head(hidden, weight, targets, bias)
    check_scale(temperature, logit_softcap)
    hidden = follow_autocast(hidden)
    return hidden, resolve_impl(impl, hidden.device, hidden.dtype)


_OPERANDS = """
    Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, float? softcap,
    str impl"""


@torch.library.custom_op(
    "recap_fast::linear_logprobs", mutates_args=(), schema=f"({_OPERANDS}) -> (Tensor, Tensor)"
)
def _linear_logprobs(*operands: Any) -> tuple[Tensor, Tensor]:
    head, impl = make_head(*operands[:-1]), operands[-1]
    swept = sweep(head, Wanted(), _stage(impl)(head))
    return swept.logprobs, swept.entropy


@_linear_logprobs.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _new_statistics(hidden)


@torch.library.custom_op(
    "recap_fast::linear_token_statistics",
    mutates_args=(),
    schema=f"({_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_token_statistics(*operands: Any) -> tuple[Tensor, ...]:
    head, impl = make_head(*operands[:-1]), operands[-1]
    found = Diagnostics.allocate(head.hidden)
    swept = sweep(head, Wanted(), _stage(impl)(head, diagnostics=found))
    return (
        swept.logprobs,
        swept.entropy,
        found.log_sum_sq_probs,
        found.mean_logits,
        found.is_top1,
    )


@_linear_token_statistics.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    found = Diagnostics.allocate(hidden)
    return (
        *_new_statistics(hidden),
        found.log_sum_sq_probs,
        found.mean_logits,
        found.is_top1,
    )


@torch.library.custom_op(
    "recap_fast::linear_logprobs_backward",
    mutates_args=(),
    schema=f"(Tensor? by_logprob, Tensor? by_entropy, {_OPERANDS}, bool want_hidden,"
    f" bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)",
)
def _linear_logprobs_backward(
    by_logprob: Tensor | None, by_entropy: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden, d_weight, d_bias; empty where not wanted."""
    *operands, impl, want_hidden, want_weight, want_bias = others
    head = make_head(*operands)
    wanted = Wanted(want_hidden, want_weight, want_bias)
    swept = sweep(head, wanted, _stage(impl)(head, _given(by_logprob, by_entropy)))
    return swept.gradients(*operands[:3])


@_linear_logprobs_backward.register_fake
def _(
    by_logprob: Tensor | None, by_entropy: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return Wanted(*others[-3:]).fake_gradients(*others[:3])


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


def _differentiate(
    operator: Any, name: str, num_tensors: int, backward: Callable[..., Sequence[Tensor]]
) -> None:
    """Registers the backward pass of an operator that returns log-probs and entropies [N] first.

    Args:
        num_tensors: how many of its inputs, the first, are tensors; the others are settings.
        backward: from the gradients of these two (None: of none), the inputs, and for each of
            them whether its gradient is wanted, to the gradients of the first of them.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:num_tensors])
        ctx.settings = inputs[num_tensors:]

    def run(ctx: Any, *by_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward(name)
        inputs = (*ctx.saved_tensors, *ctx.settings)
        gradients: list[Tensor | None] = []
        if any(gradient is not None for gradient in by_outputs[:2]):
            made = backward(*by_outputs[:2], inputs, ctx.needs_input_grad)
            gradients = [none_if_empty(gradient) for gradient in made]
        return (*gradients, *(None for _ in inputs[len(gradients) :]))

    operator.register_autograd(run, setup_context=save)


for _operator, _name in (
    (_linear_logprobs, "linear_logprobs"),
    (_linear_token_statistics, "linear_token_statistics"),
):
    _differentiate(
        _operator,
        _name,
        4,
        lambda by_logprob, by_entropy, inputs, wanted: _linear_logprobs_backward(
            by_logprob, by_entropy, *inputs, *wanted[:3]
        ),
    )
_differentiate(
    _selective_logprobs,
    "selective_logprobs",
    2,
    lambda by_logprob, by_entropy, inputs, wanted: [
        _selective_logprobs_backward(by_logprob, by_entropy, *inputs)
    ],
)


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


def _new_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Places for log-probs and entropies [N] of hidden states or logits [N, ...]."""
    logprobs = rows.new_empty(rows.shape[0], dtype=statistics_dtype(rows.dtype))
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
