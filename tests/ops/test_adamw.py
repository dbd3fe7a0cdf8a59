"""AdamW on bfloat16 and 8-bit moments: torch and the interpreted kernels against float64."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from recap_fast.ops import adamw, reference
from recap_fast.ops.adamw import (
    adamw_8bit,
    adamw_bfloat16,
    dequantise,
    quantisation_tables,
    quantise,
    rounding_key,
)
from recap_fast.ops.adamw_step import AdamWStep
from tests.no_sync import ForbidHostSync

impls = pytest.mark.parametrize("impl", ["torch", "triton"])
SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
BETAS = (0.9, 0.999)
KEY = rounding_key(5, 3)


def told(grad_scale: float = 2.0, found_inf: float = 0.0) -> AdamWStep:
    return AdamWStep(
        beta1=BETAS[0], beta2=BETAS[1], **SETTINGS,
        grad_scale=torch.tensor(grad_scale), found_inf=torch.tensor(found_inf),
    )  # fmt: skip


def make(*shape: int) -> list[Tensor]:
    """Parameter, gradient and moments, of six orders of magnitude."""
    torch.manual_seed(0)
    sizes = 10.0 ** (torch.rand(*shape) * 6 - 6)
    gradient = torch.randn(*shape) * sizes
    first, second = torch.randn(*shape) * sizes, (torch.randn(*shape) * sizes) ** 2
    return [torch.randn(*shape), gradient, first.bfloat16(), second.bfloat16()]


def oracle(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int = 7) -> tuple[Tensor, ...]:
    doubles = (p.double(), g.double() / 2, m.double(), v.double())
    return reference.adamw(*doubles, step=step, betas=BETAS, **SETTINGS)


@impls
@pytest.mark.parametrize("size", [1, 1023, 2500])
def test_parameters_are_as_exact_as_torchs_own_and_moments_next_to_the_exact(
    impl: str, size: int
) -> None:
    p, g, m, v = make(size)
    exact_p, exact_m, exact_v = oracle(p, g, m, v)
    theirs = torch.nn.Parameter(p.clone())
    plain = torch.optim.AdamW([theirs], betas=BETAS, fused=True, **SETTINGS)
    plain.state[theirs] = {
        "step": torch.tensor(6.0), "exp_avg": m.float(), "exp_avg_sq": v.float(),
    }  # fmt: skip
    theirs.grad = g / 2
    plain.step()
    adamw_bfloat16(p, g, m, v, torch.tensor(7.0), told(), key=KEY, impl=impl)
    bound = 1.5 * (theirs.detach().double() - exact_p).abs().max() + 1e-9
    assert (p.double() - exact_p).abs().max() <= bound
    for rounded, exact in ((m, exact_m), (v, exact_v)):
        # One of its two neighbours: less than a unit in the last place away.
        assert ((rounded.double() - exact).abs() <= exact.abs() / 128 + 1e-38).all()


@impls
def test_rounding_is_right_in_the_mean_and_never_the_same_twice(impl: str) -> None:
    """Moments that stay on one value would be rounded to the same side by every draw."""
    size, draws = 200, 400 if impl == "torch" else 60
    p, g, m, v = make(size)
    _, exact_m, exact_v = oracle(p, g, m, v)
    sums = [torch.zeros(size, dtype=torch.float64) for _ in range(2)]
    for seed in range(draws):
        new = [tensor.clone() for tensor in (p, m, v)]
        key = rounding_key(seed, 0)
        adamw_bfloat16(new[0], g, *new[1:], torch.tensor(7.0), told(), key=key, impl=impl)
        for total, value in zip(sums, new[1:], strict=True):
            total += value.double()
    for total, exact in zip(sums, (exact_m, exact_v), strict=True):
        error = ((total / draws - exact) / exact.abs()).abs()
        # A draw is off by half a unit, 2^-8, at most on average.
        assert error.mean() < 2**-8 / draws**0.5
        assert error.max() < 5 * 2**-8 / draws**0.5


@pytest.mark.parametrize("first", [0, 77, (1 << 32) - 3000, (1 << 33) + 5])
def test_kernel_and_torch_round_alike(first: int) -> None:
    results = []
    for impl in ("torch", "triton"):
        p, g, m, v = make(3000)
        adamw_bfloat16(p, g, m, v, torch.tensor(7.0), told(), key=KEY, first=first, impl=impl)
        results.append((p, m, v))
    (p, m, v), others = results
    assert (p - others[0]).abs().max() <= 1e-6
    # A sum whose last bit differs may fall on the other side of a draw.
    for ours, theirs in ((m, others[1]), (v, others[2])):
        assert (ours != theirs).float().mean() < 1e-3


def test_parts_of_a_parameter_round_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do chunks of any size."""
    whole = make(5000)
    adamw_bfloat16(*whole, torch.tensor(7.0), told(), key=KEY)
    monkeypatch.setattr(adamw, "_CHUNK", 512)
    begin = 0
    for size in (1, 700, 0, 2099, 2200):
        part = [tensor[begin : begin + size].clone() for tensor in make(5000)]
        adamw_bfloat16(*part, torch.tensor(7.0), told(), key=KEY, first=begin)
        for ours, wanted in zip(part, whole, strict=True):
            assert torch.equal(ours, wanted[begin : begin + size])
        begin += size


