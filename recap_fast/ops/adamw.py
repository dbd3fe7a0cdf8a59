"""AdamW's step on moments that take less room than float32: bfloat16, or 8 bits.

With gradient g, moments m and v, and the step's number t, all in float32:
    m <- m + (1 - beta1) (g - m)        v <- v + (1 - beta2) (g^2 - v)
    p <- p - lr weight_decay p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
The parameter, which stays float32, meets m and v before they are rounded.

bfloat16 is rounded stochastically: rounded to the nearest, a change of v by (1 - beta2) = 1/1000 of
it vanishes below half a unit in the last place, 1/512, and v never falls again. The random bits are
a hash of seed, parameter, step and the value's number in the whole parameter: the same however
many processes share it, and after a resume.

8 bits are those of Dettmers et al., "8-bit Optimizers via Block-wise Quantization"
(arXiv 2110.02861), as bitsandbytes and torchao have them: 256 values share a float32 scale, their
largest magnitude, and each is the nearest of 256 "dynamic" fractions of it. Blocks lie within a
row of a parameter, so that shards of rows never cut one.

Functions take a process's own, contiguous part of a parameter, and change it in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from recap_fast.ops._validate import resolve_impl
from recap_fast.ops.adamw_step import AdamWStep

BLOCK = 256
"""Values with one scale, as in torchao."""
SMALLEST_SCALE = 1e-12
_CHUNK = 1 << 20
"""Values that the torch path works on at a time: bounds what it needs beside the state."""
_GOLDEN = 0x9E3779B9
_MASK = 0xFFFFFFFF


def adamw_bfloat16(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    number: Tensor,
    step: AdamWStep,
    *,
    key: int,
    first: int = 0,
    impl: str = "auto",
) -> None:
    """A step on bfloat16 moments, rounded stochastically.

    Args:
        parameter, gradient: float32, of any shape.
        exp_avg, exp_avg_sq: bfloat16, of that shape.
        number: [] float32, t, from 1.
        key: of `rounding_key`.
        first: the number of the first value here in the whole parameter.
        impl: "triton", "torch", or "auto", which goes by the device.
    """
    if resolve_impl(impl, parameter.device, parameter.dtype) == "triton":
        from recap_fast.ops.triton_adamw import adamw_bfloat16 as run

        run(parameter, gradient, exp_avg, exp_avg_sq, number, step, key, first)
        return
    flat = [tensor.view(-1) for tensor in (parameter, gradient, exp_avg, exp_avg_sq)]
    stream = _mix((number.to(torch.int64) * _GOLDEN + key).to(torch.int32))
    for begin, end in _chunks(first, parameter.numel()):
        p, g, m, v = (tensor[begin:end] for tensor in flat)
        new_p, new_m, new_v = _updated(p, g, m.float(), v.float(), number, step)
        random = random_bits(stream, first + begin, end - begin)
        _keep(p, new_p, step)
        _keep(m, _round(new_m, random & 0xFFFF), step)
        _keep(v, _round(new_v, (random >> 16) & 0xFFFF), step)


def adamw_8bit(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    number: Tensor,
    step: AdamWStep,
    *,
    impl: str = "auto",
) -> None:
    """A step on moments of 8 bits.

    Args:
        parameter, gradient: [R, ...] float32; a row has C values.
        exp_avg, exp_avg_sq: [R, ...] uint8, codes.
        exp_avg_scale, exp_avg_sq_scale: [R, ceil(C / 256)] float32.
        number: [] float32, t, from 1.
        impl: "triton", "torch", or "auto", which goes by the device.
    """
    tensors = (parameter, gradient, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale)
    if parameter.numel() == 0:
        return
    parts = [tensor.view(len(parameter), -1) for tensor in tensors]
    tables = quantisation_tables(parameter.device)
    if resolve_impl(impl, parameter.device, parameter.dtype) == "triton":
        from recap_fast.ops.triton_adamw import adamw_8bit as run

        p, g, m, m_scale, v, v_scale = parts
        run(p, g, m, m_scale, v, v_scale, tables, number, step)
        return
    signed, unsigned = tables[:2], tables[2:]
    rows = max(1, _CHUNK // parts[0].shape[1])
    for begin in range(0, len(parameter), rows):
        p, g, m, m_scale, v, v_scale = (part[begin : begin + rows] for part in parts)
        new_p, new_m, new_v = _updated(
            p, g, dequantise(m, m_scale, signed), dequantise(v, v_scale, unsigned), number, step
        )
        _keep(p, new_p, step)
        for new, old, table in (
            (new_m, (m, m_scale), signed),
            (new_v, (v, v_scale), unsigned),
        ):
            for kept, value in zip(old, quantise(new, table), strict=True):
                _keep(kept, value, step)


def _chunks(first: int, size: int) -> Iterator[tuple[int, int]]:
    """Bounds that fall on multiples of `_CHUNK` of the whole parameter."""
    begin = 0
    while begin < size:
        end = min(size, begin + _CHUNK - (first + begin) % _CHUNK)
        yield begin, end
        begin = end


def _updated(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, number: Tensor, step: AdamWStep
) -> tuple[Tensor, Tensor, Tensor]:
    t = number.to(torch.float64)  # 1 - 0.999 is not exact enough in float32
    size = (step.lr / (1 - step.beta1**t)).to(torch.float32)
    root = (1 - step.beta2**t).sqrt().to(torch.float32)
    g = g / step.grad_scale
    m = m.lerp(g, 1 - step.beta1)
    v = v.lerp(g.square(), 1 - step.beta2)
    moved = m / v.sqrt().div_(root).add_(step.eps)
    return p - (step.lr * step.weight_decay) * p - moved.mul_(size), m, v


def _keep(old: Tensor, new: Tensor, step: AdamWStep) -> None:
    torch.where(step.found_inf != 0, old, new, out=old)


def rounding_key(seed: int, parameter: int) -> int:
    """What the random bits of a parameter's stochastic rounding begin with: a signed 32-bit number.

    Args:
        parameter: its number among the trained ones.
    """
    mixed = 0
    for word in (seed & _MASK, seed >> 32 & _MASK, parameter):
        mixed = int(_mix(torch.tensor(_signed(mixed ^ word), dtype=torch.int32))) + _GOLDEN & _MASK
    return _signed(mixed)


def random_bits(stream: Tensor, first: int, count: int) -> Tensor:
    """[count] int32, for values `first` and on of a parameter; 2^32 of them may not be crossed.

    Args:
        stream: [] int32, of a parameter's step.
    """
    low = torch.arange(first & _MASK, (first & _MASK) + count, device=stream.device)
    return _mix(low.to(torch.int32) ^ (stream + _signed((first >> 32) * _GOLDEN & _MASK)))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on int32: every bit depends on every bit."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(0x85EBCA6B)
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _signed(0xC2B2AE35)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    """A 32-bit word as torch's int32 has it."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _round(x: Tensor, random: Tensor) -> Tensor:
    """float32 to bfloat16: up in magnitude as often as the 16 bits that are lost say."""
    return ((x.view(torch.int32) + random) & -0x10000).view(torch.float32).to(torch.bfloat16)


