"""Each objective's gradient at the hidden states, held against one backward pass an objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from recap_fast.ops import (
    PolicyLossConfig,
    PolicyLossOutput,
    chunked,
    fused_linear_policy_loss,
    gradient_norms,
)
from tests.no_sync import ForbidHostSync
from tests.ops.batches import Batch, batches, random_batch

both = pytest.mark.parametrize("impl", ["torch", "triton"])


def _run(batch: Batch, impl: str, dtype: torch.dtype, **override: Any) -> PolicyLossOutput:
    full = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: dict[str, Any] = {
        name: value.to(full) if value.is_floating_point() else value
        for name, value in batch.tensors.items()
    }
    for name in ("hidden", "weight", "bias"):
        if name in tensors:
            tensors[name] = tensors[name].to(dtype).requires_grad_()
    return fused_linear_policy_loss(
        **tensors | override, config=batch.config, impl=impl, objective_gradients=True
    )


def _gradients(batch: Batch, impl: str, dtype: torch.dtype, **override: Any) -> Tensor:
    found = _run(batch, impl, dtype, **override).objective_gradients
    assert found is not None
    assert not found.requires_grad
    return found


@settings(max_examples=60, deadline=None)
@given(batches())
def test_agrees_with_the_oracle_in_float64(batch: Batch) -> None:
    assume(batch.config.entropy_coef == 0)
    expected = _run(batch, "reference", torch.float64)
    ours = _run(batch, "torch", torch.float64)
    assert ours.objective_gradients is not None
    assert ours.objective_squares is not None
    assert expected.objective_gradients is not None
    assert expected.objective_squares is not None
    torch.testing.assert_close(ours.objective_squares[:, 1], expected.objective_squares[:, 1])
    # Tokens that are left out cost exactness; random weights hardly ever let objectives cancel.
    told = ours.objective_squares[:, 0] == 0
    torch.testing.assert_close(
        ours.objective_gradients[told], expected.objective_gradients[told], rtol=1e-8, atol=1e-9
    )


EXACT, ROUNDED = (torch.float32, 1e-4), (torch.bfloat16, 0.03)  # rows are rounded to 2 ** -9


@pytest.mark.thinned(5)
@both
@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [
        ({}, *EXACT),
        ({}, *ROUNDED),
        ({"rewards": True}, *ROUNDED),
        ({"rollout": True}, *EXACT),
        ({"importance": True, "bias": True, "aggregation": "sequence"}, *ROUNDED),
        # Rounding a log-prob takes tokens over the bounds of the clip.
        ({"old": True, "ref": True, "kl_coef": 0.1}, *EXACT),
        ({"old": True, "loss_type": "cispo"}, *EXACT),
        ({"old": True, "ratio_level": "sequence"}, *EXACT),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_agrees_over_several_chunks(
    impl: str,
    kind: dict[str, Any],
    dtype: torch.dtype,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", 64 * 101)
    batch = random_batch(n=200, h=32, v=101, s=12, **kind)
    expected = _gradients(batch, "reference", torch.float64)
    ours = _gradients(batch, impl, dtype).double()
    error = (ours - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < bound


@both
def test_the_loss_is_the_same_to_the_bit_and_nothing_waits(impl: str) -> None:
    batch = random_batch(n=64)
    plain = batch.run(impl, torch.float32)
    output = _run(batch, impl, torch.float32)
    assert torch.equal(output.loss, plain["loss"])
    if impl == "torch":
        with ForbidHostSync():
            _run(batch, impl, torch.float32)


def test_batches_that_share_denominators_add_up() -> None:
    batch = random_batch(n=60, s=6, supervised=True)
    k = batch.tensors["advantages"].shape[1]
    shared = {"denominators": torch.full((k,), 50.0, dtype=torch.float64)}
    whole = _gradients(batch, "torch", torch.float64, **shared)
    parts = []
    for rows in (slice(0, 25), slice(25, 60)):
        per_token = ("hidden", "targets", "sequence_ids", "token_objectives")
        cut = {name: batch.tensors[name][rows] for name in per_token}
        cut["hidden"] = cut["hidden"].requires_grad_()
        parts.append(_gradients(batch, "torch", torch.float64, **shared | cut))
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_weights_and_loss_scale_leave_them_alone() -> None:
    batch = random_batch(n=60)
    plain = _gradients(batch, "torch", torch.float64)
    others = torch.tensor([3.0, 0.2, 1.7], dtype=torch.float64)
    torch.testing.assert_close(
        _gradients(batch, "torch", torch.float64, objective_weights=others), plain
    )
    scale = torch.tensor(1024.0, dtype=torch.float64)
    for impl in ("torch", "reference"):
        scaled = _gradients(batch, impl, torch.float64, loss_scale=scale)
        torch.testing.assert_close(scaled, plain)


@both
def test_objectives_that_cancel_are_not_told_apart(impl: str) -> None:
    batch = random_batch(n=40, k=2, supervised=False)
    table = torch.tensor([[1.0, -1.0]] * 5, dtype=torch.float64)
    weights = torch.ones(2)
    output = _run(batch, impl, torch.float32, advantages=table.float(), objective_weights=weights)
    assert output.gradient_norms is not None
    assert output.gradient_norms.isnan().all()
    weights = torch.tensor([1.0, 1.2])  # any other weights leave a remainder
    output = _run(batch, impl, torch.float32, advantages=table.float(), objective_weights=weights)
    assert output.gradient_norms is not None
    torch.testing.assert_close(output.gradient_norms[0], output.gradient_norms[1])


@both
def test_what_cancels_in_a_part_is_judged_by_the_whole(impl: str) -> None:
    """Of rewards of 0 and 1 every fifth rollout or so earns one where its group has it as the
    other has not; passes of a few rollouts would hardly ever tell their objectives apart."""
    batch = random_batch(n=80, k=2, s=20, supervised=False)
    table = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    table[3] = torch.tensor([0.9, -0.9])
    arguments = {"advantages": table, "objective_weights": torch.ones(2)}
    whole = _run(batch, impl, torch.float32, **arguments)
    alone = batch.tensors["sequence_ids"] == 3
    cut = {name: batch.tensors[name][alone] for name in ("hidden", "targets", "sequence_ids")}
    cut["hidden"] = cut["hidden"].float().requires_grad_()
    part = _run(batch, impl, torch.float32, **arguments, **cut)
    assert part.gradient_norms is not None
    assert whole.gradient_norms is not None
    assert part.gradient_norms.isnan().all()
    assert whole.gradient_norms.isfinite().all()
    exact = _gradients(batch, "reference", torch.float64, **arguments).norm(dim=1)
    # The share of what was left out bounds how far off the rest may be, in a random direction.
    assert whole.objective_squares is not None
    left_out, square = whole.objective_squares.unbind(1)
    assert (left_out > 0).all()
    assert ((whole.gradient_norms / exact - 1).abs() < 2 * (left_out / square).sqrt()).all()


def test_the_norms_of_a_sum_are_judged_by_its_squares() -> None:
    gradients = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    squares = torch.tensor([[0.1, 1.0], [0.11, 1.0]])
    assert gradient_norms(gradients, squares)[0] == 5
    assert gradient_norms(gradients, squares)[1].isnan()
    assert gradient_norms(gradients * 0, squares * 0).tolist() == [0, 0]


def test_an_objective_without_tokens_pulls_with_nothing() -> None:
    batch = random_batch(n=40, supervised=False)
    table = batch.tensors["advantages"].clone()
    table[:, 1] = torch.nan
    output = _run(batch, "torch", torch.float64, advantages=table)
    assert output.gradient_norms is not None
    assert output.gradient_norms[1] == 0
    assert (output.gradient_norms[[0, 2]] > 0).all()


def test_what_it_cannot_do_is_refused() -> None:
    bonus = random_batch(entropy_coef=0.1)
    with pytest.raises(ValueError, match="wanted entropy_coef=0 beside it, got 0.1"):
        _run(bonus, "torch", torch.float32)
    frozen = random_batch()
    hidden = frozen.tensors["hidden"].float()
    with pytest.raises(ValueError, match="wanted hidden to need a gradient"):
        _run(frozen, "torch", torch.float32, hidden=hidden)
    without = fused_linear_policy_loss(
        **frozen.tensors, config=PolicyLossConfig(max_completion_length=16), impl="torch"
    )
    assert without.objective_gradients is None
    assert without.gradient_norms is None


def test_under_torch_compile() -> None:
    batch = random_batch(n=40)
    expected = _gradients(batch, "torch", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **arguments: fused_linear_policy_loss(**arguments).objective_gradients,
        fullgraph=True,
        backend="aot_eager",
    )
    tensors = {n: v.float() if v.is_floating_point() else v for n, v in batch.tensors.items()}
    tensors["hidden"].requires_grad_()
    found = compiled(**tensors, config=batch.config, impl="torch", objective_gradients=True)
    torch.testing.assert_close(found, expected)
