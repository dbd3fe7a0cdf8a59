"""The policy loss over a chunk of logits in one kernel: statistics, loss, and the logits' gradient.

One program per row. A row's statistics are one pass over its logits, everything about objectives is
a few vectors of K numbers, and the gradient is a second pass, which finds the row in the L2 cache.

Shapes: C rows of the chunk, V columns, S sequences, K objectives.
"""

import triton
import triton.language as tl

from recap_fast.kernels.advantages import STD, group_advantage
from recap_fast.kernels.logprobs import IGNORED_TARGET
from recap_fast.kernels.objective import (
    bounded_weight,
    clamped_exp,
    is_inside,
    kl_estimate,
    surrogate,
)
from recap_fast.kernels.softmax import in_nats, row_statistics, store_gradient, store_zeros

ADVANTAGE_EPS = tl.constexpr(1e-4)  # the default of `group_advantages`
POLICY = tl.constexpr(-1)  # in token_objectives
# What `applied` holds for a token and an objective.
ABSENT = tl.constexpr(0)
APPLIES = tl.constexpr(1)
CLIPPED = tl.constexpr(2)


# What varies from batch to batch must not compile anew where it happens to divide by 16.
@triton.jit(
    do_not_specialize=["num_sequences"],
    do_not_specialize_on_alignment=[
        "targets_ptr",
        "sequence_ids_ptr",
        "token_objectives_ptr",
        "scale_ptr",
        "table_ptr",
        "group_ids_ptr",
        "denominators_ptr",
        "regulariser_ptr",
        "weights_ptr",
        "old_ptr",
        "ref_ptr",
        "rollout_ptr",
        "importance_ptr",
        "loss_scale_ptr",
        "logprobs_ptr",
        "entropy_ptr",
        "kl_ptr",
        "penalty_ptr",
        "rollout_weight_ptr",
        "is_bounded_ptr",
        "terms_ptr",
        "applied_ptr",
    ],
)
def policy_loss_kernel(
    logits_ptr,  # [C, V], rows `logits_stride` apart
    logits_stride,
    gradient_ptr,  # [C, V] or None; may be the logits
    gradient_stride,
    targets_ptr,  # [C] int64
    sequence_ids_ptr,  # [C] int32 or int64
    token_objectives_ptr,  # [C] integers or None: all policy tokens
    scale_ptr,  # [C] float32: a_t
    table_ptr,  # [S, K] float32: advantages; rewards where group_ids are given. NaN: absent
    group_ids_ptr,  # [S] integers or None
    denominators_ptr,  # [K] float32, at least 1
    regulariser_ptr,  # [] float32, at least 1: the denominator of KL and entropy
    weights_ptr,  # [K] float32 lambda or None: 1
    old_ptr,  # [C] float32 log-probs, or None: on-policy
    ref_ptr,  # [C] float32 or None: no KL
    rollout_ptr,  # [C] float32 or None: no importance weight of the log-probs
    importance_ptr,  # [C] float32 or None: no importance weight that was given
    loss_scale_ptr,  # [] float32 or None: 1. Multiplies the gradient, not the loss
    logprobs_ptr,  # [C] float32, like the rest
    entropy_ptr,  # [C]
    kl_ptr,  # [C] or None
    penalty_ptr,  # [C] or None: what KL and entropy add to the loss
    rollout_weight_ptr,  # [C] or None without rollout_ptr: its importance weight
    is_bounded_ptr,  # [C] bool or None likewise: whether that was truncated or masked
    terms_ptr,  # [C, K] what the token adds to -L_k
    applied_ptr,  # [C, K] int8: ABSENT, APPLIES or CLIPPED
    size,  # V
    num_sequences,
    num_objectives,
    softcap,
    inverse_temperature,
    lower,  # 1 - clip_low
    upper,  # 1 + clip_high
    unclipped_bound,
    rollout_min,
    rollout_cap,
    kl_coef,
    entropy_coef,
    CISPO: tl.constexpr,
    MASKS_ROLLOUT: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * V passes 2^31
    objectives = tl.arange(0, BLOCK_K)
    is_objective = objectives < num_objectives
    cells = row * num_objectives + objectives
    target = tl.load(targets_ptr + row)
    if target == IGNORED_TARGET:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        if kl_ptr is not None:
            tl.store(kl_ptr + row, 0.0)
        if penalty_ptr is not None:
            tl.store(penalty_ptr + row, 0.0)
        if rollout_ptr is not None:
            tl.store(rollout_weight_ptr + row, 0.0)
            tl.store(is_bounded_ptr + row, False)
        tl.store(terms_ptr + cells, tl.zeros([BLOCK_K], tl.float32), mask=is_objective)
        tl.store(applied_ptr + cells, tl.zeros([BLOCK_K], tl.int8), mask=is_objective)
        if gradient_ptr is not None:
            store_zeros(gradient_ptr + row * gradient_stride, size, BLOCK_V)
        return

    # What is known of the token is loaded first: its latency hides behind the pass over the row.
    # Which objectives it serves, and how much of each it is: a_t / d_k.
    kind = POLICY
    if token_objectives_ptr is not None:
        kind = tl.load(token_objectives_ptr + row).to(tl.int32)
    is_policy = kind == POLICY
    sequence = tl.load(sequence_ids_ptr + row).to(tl.int64)
    if group_ids_ptr is not None:
        advantage, present = group_advantage(
            table_ptr,
            group_ids_ptr,
            sequence,
            num_sequences,
            num_objectives,
            ADVANTAGE_EPS,
            STD,
            BLOCK_K,
            BLOCK_S,
        )
    else:
        given = tl.load(
            table_ptr + sequence * num_objectives + objectives, mask=is_objective, other=0.0
        )
        present = is_objective & (given == given)
        advantage = tl.where(present, given, 0.0)
    applies = present & is_policy
    supervises = (objectives == kind) & is_objective
    scale = tl.load(scale_ptr + row)
    share = scale / tl.load(denominators_ptr + objectives, mask=is_objective, other=1.0)
    weight = 1.0 / num_objectives
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + objectives, mask=is_objective, other=0.0) * weight

    if old_ptr is not None:
        old = tl.load(old_ptr + row)
    if rollout_ptr is not None:
        rollout = tl.load(rollout_ptr + row)
    importance = 1.0
    if importance_ptr is not None:
        importance = tl.where(is_policy, tl.load(importance_ptr + row), 0.0)
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + row)

    row_ptr = logits_ptr + row * logits_stride
    statistics, _ = row_statistics(
        row_ptr, target, size, softcap, inverse_temperature, HAS_SOFTCAP, BLOCK_V, GROUP
    )
    logprob, entropy = in_nats(statistics)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)

    # The ratio to the old policy and its surrogate.
    ratio = tl.where(logprob == logprob, 1.0, logprob)  # NaN must show in the loss
    moves = tl.full([], True, tl.int1)
    if old_ptr is not None:
        log_ratio = tl.where(is_policy, logprob - old, 0.0)
        ratio = clamped_exp(log_ratio)
        moves = is_inside(log_ratio)
    value, slope, decides = surrogate(
        ratio, advantage, logprob, lower, upper, unclipped_bound, CISPO
    )
    if rollout_ptr is not None:
        if old_ptr is not None:
            gap = tl.where(is_policy, old - rollout, 0.0)
        else:
            gap = tl.where(is_policy, logprob - rollout, 0.0)
        importance, is_bounded = bounded_weight(
            clamped_exp(gap), rollout_min, rollout_cap, MASKS_ROLLOUT
        )
        tl.store(rollout_weight_ptr + row, tl.where(is_policy, importance, 0.0))
        tl.store(is_bounded_ptr + row, is_bounded & is_policy)
    gain = tl.where(applies, share * importance * value, 0.0)
    terms = tl.where(supervises, share * logprob, gain)
    tl.store(terms_ptr + cells, terms, mask=is_objective)
    state = tl.where(applies, tl.where(decides, CLIPPED, APPLIES), ABSENT)
    tl.store(applied_ptr + cells, state.to(tl.int8), mask=is_objective)

    # d loss / d logprob and d loss / d entropy.
    by_policy = tl.sum(tl.where(applies, share * weight * slope, 0.0), axis=0) * importance
    if not CISPO:
        by_policy = tl.where(moves, by_policy, 0.0)
    by_logprob = -by_policy - tl.sum(tl.where(supervises, share * weight, 0.0), axis=0)
    by_entropy = 0.0
    if penalty_ptr is not None:
        regulariser = tl.where(is_policy, scale / tl.load(regulariser_ptr), 0.0)
        penalty = 0.0
        if HAS_ENTROPY:
            by_entropy = -entropy_coef * regulariser
            penalty = by_entropy * entropy
        if ref_ptr is not None:
            kl, kl_slope = kl_estimate(tl.where(is_policy, ref - logprob, 0.0), KL_ESTIMATOR)
            kl = tl.where(is_policy, kl, 0.0)
            tl.store(kl_ptr + row, kl)
            if kl_coef != 0.0:
                penalty += kl_coef * regulariser * kl
                by_logprob += kl_coef * regulariser * kl_slope
        tl.store(penalty_ptr + row, penalty)

    if loss_scale_ptr is not None:
        loss_scale = tl.load(loss_scale_ptr)
        by_logprob *= loss_scale
        if HAS_ENTROPY:
            by_entropy *= loss_scale

    if gradient_ptr is not None:
        if (by_logprob == 0.0) & (by_entropy == 0.0):
            store_zeros(gradient_ptr + row * gradient_stride, size, BLOCK_V)
        else:
            store_gradient(
                row_ptr, gradient_ptr + row * gradient_stride, target, by_logprob, by_entropy,
                statistics, size, softcap, inverse_temperature, HAS_SOFTCAP, HAS_ENTROPY, BLOCK_V,
            )  # fmt: skip
