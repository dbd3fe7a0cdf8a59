"""The policy loss of one token: values, and derivatives in closed form.

Mirrors `recap_fast/ops/objective.py`, which gives the formulas. All float32. K objectives.
"""

import triton
import triton.language as tl

# Log-ratios are clamped to +-20 before exp, and have no gradient where clamped.
MAX_LOG_RATIO = tl.constexpr(20.0)


@triton.jit
def clamped_exp(log_ratio):
    """exp of the clamped argument; NaN stays NaN."""
    clamped = tl.minimum(
        tl.maximum(log_ratio, -MAX_LOG_RATIO, propagate_nan=tl.PropagateNan.ALL),
        MAX_LOG_RATIO,
        propagate_nan=tl.PropagateNan.ALL,
    )
    return tl.exp(clamped)


@triton.jit
def is_inside(log_ratio):
    return tl.abs(log_ratio) <= MAX_LOG_RATIO


@triton.jit
def bounded_weight(weight, low, high, MASKS: tl.constexpr):
    """The importance weight, and whether it was outside [low, high]; NaN stays NaN."""
    is_low, is_high = weight < low, weight > high
    is_bounded = is_low | is_high
    if MASKS:
        bounded = tl.where(is_bounded, 0.0, weight)
    else:
        bounded = tl.where(is_high, high, tl.where(is_low, low, weight))
    return bounded, is_bounded


@triton.jit
def surrogate(ratio, advantage, logprob, lower, upper, unclipped_bound, CISPO: tl.constexpr):
    """What a policy token maximises [K], its slope [K], and where the clip decides it [K].

    The slope is in the log-ratio, or in the log-prob where CISPO makes the ratio a constant.
    """
    # NaN ratios must come out as NaN, which minimum and maximum would hide.
    is_nan = ratio != ratio
    if CISPO:
        slope = tl.where(is_nan, ratio, tl.minimum(ratio, upper)) * advantage
        # An advantage of 0 times the log-prob -inf of a forbidden token is 0.
        value = tl.where(slope == 0, 0.0, slope * logprob)
        decides = tl.broadcast_to(ratio, advantage.shape) > upper
    else:
        plain = tl.where(is_nan, ratio, tl.minimum(ratio, unclipped_bound)) * advantage
        clipped = tl.where(is_nan, ratio, tl.minimum(tl.maximum(ratio, lower), upper)) * advantage
        decides = clipped < plain
        value = tl.where(decides, clipped, plain)
        moving = ratio * advantage
        inside = (ratio >= lower) & (ratio <= upper)
        slope = tl.where(
            decides, tl.where(inside, moving, 0.0), tl.where(ratio > unclipped_bound, 0.0, moving)
        )
    return value, slope, decides


@triton.jit
def kl_estimate(log_ratio, ESTIMATOR: tl.constexpr):
    """KL(policy || reference) of a token and its slope in the log-prob.

    log_ratio = ref - logprob. Estimators 1, 2, 3: http://joschu.net/blog/kl-approx.html, of which 1
    has the slope of 2: its own does not depend on the reference.
    """
    if ESTIMATOR == 1:
        estimate = -log_ratio
        slope = -log_ratio
    elif ESTIMATOR == 2:
        estimate = log_ratio * log_ratio * 0.5
        slope = -log_ratio
    else:
        bounded = tl.minimum(tl.maximum(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO)
        growth = expm1(bounded)
        estimate = growth - bounded
        slope = tl.where(is_inside(log_ratio), -growth, 0.0)
        estimate = tl.where(log_ratio == log_ratio, estimate, log_ratio)
        slope = tl.where(log_ratio == log_ratio, slope, log_ratio)
    return estimate, slope


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near 0, where k3 is the small difference of two numbers."""
    series = 1.0 / 40320.0
    series = series * x + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = series * x + 0.5
    return tl.where(tl.abs(x) < 0.5, x + x * x * series, tl.exp(x) - 1.0)
