"""The one-launch update, interpreted, against the torch operations of the same class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from recap_fast import RecapReweighter
from recap_fast.ops.launch import Launch, recording
from recap_fast.ops.triton_reweighting import recap_update
from tests.no_sync import ForbidHostSync

PUBLISHED = ("weights", "rates", "instabilities", "priorities")
RETENTION: dict[str, Any] = {"retention": 20.0}


def _published(reweighter: RecapReweighter) -> tuple[str, ...]:
    return PUBLISHED if reweighter.retentions is None else (*PUBLISHED, "retentions")


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


def _poison(reweighter: RecapReweighter) -> None:
    """An update reads nothing of what was published, and writes all of it."""
    for name in _published(reweighter):
        getattr(reweighter, name).fill_(-77.0)


def _compare(one: RecapReweighter, other: RecapReweighter) -> None:
    assert torch.equal(one._counts, other._counts)
    assert torch.equal(one._values, other._values)
    for name in _published(one):
        mine, theirs = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name)
    if one.retentions is not None:
        for entry in ("best", "noise"):
            mine, theirs = one.state_dict()[entry], other.state_dict()[entry]
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, msg=entry)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
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
        _poison(pair[0])
        returned = [reweighter.update(values, given_presence) for reweighter in pair]
        torch.testing.assert_close(*returned, rtol=1e-6, atol=1e-6)
        _compare(*pair)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 9999),
    k=st.integers(1, 8),
    window=st.sampled_from([4, 5, 8, 17]),
    alpha=st.sampled_from([None, 0.3]),
    max_rate=st.sampled_from([None, 0.2, 10.0]),
    retention=st.sampled_from([0.5, 20.0]),
    offset=st.sampled_from([0.0, -1.0, -9.0]),
)
@pytest.mark.variant
def test_retention_equals_the_torch_path(
    seed: int, k: int, window: int, offset: float, **options: Any
) -> None:
    signals = ["reward" if i % 3 else "loss" for i in range(k)]
    pair = [
        make(k, window=window, signals=signals, **options) for make in (_fused, RecapReweighter)
    ]
    for step, (values, present) in enumerate(_steps(seed, 4 * window + 6, k)):
        _poison(pair[0])
        for reweighter in pair:  # quiet, with a jump that is beyond the noise
            reweighter.update(values / 8 + offset + (step > 3 * window), present)
        _compare(*pair)


def test_a_drop_shows_in_one_launch_too() -> None:
    options: dict[str, Any] = {"signals": ["reward", "loss", "loss"], "window": 5, **RETENTION}
    pair = [make(3, **options) for make in (_fused, RecapReweighter)]
    for step, (values, _) in enumerate(_steps(8, 60, 3)):
        lost = torch.tensor([-0.5, 0.5, 0.0]) * (step > 40)
        row = 1 + 0.02 * values.nan_to_num(1.0, 1.0) + lost
        for reweighter in pair:
            reweighter.update(row)
        _compare(*pair)
    assert pair[0].retentions is not None
    assert (pair[0].retentions[:2] > 0.2).all()
    assert pair[0].retentions[2] == 0


@pytest.mark.parametrize("equal", [True, False])
def test_a_window_of_a_thousand(equal: bool) -> None:
    options: dict[str, Any] = {"window": 1000, "temperature": 0.01, "signals": ["reward", "loss"]}
    fused, plain = _fused(2, **options), RecapReweighter(2, **options)
    rows = torch.rand(2003, 2, generator=torch.Generator().manual_seed(1)) + 0.2
    if equal:
        rows = rows[:1].expand_as(rows)
    for row in rows:
        plain.update(row)
    fused.load_state_dict(plain.state_dict())
    for row in rows[:3]:
        fused.update(row)
        plain.update(row)
        _compare(fused, plain)
    if equal:
        torch.testing.assert_close(fused.rates, torch.ones(2))
        assert fused.instabilities.abs().max() < 1e-12
    else:
        assert fused.weights[0] != fused.weights[1]


def test_a_hundred_objectives() -> None:
    pair = [make(100, window=9) for make in (_fused, RecapReweighter)]
    for step in _steps(5, 28, 100):
        for reweighter in pair:
            reweighter.update(*step)
    _compare(*pair)
    assert not torch.equal(pair[0].weights, torch.ones(100))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of the overflow
@pytest.mark.parametrize("max_rate", [None, 10.0])
@pytest.mark.parametrize("values", [(1e200, 2e200), (1e308, 1.7e308), (1e308, 1e-300)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_overflow_shows(values: tuple[float, float], max_rate: float | None, device: str) -> None:
    options: dict[str, Any] = {"window": 2, "max_rate": max_rate}
    fused, plain = _fused(2, device=device, **options), RecapReweighter(2, **options)
    for step in range(4):
        row = torch.tensor([values[step % 2], 1.0 + step], dtype=torch.float64)
        fused.update(row.to(device))
        plain.update(row)
    for name in PUBLISHED:
        mine, theirs = getattr(fused, name).cpu(), getattr(plain, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert fused.weights.isnan().all()


def test_negative_zero_and_tiny_means() -> None:
    pair = [make(3, window=1, max_rate=None) for make in (_fused, RecapReweighter)]
    for row in ([0.0, -1.0, 1e-9], [0.0, 2.0, -1e-9], [-0.0, -2.0, 0.0]):
        for reweighter in pair:
            reweighter.update(torch.tensor(row))
        _compare(*pair)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("options", [{}, RETENTION])
def test_repeats_to_the_bit_and_returns_a_copy(options: dict[str, Any]) -> None:
    runs = []
    for _ in range(2):
        reweighter = _fused(5, window=4, **options)
        kept = [reweighter.update(*step) for step in _steps(1, 60, 5)]
        runs.append(torch.stack(kept))
        assert torch.equal(kept[-1], reweighter.weights)
        assert kept[-1].data_ptr() != reweighter.weights.data_ptr()
    assert torch.equal(*runs)


@pytest.mark.parametrize("options", [{}, RETENTION])
def test_state_goes_from_one_path_to_the_other(options: dict[str, Any]) -> None:
    fused, plain = _fused(4, window=4, **options), RecapReweighter(4, window=4, **options)
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
    launches: list[Launch] = []
    for seed in range(4):
        table = torch.rand(3, 2, generator=torch.Generator().manual_seed(seed))
        values, present = table[:, 1], (table > 0.3)[:, 0]
        for reweighter in pair:
            reweighter.update(values, present)
    _compare(*pair)
    with recording(launches.append):
        pair[0].update(values, present)
    read = [launches[0].arguments[name].data_ptr() for name in ("values_ptr", "present_ptr")]
    assert read == [values.data_ptr(), present.data_ptr()]  # a copy would be a second launch


@pytest.mark.parametrize("options", [{}, RETENTION])
def test_one_launch_and_no_sync(options: dict[str, Any]) -> None:
    reweighter = _fused(3, window=4, **options)
    values, present = torch.rand(3), torch.ones(3, dtype=torch.bool)
    launches: list[Launch] = []
    with ForbidHostSync(), recording(launches.append):
        reweighter.update(values, present)
    assert [launch.grid for launch in launches] == [(1,)]


@pytest.mark.parametrize("options", [{}, RETENTION])
@pytest.mark.parametrize("with_presence", [True, False])
def test_operator(with_presence: bool, options: dict[str, Any]) -> None:
    reweighter = _fused(3, window=4, **options)
    (values, present), *_ = _steps(3, 1, 3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.recap_fast.recap_update.default:
                calls.append((args, kwargs))
            return func(*args, **(kwargs or {}))

    with Recorder():
        reweighter.update(values, present if with_presence else None)
    [(arguments, keywords)] = calls
    torch.library.opcheck(recap_update, arguments, keywords)


@pytest.mark.parametrize("options", [{}, RETENTION])
@pytest.mark.parametrize("in_one_launch", [True, False])
def test_compiles_without_a_graph_break(in_one_launch: bool, options: dict[str, Any]) -> None:
    pair = [RecapReweighter(3, window=4, **options) for _ in range(2)]
    pair[0]._in_one_launch = in_one_launch
    compiled = torch.compile(pair[0].update, fullgraph=True, backend="aot_eager")
    for values, present in _steps(4, 11, 3):
        torch.testing.assert_close(compiled(values, present), pair[1].update(values, present))
    _compare(*pair)


def test_a_cpu_keeps_to_torch() -> None:
    assert not RecapReweighter(2)._in_one_launch  # though the interpreter could


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"window": 3},
        # Numbers that float32 does not hold.
        {"window": 10, "temperature": 1e-3, "alpha": 0.3, "std": "current", "max_rate": 1.1},
        {"window": 40, "temperature": 0.05, "max_rate": None},
        {"window": 10, "retention": 20.3},
    ],
)
def test_on_cuda_one_kernel_and_the_numbers_of_the_cpu(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Filling new memory, as these tests do otherwise, is a kernel too.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    cpu, cuda = RecapReweighter(4, **options), RecapReweighter(4, **options, device="cuda")
    steps = _steps(3, 3 * options["window"], 4)
    moved = [(values.cuda(), present.cuda()) for values, present in steps]
    cuda.update(*moved[0])  # compiles
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with ForbidHostSync("cuda"):
            for step in moved[1:]:
                cuda.update(*step)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert kernels == ["recap_update_kernel"] * (len(moved) - 1)
    for step in steps:
        cpu.update(*step)
    for name in _published(cpu):
        mine, theirs = getattr(cuda, name).cpu(), getattr(cpu, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
def test_on_cuda_the_state_goes_on_elsewhere() -> None:
    cpu, cuda = RecapReweighter(32, window=4), RecapReweighter(32, window=4, device="cuda")
    steps = _steps(4, 30, 32)
    for values, present in steps[:15]:
        cuda.update(values.cuda(), present.cuda())
    cpu.load_state_dict({name: entry.cpu() for name, entry in cuda.state_dict().items()})
    for values, present in steps[15:]:
        cuda.update(values.cuda(), present.cuda())
        cpu.update(values, present)
    for name, entry in cpu.state_dict().items():
        torch.testing.assert_close(
            cuda.state_dict()[name].cpu(), entry, rtol=1e-6, atol=1e-6, equal_nan=True
        )