def quantise(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [R, C] uint8 and scales [R, ceil(C / 256)] of x [R, C].

    Args:
        table: [2, 256], values and the middles between them.
    """
    rows, columns = x.shape
    blocks = F.pad(x, (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    scale = blocks.abs().amax(-1).clamp_min_(SMALLEST_SCALE)  # [R, B]
    codes = torch.bucketize(blocks / scale[..., None], table[1, :-1], right=True, out_int32=True)
    return codes.view(rows, -1)[:, :columns].to(torch.uint8), scale


def dequantise(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """[R, C] float32 of what `quantise` gave."""
    values = table[0].index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
    return values * scale.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]


@lru_cache
def quantisation_tables(device: torch.device) -> Tensor:
    """[4, 256] float32: signed values, the middles above each, unsigned values and theirs."""
    found = []
    for values in (_dynamic_values(signed=True), _dynamic_values(signed=False)):
        middles = [(low + high) / 2 for low, high in zip(values, values[1:], strict=False)]
        found += [values, [*middles, math.inf]]
    return torch.tensor(found, dtype=torch.float32, device=device)


def _dynamic_values(*, signed: bool) -> list[float]:
    """Fractions between powers of ten from 1e-7 to 1, the more of them the larger the power, with 0
    and 1; the map of bitsandbytes."""
    values = [0.0, 1.0]
    for power in range(7):
        count = 2**power if signed else 2 ** (power + 1)
        edges = [0.1 + 0.9 * i / count for i in range(count + 1)]
        middles = [
            (low + high) / 2 * 10.0 ** (power - 6)
            for low, high in zip(edges, edges[1:], strict=False)
        ]
        values += middles + [-middle for middle in middles if signed]
    return sorted(values)
