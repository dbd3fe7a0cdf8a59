"""float16 under a loss scaler: gradients are made of the scaled loss, and divided in backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recap_fast.ops import fused_linear_policy_loss
from recap_fast.ops.launch import recording
from tests.no_sync import ForbidHostSync
from tests.ops.batches import DIFFERENTIABLE, Batch, distance, outputs, random_batch

both = pytest.mark.parametrize("impl", ["torch", "triton"])
EVERYTHING = {"old": True, "ref": True, "kl_coef": 0.1, "entropy_coef": 0.1, "bias": True}
options = pytest.mark.parametrize(
    "options", [{}, EVERYTHING, EVERYTHING | {"ratio_level": "sequence"}, {"rewards": True}]
)
SCALE = 2.0**16  # where torch.amp.GradScaler starts
MANY_TOKENS = 1e6


def _batch(**options: Any) -> Batch:
    """A micro-batch of a large batch, so that each gradient is small."""
    batch = random_batch(n=48, h=16, v=120, s=6, **options)
    batch.tensors["denominators"] = torch.full((3,), MANY_TOKENS, dtype=torch.float64)
    batch.tensors["kl_denominator"] = torch.tensor(MANY_TOKENS, dtype=torch.float64)
    return batch


def _gradients(
    batch: Batch, impl: str, dtype: torch.dtype, scale: Tensor | None, factor: Any = 1.0
) -> dict[str, Tensor]:
    """Those of loss * factor, with the outputs."""
    full = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {k: v.to(full) if v.is_floating_point() else v for k, v in batch.tensors.items()}
    leaves = {
        name: tensors[name].half().to(dtype).requires_grad_()
        for name in DIFFERENTIABLE
        if name in tensors
    }
    output = fused_linear_policy_loss(
        **(tensors | leaves), loss_scale=scale, config=batch.config, impl=impl
    )
    found = torch.autograd.grad(output.loss * factor, list(leaves.values()))
    return dict(zip(leaves, found, strict=True)) | {"outputs": outputs(output)}  # type: ignore[dict-item]


@pytest.mark.thinned(3)
@both
@options
def test_float16_gradients_no_longer_vanish(impl: str, options: dict[str, Any]) -> None:
    batch = _batch(**options)
    scale = torch.tensor(SCALE)
    truth = _gradients(batch, "reference", torch.float64, None)
    without = _gradients(batch, impl, torch.float16, None, SCALE)
    got = _gradients(batch, impl, torch.float16, scale, scale)
    for name, value in truth.items():
        if name == "outputs":
            continue
        size = distance(value, torch.zeros_like(value))
        counts = value != 0
        assert (without[name][counts] == 0).double().mean() > 0.1, name
        assert (got[name][counts] == 0).double().mean() < 0.001, name
        # As far from the truth as float16 rounds, where the gradients that vanish are far from it.
        assert distance(got[name].double() / SCALE, value) < 2e-3 * size, name
        assert distance(without[name].double() / SCALE, value) > 5e-2 * size, name
    for name, value in without["outputs"].items():
        assert torch.equal(got["outputs"][name], value), name


@pytest.mark.thinned(5)
@both
@options
@pytest.mark.parametrize("factor", [SCALE, 1.0, -0.1])
def test_the_gradient_is_right_for_any_factor(
    impl: str, options: dict[str, Any], factor: float
) -> None:
    batch = random_batch(**options)
    plain = _gradients(batch, impl, torch.float32, None)
    got = _gradients(batch, impl, torch.float32, torch.tensor(SCALE), factor)
    for name in got.keys() - {"outputs"}:
        torch.testing.assert_close(got[name], plain[name] * factor)


@both
def test_a_power_of_two_changes_no_bit_where_nothing_underflows(impl: str) -> None:
    batch = random_batch(**EVERYTHING)
    plain = _gradients(batch, impl, torch.float32, None)
    got = _gradients(batch, impl, torch.float32, torch.tensor(SCALE))
    for name in got.keys() - {"outputs"}:
        assert torch.equal(got[name], plain[name]), name


@pytest.mark.thinned(5)
@both
@options
@pytest.mark.parametrize("scale", [1e38, float("inf"), float("nan")])
def test_overflow_reaches_the_gradients_and_not_the_loss(
    impl: str, options: dict[str, Any], scale: float
) -> None:
    batch = random_batch(**options)
    got = _gradients(batch, impl, torch.float16, torch.tensor(scale), torch.tensor(scale))
    for name in got.keys() - {"outputs"}:
        assert not got[name].isfinite().all(), name
    assert got["outputs"]["loss"].isfinite()  # type: ignore[index]


@both
def test_nothing_waits_for_the_factor(impl: str) -> None:
    batch = _batch(**EVERYTHING, importance=True)
    scaler = torch.amp.GradScaler("cpu")
    scale = scaler.scale(torch.ones(()))
    with ForbidHostSync(), recording(lambda _: None):
        _gradients(batch, impl, torch.float16, scale, scale)


def _trained(steps: int, scaler: torch.amp.GradScaler | None, autocast: bool) -> list[Tensor]:
    """Embedding and head after some steps on one batch; steps that a scaler skips do not count."""
    generator = torch.Generator().manual_seed(1)
    batch = _batch()
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in batch.tensors.items()}
    head = tensors["weight"].requires_grad_()
    embedding = torch.randn(50, 16, generator=generator).requires_grad_()
    tokens = torch.randint(0, 50, (48,), generator=generator)
    optimizer = torch.optim.SGD([embedding, head], lr=1e4)
    taken = 0
    while taken < steps:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            hidden = torch.nn.functional.embedding(tokens, embedding).tanh()
            scale = None if scaler is None else scaler.scale(torch.ones(()))
            arguments = tensors | {"hidden": hidden, "loss_scale": scale}
            loss = fused_linear_policy_loss(**arguments, config=batch.config).loss
        if scaler is None:
            loss.backward()
            optimizer.step()
            taken += 1
            continue
        before = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        taken += scaler.get_scale() >= before
    return [embedding.detach(), head.detach()]


def test_training_under_a_scaler_that_starts_too_high() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    start = _trained(0, None, autocast=False)
    expected = _trained(12, None, autocast=False)
    got = _trained(12, scaler, autocast=True)
    assert scaler.get_scale() < 2.0**40  # the first steps were skipped
    vanished = _trained(12, None, autocast=True)
    for before, exact, ours, without in zip(start, expected, got, vanished, strict=True):
        moved = distance(exact, before)
        assert distance(ours, exact) < 0.02 * moved
        assert distance(without, exact) > 0.1 * moved


@pytest.mark.slow
@pytest.mark.variant
@both
def test_a_compiled_caller(impl: str) -> None:
    batch = _batch(**EVERYTHING, importance=True)
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in batch.tensors.items()}

    def step(hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        arguments = tensors | {"hidden": hidden * 2, "weight": weight, "loss_scale": scale}
        output = fused_linear_policy_loss(**arguments, config=batch.config, impl=impl)
        return output.loss * scale

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = [tensors[name].half().requires_grad_() for name in ("hidden", "weight")]
    for scale in (torch.tensor(SCALE), torch.tensor(2 * SCALE)):
        eager, fast = (torch.autograd.grad(run(*leaves, scale), leaves) for run in (step, compiled))
        for expected, got in zip(eager, fast, strict=True):
            torch.testing.assert_close(got, expected)
            assert got.count_nonzero() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_scale": torch.ones(1)}, r"loss_scale: wanted shape \[\], got \[1\]"),
        ({"loss_scale": 65536.0}, r"loss_scale: wanted a tensor of shape \[\], got float"),
        (
            {"loss_scale": torch.ones(()), "weight_grad": torch.zeros(37, 8)},
            "weight_grad: wanted None beside loss_scale, got a tensor",
        ),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_batch().run("torch", torch.float32, **change)
