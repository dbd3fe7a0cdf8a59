"""RECAP's dynamic weights in one launch of one program (arXiv 2510.21978v2, Algorithm 2).

Mirrors `RecapReweighter` in `recap_fast/reweighting/recap.py`, which gives the formulas. Arithmetic
is float64. Shapes: K objectives, 2W columns of a ring, of which value number n has column n mod 2W.
"""

import triton
import triton.language as tl

MIN_DENOMINATOR = tl.constexpr(1e-6)
NOISE_MULTIPLE = tl.constexpr(4.0)
NOISE_MEMORY = tl.constexpr(10)


@triton.jit
def away_from_zero(x):
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude < MIN_DENOMINATOR, MIN_DENOMINATOR, magnitude)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def load_ring(
    ring_ptr,
    start,
    value,
    slot,
    is_objective,
    num_columns,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Columns from `start` [BLOCK_K, BLOCK_C], with `value` in the place where it is being pushed.

    Whether the push has reached memory yet makes no difference. Columns past the end are 0.
    """
    columns = start + tl.arange(0, BLOCK_C)
    inside = is_objective[:, None] & (columns < num_columns)[None, :]
    cells = tl.arange(0, BLOCK_K)[:, None] * num_columns + columns[None, :]
    ring = tl.load(ring_ptr + cells, mask=inside, other=0.0)
    return tl.where(columns[None, :] == slot[:, None], value[:, None], ring), columns, inside


# One compilation whatever row or column of a table the values are: none may wait inside a capture.
@triton.jit(
    do_not_specialize=["values_stride", "present_stride"],
    do_not_specialize_on_alignment=["values_ptr", "present_ptr"],
)
def recap_update_kernel(
    values_ptr,  # [K] floating: the step's values
    values_stride,
    present_ptr,  # [K] bool or None: all present
    present_stride,
    is_reward_ptr,  # [K] bool
    ring_ptr,  # [K, 2W] float64, updated
    counts_ptr,  # [K] int64, updated: values pushed so far
    weights_ptr,  # [K] float32, like those below
    returned_ptr,  # [K] a copy of the weights, which later updates do not overwrite
    rates_ptr,  # [K]
    instabilities_ptr,  # [K]
    priorities_ptr,  # [K]
    best_ptr,  # [K] float64, updated, or None: no retention; with it the next two
    noise_ptr,  # [K] float64, updated
    retentions_ptr,  # [K]
    num_objectives,
    num_columns,  # 2W
    # Annotated because Triton passes Python's numbers as float32 otherwise.
    temperature: tl.float64,
    alpha: tl.float64,
    max_rate: tl.float64,
    retention: tl.float64,
    SUM: tl.constexpr,  # priority c + i; else alpha c + (1 - alpha) i
    CURRENT: tl.constexpr,  # deviation from the newer mean; else from that of the window
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    objectives = tl.arange(0, BLOCK_K)
    is_objective = objectives < num_objectives
    value = tl.load(values_ptr + objectives * values_stride, mask=is_objective, other=0.0)
    value = value.to(tl.float64)
    # NaN and infinities are no observations.
    observed = is_objective & (tl.abs(value) < float("inf"))
    if present_ptr is not None:
        cells = objectives * present_stride
        observed = observed & (tl.load(present_ptr + cells, mask=is_objective, other=0) != 0)
    before = tl.load(counts_ptr + objectives, mask=is_objective, other=0)
    counts = before + tl.where(observed, 1, 0)
    slot = tl.where(observed, (before % num_columns).to(tl.int32), -1)

    half = num_columns // 2
    newest = ((counts - 1) % num_columns).to(tl.int32)  # -1 before the first value
    newer = tl.zeros([BLOCK_K], tl.float64)
    older = tl.zeros([BLOCK_K], tl.float64)
    successive = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, num_columns, BLOCK_C):
        ring, columns, inside = load_ring(
            ring_ptr, start, value, slot, is_objective, num_columns, BLOCK_K, BLOCK_C
        )
        age = newest[:, None] - columns[None, :]  # values pushed since the column's
        age = tl.where(age < 0, age + num_columns, age)
        newer += tl.sum(tl.where(inside & (age < half), ring, 0.0), axis=1)
        older += tl.sum(tl.where(inside & (age >= half), ring, 0.0), axis=1)
        if best_ptr is not None:
            # The value being pushed has no successor, so that memory has all that is read here.
            previous = tl.where(columns == 0, num_columns - 1, columns - 1)
            places = objectives[:, None] * num_columns + previous[None, :]
            steps = ring - tl.load(ring_ptr + places, mask=inside, other=0.0)
            successive += tl.sum(tl.where(inside & (age < half - 1), steps * steps, 0.0), axis=1)
    newer = newer / half
    older = older / half
    center = (newer + older) * 0.5
    if CURRENT:
        center = newer
    squares = tl.zeros([BLOCK_K], tl.float64)
    for start in range(0, num_columns, BLOCK_C):
        ring, columns, inside = load_ring(
            ring_ptr, start, value, slot, is_objective, num_columns, BLOCK_K, BLOCK_C
        )
        apart = tl.where(inside, ring - center[:, None], 0.0)
        squares += tl.sum(apart * apart, axis=1)
    deviation = tl.sqrt(squares / (num_columns - 1))

    is_reward = tl.load(is_reward_ptr + objectives, mask=is_objective, other=0) != 0
    rate = tl.where(is_reward, newer, older) / away_from_zero(tl.where(is_reward, older, newer))
    # Comparisons keep NaN, which overflowing values may lead to, where minimum and maximum hide it.
    rate = tl.where(rate > max_rate, max_rate, tl.where(rate < -max_rate, -max_rate, rate))
    instability = deviation / away_from_zero(newer + older)
    full = is_objective & (counts >= num_columns)
    ready = full
    if best_ptr is not None:
        ready = is_objective & (counts >= half)
        rate = tl.where(full, rate, 1.0)
        instability = tl.where(full, instability, 0.0)
    if SUM:
        priority = rate + instability
    else:
        priority = alpha * rate + (1.0 - alpha) * instability
    if best_ptr is not None:
        # Half the mean square of successive differences: in the newer half, and in the long run.
        last = objectives * num_columns + tl.where(slot == 0, num_columns - 1, slot - 1)
        last = tl.load(ring_ptr + last, mask=observed, other=0.0)
        noise = tl.load(noise_ptr + objectives, mask=is_objective, other=0.0)
        memory = NOISE_MEMORY * half
        averaged = tl.where(before < 1, 1, tl.where(before > memory, memory, before))
        share = 1.0 / averaged.to(tl.float64)
        square = (value - last) * (value - last) * 0.5
        followed = noise * (1.0 - share) + square * share
        noise = tl.where(observed & (before > 0), followed, noise)
        variance = successive / (2 * (half - 1))
        variance = tl.where(noise > variance, noise, variance)
        floor = NOISE_MULTIPLE * tl.sqrt(variance / half)
        height = tl.where(is_reward, newer, -newer)
        best = tl.load(best_ptr + objectives, mask=is_objective, other=0.0)
        best = tl.where(is_reward, best, -best)
        best = tl.where(ready & (height - floor > best), height - floor, best)
        drop = best - floor - height
        drop = tl.where(drop < 0, 0.0, drop)
        size = tl.abs(best)
        drop = drop / away_from_zero(tl.where(floor > size, floor, size))
        drop = tl.where(drop > max_rate, max_rate, drop)
        priority += retention * drop

    # weights = number ready * softmax(priority / temperature) over the ready ones, 1 for the rest.
    logits = tl.where(ready, priority / temperature, float("-inf"))
    peak = tl.max(logits, axis=0)
    shares = tl.where(ready, tl.exp(logits - tl.where(ready, peak, 0.0)), 0.0)
    total = tl.sum(shares, axis=0)
    number = tl.sum(tl.where(ready, 1.0, 0.0), axis=0)
    weights = tl.where(ready, shares * number / tl.where(total == 0, 1.0, total), 1.0)

    # Every warp has read the counts, and the ring but for the pushed value, before one writes them.
    tl.debug_barrier()
    cells = objectives * num_columns + slot
    tl.store(ring_ptr + cells, value, mask=observed)
    tl.store(counts_ptr + objectives, counts, mask=is_objective)
    weights = weights.to(tl.float32)
    tl.store(weights_ptr + objectives, weights, mask=is_objective)
    tl.store(returned_ptr + objectives, weights, mask=is_objective)
    for_reading = tl.where(full, rate, float("nan")).to(tl.float32)
    tl.store(rates_ptr + objectives, for_reading, mask=is_objective)
    for_reading = tl.where(full, instability, float("nan")).to(tl.float32)
    tl.store(instabilities_ptr + objectives, for_reading, mask=is_objective)
    for_reading = tl.where(ready, priority, float("nan")).to(tl.float32)
    tl.store(priorities_ptr + objectives, for_reading, mask=is_objective)
    if best_ptr is not None:
        tl.store(best_ptr + objectives, tl.where(is_reward, best, -best), mask=is_objective)
        tl.store(noise_ptr + objectives, noise, mask=is_objective)
        for_reading = tl.where(ready, drop, float("nan")).to(tl.float32)
        tl.store(retentions_ptr + objectives, for_reading, mask=is_objective)
