"""The one-launch update, interpreted, against the torch operations of the same class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recap_fast import RecapReweighter
from recap_fast.ops.launch import Launch, recording
from tests.no_sync import ForbidHostSync

PUBLISHED = ("weights", "rates", "instabilities", "priorities")


def _fused(num_objectives: int, **options: Any) -> RecapReweighter:
    """As on CUDA: one launch an update."""
    reweighter = RecapReweighter(num_objectives, **options)
    reweighter._in_one_launch = True
    return reweighter


def _steps(seed: int, count: int, k: int) -> list[tuple[Tensor, Tensor]]:
    """Values and presence: an eighth absent, an eighth NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, k, generator=generator) * 2
    broken = torch.randint(0, 16, (count, k), generator=generator)
    values[broken == 0] = float("nan")
    values[broken == 1] = float("inf")
    present = torch.randint(0, 8, (count, k), generator=generator) > 0
    return list(zip(values, present, strict=True))


def _compare(one: RecapReweighter, other: RecapReweighter) -> None:
    assert torch.equal(one._counts, other._counts)
    assert torch.equal(one._values, other._values)
    for name in PUBLISHED:
        mine, theirs = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 9999),
    k=st.integers(1, 32),
    window=st.sampled_from([1, 2, 3, 8, 17]),
    temperature=st.sampled_from([0.3, 1.0, 5.0]),
    alpha=st.sampled_from([None, 0.0, 0.3, 1.0]),
    std=st.sampled_from(["window", "current"]),
    max_rate=st.sampled_from([None, 1.1, 10.0]),
    with_presence=st.booleans(),
)
def test_equals_the_torch_path(
    seed: int, k: int, window: int, with_presence: bool, **options: Any
) -> None:
    signals = ["reward" if i % 3 else "loss" for i in range(k)]
    pair = [
        make(k, window=window, signals=signals, **options) for make in (_fused, RecapReweighter)
    ]
    for values, present in _steps(seed, 2 * window + 6, k):
        given_presence = present if with_presence else None
        returned = [reweighter.update(values, given_presence) for reweighter in pair]
        torch.testing.assert_close(*returned, rtol=1e-6, atol=1e-6)
        _compare(*pair)


def test_a_long_window_of_equal_values_has_no_deviation() -> None:
    fused, plain = _fused(2, window=500), RecapReweighter(2, window=500)
    values = torch.tensor([0.1, 0.7])
    for _ in range(1003):
        plain.update(values)
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused.update(values), torch.ones(2))
    torch.testing.assert_close(fused.rates, torch.ones(2))
    assert fused.instabilities.abs().max() < 1e-12
    plain.update(values)
    _compare(fused, plain)


def test_negative_zero_and_tiny_means() -> None:
    pair = [make(3, window=1, max_rate=None) for make in (_fused, RecapReweighter)]
    for row in ([0.0, -1.0, 1e-9], [0.0, 2.0, -1e-9], [-0.0, -2.0, 0.0]):
        for reweighter in pair:
            reweighter.update(torch.tensor(row))
        _compare(*pair)


def test_repeats_to_the_bit_and_returns_a_copy() -> None:
    runs = []
    for _ in range(2):
        reweighter = _fused(5, window=3)
        kept = [reweighter.update(*step) for step in _steps(1, 60, 5)]
        runs.append(torch.stack(kept))
        assert torch.equal(kept[-1], reweighter.weights)
        assert kept[-1].data_ptr() != reweighter.weights.data_ptr()
    assert torch.equal(*runs)


def test_state_goes_from_one_path_to_the_other() -> None:
    fused, plain = _fused(4, window=3), RecapReweighter(4, window=3)
    steps = _steps(2, 20, 4)
    for step in steps[:10]:
        fused.update(*step)
    plain.load_state_dict(fused.state_dict())
    for step in steps[10:]:
        fused.update(*step)
        plain.update(*step)
        _compare(fused, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_takes_values_of_any_dtype(dtype: torch.dtype) -> None:
    pair = [make(3, window=1) for make in (_fused, RecapReweighter)]
    for seed in range(4):
        values = torch.rand(3, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for reweighter in pair:
            reweighter.update(values)
    _compare(*pair)


def test_strided_values_and_presence() -> None:
    pair = [make(3, window=1) for make in (_fused, RecapReweighter)]
    for seed in range(4):
        table = torch.rand(3, 2, generator=torch.Generator().manual_seed(seed))
        for reweighter in pair:
            reweighter.update(table[:, 1], table[:, 0] > 0.3)
    _compare(*pair)


def test_one_launch_and_no_sync() -> None:
    reweighter = _fused(3, window=2)
    values, present = torch.rand(3), torch.ones(3, dtype=torch.bool)
    launches: list[Launch] = []
    with ForbidHostSync(), recording(launches.append):
        reweighter.update(values, present)
    assert [launch.grid for launch in launches] == [(1,)]


def test_a_cpu_keeps_to_torch() -> None:
    assert not RecapReweighter(2)._in_one_launch  # though the interpreter could


@pytest.mark.gpu
def test_on_cuda_one_kernel_and_the_numbers_of_the_cpu() -> None:
    cpu, cuda = RecapReweighter(4, window=3), RecapReweighter(4, window=3, device="cuda")
    steps = _steps(3, 30, 4)
    moved = [(values.cuda(), present.cuda()) for values, present in steps]
    cuda.update(*moved[0])  # compiles
    cpu.update(*steps[0])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with ForbidHostSync("cuda"):
            for step in moved[1:]:
                cuda.update(*step)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(kernels) == len(moved) - 1
    for step in steps[1:]:
        cpu.update(*step)
    for name in PUBLISHED:
        mine, theirs = getattr(cuda, name).cpu(), getattr(cpu, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
