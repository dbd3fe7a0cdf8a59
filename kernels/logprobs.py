"""Log-prob and entropy of each row of logits, and their gradient. One program per row.

Shapes: C rows, V columns.
"""

import triton
import triton.language as tl

from recap_fast.kernels.softmax import LN_2, in_nats, row_statistics, store_gradient, store_zeros

IGNORED_TARGET = tl.constexpr(-100)


@triton.jit(
    do_not_specialize_on_alignment=[
        "targets_ptr",
        "logprobs_ptr",
        "entropy_ptr",
        "log_sum_sq_probs_ptr",
        "mean_logits_ptr",
        "is_top1_ptr",
        "by_logprob_ptr",
        "by_entropy_ptr",
    ],
)
def logprobs_kernel(
    logits_ptr,  # [C, V], rows `logits_stride` apart
    logits_stride,
    targets_ptr,  # [C] int64
    logprobs_ptr,  # [C] float32
    entropy_ptr,  # [C] float32
    log_sum_sq_probs_ptr,  # [C] float32 or None: no diagnostics
    mean_logits_ptr,  # [C] float32, with the former
    is_top1_ptr,  # [C] bool, with the former
    gradient_ptr,  # [C, V] or None: statistics only. May be the logits.
    gradient_stride,
    by_logprob_ptr,  # [C] float32 or None: 0
    by_entropy_ptr,  # [C] float32 or None: 0
    size,  # V
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
):
    """With a gradient, both gradients' factors come from outside: backward passes.

    Diagnostics come without a gradient.
    """
    HAS_DIAGNOSTICS: tl.constexpr = log_sum_sq_probs_ptr is not None
    row = tl.program_id(0).to(tl.int64)  # row * V passes 2^31
    row_ptr = logits_ptr + row * logits_stride
    target = tl.load(targets_ptr + row)
    if target == IGNORED_TARGET:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        if HAS_DIAGNOSTICS:
            tl.store(log_sum_sq_probs_ptr + row, 0.0)
            tl.store(mean_logits_ptr + row, 0.0)
            tl.store(is_top1_ptr + row, False)
        if gradient_ptr is not None:
            store_zeros(gradient_ptr + row * gradient_stride, size, BLOCK_V)
    else:
        statistics, diagnostics = row_statistics(
            row_ptr, target, size, softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_V, GROUP,
            HAS_DIAGNOSTICS,
        )  # fmt: skip
        logprob, entropy = in_nats(statistics)
        tl.store(logprobs_ptr + row, logprob)
        tl.store(entropy_ptr + row, entropy)
        if HAS_DIAGNOSTICS:
            log_squares, logits_sum, is_top1 = diagnostics
            tl.store(log_sum_sq_probs_ptr + row, log_squares * LN_2)
            tl.store(mean_logits_ptr + row, logits_sum / size * inverse_temperature)
            # Maxima leave NaN out.
            tl.store(is_top1_ptr + row, is_top1 & (logprob == logprob))
        if gradient_ptr is not None:
            by_logprob = 0.0
            by_entropy = 0.0
            if by_logprob_ptr is not None:
                by_logprob = tl.load(by_logprob_ptr + row)
            if by_entropy_ptr is not None:
                by_entropy = tl.load(by_entropy_ptr + row)
            store_gradient(
                row_ptr, gradient_ptr + row * gradient_stride, target, by_logprob, by_entropy,
                statistics, size, softcap, inverse_temperature, HAS_SOFTCAP,
                by_entropy_ptr is not None, BLOCK_V,
            )  # fmt: skip