def test_draws_differ_by_seed_parameter_step_and_place() -> None:
    keys = {rounding_key(seed, place) for seed in (*range(50), 1 << 40) for place in range(50)}
    assert len(keys) == 51 * 50
    drawn = torch.stack([
        adamw.random_bits(adamw._mix(torch.tensor(stream, dtype=torch.int32)), first, 4096)
        for stream in range(4) for first in (0, 1 << 32)
    ])  # fmt: skip
    assert len(drawn.unique()) > 0.999 * drawn.numel()
    halves = torch.cat([drawn & 0xFFFF, (drawn >> 16) & 0xFFFF], 1).double() / 2**16
    assert (halves.mean(1) - 0.5).abs().max() < 0.02
    assert torch.corrcoef(halves).fill_diagonal_(0).abs().max() < 0.06


@impls
@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_nothing_changes_where_a_gradient_is_not_finite(impl: str, gradient: float) -> None:
    p, g, m, v = make(300)
    before = [p.clone(), m.clone(), v.clone()]
    step = told(grad_scale=gradient, found_inf=1.0)
    adamw_bfloat16(p, g * gradient, m, v, torch.tensor(0.0), step, key=KEY, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(before, (p, m, v), strict=True))
    state = quantised(20, 300)
    kept = [tensor.clone() for tensor in state]
    value, g = torch.randn(20, 300), torch.full((20, 300), gradient)
    old = value.clone()
    adamw_8bit(value, g, *state, torch.tensor(0.0), step, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip((old, *kept), (value, *state), strict=True))


def test_no_host_sync() -> None:
    with ForbidHostSync():
        adamw_bfloat16(*make(300), torch.tensor([7.0])[0], told(), key=KEY)
        state = quantised(3, 300)
        adamw_8bit(torch.ones(3, 300), torch.ones(3, 300), *state, torch.ones(()), told())


def quantised(rows: int, columns: int) -> list[Tensor]:
    """Codes and scales of moments like those of `make`."""
    _, _, m, v = make(rows, columns)
    tables = quantisation_tables(torch.device("cpu"))
    codes, scale = quantise(m.float(), tables[:2])
    codes_sq, scale_sq = quantise(v.float(), tables[2:])
    return [codes, scale, codes_sq, scale_sq]


@impls
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 255), (9, 256), (5, 700)])
def test_a_step_of_8_bits(impl: str, rows: int, columns: int) -> None:
    p, g, _, _ = make(rows, columns)
    state = quantised(rows, columns)
    tables = quantisation_tables(torch.device("cpu"))
    m = dequantise(state[0], state[1], tables[:2])
    v = dequantise(state[2], state[3], tables[2:])
    exact_p, exact_m, exact_v = oracle(p, g, m, v)
    moved = (exact_p - p).abs()
    adamw_8bit(p, g, *state, torch.tensor(7.0), told(), impl=impl)
    assert ((p.double() - exact_p).abs() <= 1e-6 + 1e-5 * moved).all()
    for exact, codes, scale, table in (
        (exact_m, state[0], state[1], tables[:2]),
        (exact_v, state[2], state[3], tables[2:]),
    ):
        wanted, wanted_scale = quantise(exact.float(), table)
        torch.testing.assert_close(scale, wanted_scale)
        assert (codes.int() - wanted.int()).abs().max() <= 1  # a tie within float32's rounding
        assert (codes != wanted).float().mean() < 0.01


def test_codes_are_those_of_the_nearest_values() -> None:
    for table in quantisation_tables(torch.device("cpu")).split(2):
        values = table[0]
        assert len(values.unique()) == 256
        assert values[-1] == 1
        assert 0 in values
        x = torch.randn(4, 600) if values[0] < 0 else torch.rand(4, 600)
        codes, scale = quantise(x, table)
        assert scale.shape == (4, 3)
        for block in range(3):
            part = x[:, 256 * block : 256 * (block + 1)]
            assert torch.equal(scale[:, block], part.abs().amax(1))
        spread = scale.repeat_interleave(256, 1)[:, :600]
        distances = (x[..., None] - values * spread[..., None]).abs()
        found = dequantise(codes, scale, table)
        torch.testing.assert_close((x - found).abs(), distances.amin(-1), rtol=0, atol=1e-6)


def test_shards_of_rows_are_quantised_as_the_whole() -> None:
    p, g, _, _ = make(10, 300)
    whole = [p, g, *quantised(10, 300)]
    parts = [[t[a:b].clone() for t in whole] for a, b in ((0, 4), (4, 4), (4, 10))]
    for tensors in (whole, *parts):
        adamw_8bit(*tensors, torch.tensor(7.0), told())
    for wanted, *given in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(given), wanted)


def test_8_bits_are_torchaos() -> None:
    """Its AdamW8bit without the compilation that it wraps a step in."""
    pytest.importorskip("torchao")
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    p, g, _, _ = make(64, 512)
    ours, theirs = p.clone(), p.clone()
    state = [torch.zeros(64, 512, dtype=torch.uint8), torch.zeros(64, 2)] * 2
    state = [tensor.clone() for tensor in state]
    moments = [OptimState8bit.zeros((64, 512), signed) for signed in (True, False)]
    for step in range(1, 6):
        number = torch.tensor(float(step))
        adamw_8bit(ours, g * step, *state, number, told(grad_scale=1.0))
        single_param_adam(
            theirs, g * step, number, *moments, None, torch.tensor(SETTINGS["lr"]), *BETAS,
            SETTINGS["weight_decay"], SETTINGS["eps"], True, False,
        )  # fmt: skip
        assert (ours - theirs).abs().max() < 5e-6
    for codes, scale, moment in ((*state[:2], moments[0]), (*state[2:], moments[1])):
        assert (codes != moment.codes).float().mean() < 1e-3
        torch.testing.assert_close(scale.view(-1), moment.scale)
    assert "torchao" in sys.modules
