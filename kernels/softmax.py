"""What the kernels over rows of logits share: capped logits, their statistics, their gradient.

With z the scaled logits of a row, p = softmax(z), y its target and H its entropy:
    logprob = z_y - logsumexp(z)        d logprob / d z_j = [j = y] - p_j
    H = -sum_j p_j log p_j              d H / d z_j = -p_j (log p_j + H)
The gradient needs no second pass over anything but the logits: both statistics are scalars.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# 2 to anything below is 0 in float32, and 0 * NEGLIGIBLE is 0 where 0 * -inf is NaN.
NEGLIGIBLE = tl.constexpr(-200.0)


@triton.jit
def tanh(x):
    """tanh to float32 accuracy; the hardware's own approximation has 11 bits."""
    square = x * x
    # Near 0 the exponential form cancels: x * P(x^2), a least-squares fit on |x| < 0.6.
    small = 2.2652063e-3
    small = small * square - 8.3006471e-3
    small = small * square + 2.1746589e-2
    small = small * square - 5.3954449e-2
    small = small * square + 1.3333261e-1
    small = small * square - 3.3333331e-1
    small = x + x * square * small
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0, -large, large))


@triton.jit
def load_capped(row_ptr, columns, size, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits at `columns` after the softcap, -inf past the row's end, and their slope."""
    inside = columns < size
    logits = tl.load(row_ptr + columns, mask=inside, other=float("-inf"))
    return cap(logits, inside, softcap, HAS_SOFTCAP)


@triton.jit
def cap(logits, inside, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits in float32 after the softcap, -inf where not `inside`, and the softcap's slope."""
    z = logits.to(tl.float32)
    slope = 1.0
    if HAS_SOFTCAP:
        bent = tanh(z / softcap)
        z = tl.where(inside, softcap * bent, float("-inf"))
        slope = 1.0 - bent * bent
    return z, slope


@triton.jit
def row_statistics(
    row_ptr,
    target,
    size,
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_DIAGNOSTICS: tl.constexpr = False,
):
    """One pass over a row. Returns the statistics that the gradient needs: the peak, log2 of the
    sum of p / p_peak, log2 p_target, the entropy in bits, the slope of the softcap at the target.
    And the diagnostics, if asked for: log2 of the sum of p^2, the sum of the capped logits, and
    whether the target is the first of the largest.

    The peak is the largest capped logit. Exponents are base 2, which is what the hardware computes:
    bits = (z - peak) * log2(e) / temperature. Subtracting first keeps large logits exact.
    """
    # GROUP consecutive columns belong to one thread and share a running peak, so that the loop has
    # neither shuffles nor barriers, and one rescaling for all of them.
    LANES: tl.constexpr = BLOCK_V // GROUP
    offsets = tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    to_bits = inverse_temperature * LOG2_E
    peak = tl.full([LANES], float("-inf"), tl.float32)
    # Read before the reductions below, whose barriers keep other warps from overwriting the row.
    # No target of this vocabulary: NaN, where an index error would have to wait for the device.
    known = (target >= 0) & (target < size)
    column = tl.where(known, target, 0)
    z_target, target_slope = load_capped(row_ptr, column, size, softcap, HAS_SOFTCAP)
    z_target = tl.where(known, z_target, float("nan"))
    total = tl.zeros([LANES], tl.float32)  # of 2^bits
    moment = tl.zeros([LANES], tl.float32)  # of 2^bits * bits
    if HAS_DIAGNOSTICS:
        squares = tl.zeros([LANES], tl.float32)  # of 4^bits
        plain = tl.zeros([LANES], tl.float32)  # of capped logits
        # The largest logit before the target: of whole groups in the loop, of its own group here.
        ends = tl.arange(1, LANES + 1) * GROUP
        place = column.to(tl.int32)  # half the registers
        own = place - place % GROUP + tl.arange(0, GROUP)
        z_own = load_capped(row_ptr, own, size, softcap, HAS_SOFTCAP)[0]
        rival = tl.max(tl.where(own < place, z_own, float("-inf")), axis=0)
        rivals = tl.full([LANES], float("-inf"), tl.float32)
    # 16-bit logits are loaded while the block before is worked on. As they lie in memory they take
    # few registers; left to itself, the assembler waits for every 16-byte load of threads of 64
    # registers. float32 logits would spill; their loads, and the narrow ones of rows that are not
    # aligned (GROUP is 1), are under way together as it is.
    AHEAD: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth == 16 and GROUP > 1
    if AHEAD:
        packed = tl.load(row_ptr + offsets, mask=offsets < size, other=float("-inf"))
    for start in range(0, size, BLOCK_V):
        columns = start + offsets
        if AHEAD:
            z, _ = cap(packed, columns < size, softcap, HAS_SOFTCAP)
            columns += BLOCK_V
            packed = tl.load(row_ptr + columns, mask=columns < size, other=float("-inf"))
        else:
            z, _ = load_capped(row_ptr, columns, size, softcap, HAS_SOFTCAP)
        highest = tl.maximum(peak, tl.max(z, axis=1))
        if HAS_DIAGNOSTICS:
            # No group lies across the end: it is of one column, or divides the size.
            plain += tl.where(start + ends <= size, tl.sum(z, axis=1), 0.0)
            rivals = tl.where(start + ends <= place, highest, rivals)
        # Where all is -inf so far, any finite reference will do.
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        shift = tl.maximum((peak - reference) * to_bits, NEGLIGIBLE)
        decay = tl.exp2(shift)
        bits = (z - reference[:, None]) * to_bits
        bits = tl.maximum(bits, NEGLIGIBLE, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.exp2(bits)
        moment = (moment + total * shift) * decay + tl.sum(weight * bits, axis=1)
        total = total * decay + tl.sum(weight, axis=1)
        if HAS_DIAGNOSTICS:
            squares = squares * decay * decay + tl.sum(weight * weight, axis=1)
        peak = highest
    row_peak = tl.max(peak, axis=0)
    shift = tl.maximum((peak - row_peak) * to_bits, NEGLIGIBLE)
    decay = tl.exp2(shift)
    mass = tl.sum(total * decay, axis=0)
    log_mass = tl.log2(mass)
    entropy = log_mass - tl.sum((moment + total * shift) * decay, axis=0) / mass
    log2_p_target = (z_target - row_peak) * to_bits - log_mass
    log_squares = 0.0
    logits_sum = 0.0
    is_top1 = False
    if HAS_DIAGNOSTICS:
        log_squares = tl.log2(tl.sum(squares * decay * decay, axis=0)) - 2.0 * log_mass
        logits_sum = tl.sum(plain, axis=0)
        rival = tl.maximum(rival, tl.max(rivals, axis=0))
        is_top1 = (z_target == row_peak) & (z_target > rival)
    statistics = (row_peak, log_mass, log2_p_target, entropy, target_slope)
    return statistics, (log_squares, logits_sum, is_top1)


@triton.jit
def in_nats(statistics):
    """Log-prob of the target and entropy, of what `row_statistics` returned first."""
    return statistics[2] * LN_2, statistics[3] * LN_2


@triton.jit
def store_gradient(
    row_ptr,
    gradient_ptr,
    target,
    by_logprob,
    by_entropy,
    statistics,
    size,
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """by_logprob * d logprob + by_entropy * d H over the row, which may be overwritten by it.

    Takes the statistics as `row_statistics` returned them first, in its units.
    """
    peak, log_mass, log2_p_target, entropy, target_slope = statistics
    offsets = tl.arange(0, BLOCK_V)
    to_bits = inverse_temperature * LOG2_E
    by_p = by_logprob * inverse_temperature  # d loss / d z_j = -p_j * (by_p + by_bits * ...)
    by_bits = by_entropy * inverse_temperature * LN_2
    for start in range(0, size, BLOCK_V):
        columns = start + offsets
        z, slope = load_capped(row_ptr, columns, size, softcap, HAS_SOFTCAP)
        log2_p = (z - peak) * to_bits - log_mass
        if HAS_ENTROPY:
            log2_p = tl.maximum(log2_p, NEGLIGIBLE, propagate_nan=tl.PropagateNan.ALL)
            factor = -by_p - by_bits * (log2_p + entropy)
        else:
            factor = -by_p
        gradient = tl.exp2(log2_p) * factor * slope
        tl.store(
            gradient_ptr + columns,
            gradient.to(gradient_ptr.dtype.element_ty),
            mask=columns < size,
        )
    # The target's own column once more: a comparison a column would cost more than this store.
    p_target = tl.exp2(log2_p_target)
    gradient = by_p * (1.0 - p_target)
    if HAS_ENTROPY:
        surprise = tl.maximum(log2_p_target, NEGLIGIBLE, propagate_nan=tl.PropagateNan.ALL)
        gradient -= by_bits * p_target * (surprise + entropy)
    tl.debug_barrier()  # after the store of the loop
    tl.store(
        gradient_ptr + target,
        (gradient * target_slope).to(gradient_ptr.dtype.element_ty),
        mask=(target >= 0) & (target < size),
    )


@triton.jit
def store_zeros(gradient_ptr, size, BLOCK_V: tl.constexpr):
    """A row without a gradient, which is not read."""
    zeros = tl.zeros([BLOCK_V], gradient_ptr.dtype.element_ty)
    for start in range(0, size, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        tl.store(gradient_ptr + columns, zeros, mask=columns < size)
