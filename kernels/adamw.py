"""AdamW's step for moments that are kept in bfloat16 or in 8 bits.

Mirrors `recap_fast/ops/adamw.py`, which gives formulas, rounding and the format of 8 bits. What a
step computes is float32 and meets the parameter before it is rounded.
"""

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B9)  # 2^32 over the golden ratio: steps get keys far apart
QUANTISED = tl.constexpr(256)  # values of a block with one scale
SMALLEST_SCALE = tl.constexpr(1e-12)


@triton.jit
def mix(x):
    """The finaliser of MurmurHash3: uint32 to uint32, every bit depends on every bit."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def round_randomly(x, random):
    """float32 to bfloat16: up in magnitude as often as the 16 bits that are lost say."""
    bits = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)  # exact


@triton.jit
def updated(
    p, g, m, v, step_ptr, grad_scale_ptr, lr, decay, rate1, rate2, log_beta1, log_beta2, eps
):
    """Parameter and moments after the step. Bias corrections are float64: 1 - 0.999 is not exact
    enough in float32."""
    step = tl.load(step_ptr).to(tl.float64)
    size = (lr / (1.0 - tl.exp(step * log_beta1))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp(step * log_beta2)).to(tl.float32)
    g = g / tl.load(grad_scale_ptr)
    m = m + rate1 * (g - m)
    v = v + rate2 * (g * g - v)
    p = p - decay * p - size * m / (tl.sqrt(v) / root + eps)
    return p, m, v


# One compilation for all parameters: what differs between them is none of the compiler's business.
@triton.jit(do_not_specialize=["first", "key", "size"])
def adamw_bfloat16_kernel(
    parameter_ptr,  # [N] float32, updated
    gradient_ptr,  # [N] float32
    exp_avg_ptr,  # [N] bfloat16, updated
    exp_avg_sq_ptr,  # [N] bfloat16, updated
    step_ptr,  # [] float32, this step's number, from 1
    grad_scale_ptr,  # [] float32: the gradient is divided by it
    found_inf_ptr,  # [] float32: nothing changes where it is not 0
    first: tl.int64,  # of these N values, its number in the whole parameter
    size: tl.int64,  # N
    key: tl.int32,
    lr: tl.float64,
    decay,  # lr * weight decay
    rate1,  # 1 - beta1
    rate2,  # 1 - beta2
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    eps,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < tl.where(tl.load(found_inf_ptr) == 0, size, 0)
    p = tl.load(parameter_ptr + places, mask=inside, other=0.0)
    g = tl.load(gradient_ptr + places, mask=inside, other=0.0)
    m = tl.load(exp_avg_ptr + places, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + places, mask=inside, other=0.0).to(tl.float32)
    p, m, v = updated(
        p, g, m, v, step_ptr, grad_scale_ptr, lr, decay, rate1, rate2, log_beta1, log_beta2, eps
    )
    number = tl.load(step_ptr).to(tl.uint32)
    stream = mix(key.to(tl.uint32, bitcast=True) + number * GOLDEN)
    index = first + places
    high = (index >> 32).to(tl.uint32)
    random = mix(index.to(tl.uint32) ^ (stream + high * GOLDEN))
    tl.store(parameter_ptr + places, p, mask=inside)
    tl.store(exp_avg_ptr + places, round_randomly(m, random & 0xFFFF), mask=inside)
    tl.store(exp_avg_sq_ptr + places, round_randomly(v, random >> 16), mask=inside)


@triton.jit
def load_quantised(codes_ptr, places, inside, scale, table_ptr):
    codes = tl.load(codes_ptr + places, mask=inside, other=0).to(tl.int32)
    return tl.load(table_ptr + codes) * scale[:, None]


@triton.jit
def store_quantised(codes_ptr, scale_ptr, places, inside, blocks, is_block, x, table_ptr):
    """Codes of the nearest values in the table, by bisection of the middles behind it."""
    scale = tl.max(tl.where(inside, tl.abs(x), 0.0), axis=1)
    scale = tl.maximum(scale, SMALLEST_SCALE)
    x = x / scale[:, None]
    codes = tl.zeros_like(places).to(tl.int32)
    middles_ptr = table_ptr + 256
    for bit in tl.static_range(8):
        is_above = x >= tl.load(middles_ptr + codes + ((128 >> bit) - 1))
        codes += tl.where(is_above, 128 >> bit, 0)
    tl.store(codes_ptr + places, codes.to(tl.uint8), mask=inside)
    tl.store(scale_ptr + blocks, scale, mask=is_block)


@triton.jit(do_not_specialize=["num_blocks", "blocks_per_row"])
def adamw_8bit_kernel(
    parameter_ptr,  # [R, C] float32, updated
    gradient_ptr,  # [R, C] float32
    exp_avg_ptr,  # [R, C] uint8, updated
    exp_avg_scale_ptr,  # [R, B] float32, updated: of each 256 values of a row
    exp_avg_sq_ptr,  # [R, C] uint8, updated
    exp_avg_sq_scale_ptr,  # [R, B] float32, updated
    tables_ptr,  # [4, 256] float32: signed values and their middles, unsigned ones and theirs
    step_ptr,  # [] float32, this step's number, from 1
    grad_scale_ptr,  # [] float32: the gradient is divided by it
    found_inf_ptr,  # [] float32: nothing changes where it is not 0
    num_blocks,  # R * B
    blocks_per_row,  # B
    num_columns,  # C
    lr: tl.float64,
    decay,  # lr * weight decay
    rate1,  # 1 - beta1
    rate2,  # 1 - beta2
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    eps,
    BLOCKS: tl.constexpr,
):
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = blocks < tl.where(tl.load(found_inf_ptr) == 0, num_blocks, 0)
    rows = (blocks // blocks_per_row).to(tl.int64)
    columns = (blocks % blocks_per_row)[:, None] * QUANTISED + tl.arange(0, QUANTISED)[None, :]
    places = rows[:, None] * num_columns + columns  # [BLOCKS, 256]
    inside = is_block[:, None] & (columns < num_columns)
    p = tl.load(parameter_ptr + places, mask=inside, other=0.0)
    g = tl.load(gradient_ptr + places, mask=inside, other=0.0)
    scale_m = tl.load(exp_avg_scale_ptr + blocks, mask=is_block, other=0.0)
    scale_v = tl.load(exp_avg_sq_scale_ptr + blocks, mask=is_block, other=0.0)
    m = load_quantised(exp_avg_ptr, places, inside, scale_m, tables_ptr)
    v = load_quantised(exp_avg_sq_ptr, places, inside, scale_v, tables_ptr + 512)
    p, m, v = updated(
        p, g, m, v, step_ptr, grad_scale_ptr, lr, decay, rate1, rate2, log_beta1, log_beta2, eps
    )
    tl.store(parameter_ptr + places, p, mask=inside)
    store_quantised(exp_avg_ptr, exp_avg_scale_ptr, places, inside, blocks, is_block, m, tables_ptr)
    store_quantised(
        exp_avg_sq_ptr, exp_avg_sq_scale_ptr, places, inside, blocks, is_block, v, tables_ptr + 512
    )
