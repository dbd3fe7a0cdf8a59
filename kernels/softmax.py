"""What the kernels over rows of logits share: scaled logits, their statistics, their gradient.

With z the scaled logits of a row, p = softmax(z), y its target and H its entropy:
    logprob = z_y - logsumexp(z)        d logprob / d z_j = [j = y] - p_j
    H = -sum_j p_j log p_j              d H / d z_j = -p_j (log p_j + H)
The gradient needs no second pass over anything but the logits: both statistics are scalars.
"""

import triton
import triton.language as tl

# exp of anything below is 0 in float32, and 0 * NEGLIGIBLE is 0 where 0 * -inf is NaN.
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
def load_scaled(row_ptr, columns, size, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """Scaled logits at `columns`, -inf past the row's end, and their slope in the raw logits."""
    inside = columns < size
    z = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    slope = inverse_temperature
    if HAS_SOFTCAP:
        bent = tanh(z / softcap)
        z = tl.where(inside, softcap * bent, float("-inf"))
        slope = (1.0 - bent * bent) * inverse_temperature
    return z * inverse_temperature, slope


@triton.jit
def row_statistics(
    row_ptr,
    target,
    size,
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One pass over a row: (peak, log of the sum of exp(z - peak), z_target - peak, entropy)."""
    offsets = tl.arange(0, BLOCK_V)
    peak = float("-inf")
    # Sums of exp(d) and of exp(d) * d by lane, with d = z - peak: one reduction at the end.
    total = tl.zeros([BLOCK_V], tl.float32)
    moment = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, size, BLOCK_V):
        z, _ = load_scaled(
            row_ptr, start + offsets, size, softcap, inverse_temperature, HAS_SOFTCAP
        )
        highest = tl.maximum(peak, tl.max(z, axis=0))
        # Where all is -inf so far, any finite reference will do.
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        shift = tl.maximum(peak - reference, NEGLIGIBLE)
        decay = tl.exp(shift)
        d = tl.maximum(z - reference, NEGLIGIBLE, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.exp(d)
        moment = (moment + total * shift) * decay + weight * d
        total = total * decay + weight
        peak = highest
    mass = tl.sum(total, axis=0)
    log_mass = tl.log(mass)
    z_target, _ = load_scaled(row_ptr, target, size, softcap, inverse_temperature, HAS_SOFTCAP)
    return peak, log_mass, z_target - peak, log_mass - tl.sum(moment, axis=0) / mass


@triton.jit
def store_gradient(
    row_ptr,
    gradient_ptr,
    target,
    by_logprob,
    by_entropy,
    peak,
    log_mass,
    entropy,
    size,
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """by_logprob * d logprob + by_entropy * d H over the row, which may be overwritten by it."""
    offsets = tl.arange(0, BLOCK_V)
    for start in range(0, size, BLOCK_V):
        columns = start + offsets
        z, slope = load_scaled(row_ptr, columns, size, softcap, inverse_temperature, HAS_SOFTCAP)
        log_p = (z - peak) - log_mass
        log_p = tl.maximum(log_p, NEGLIGIBLE, propagate_nan=tl.PropagateNan.ALL)
        factor = -by_logprob
        if HAS_ENTROPY:
            factor = factor - by_entropy * (log_p + entropy)
        gradient = tl.exp(log_p) * factor
        gradient = tl.where(columns == target, gradient + by_logprob, gradient) * slope
        tl.store(
            gradient_ptr + columns,
            gradient.to(gradient_ptr.dtype.element_ty),
            mask=columns < size,
        )


@triton.jit
def store_zeros(gradient_ptr, size, BLOCK_V: tl.constexpr):
    """A row without a gradient, which is not read."""
    zeros = tl.zeros([BLOCK_V], gradient_ptr.dtype.element_ty)
    for start in range(0, size, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        tl.store(gradient_ptr + columns, zeros, mask=columns < size)
