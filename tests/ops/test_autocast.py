"""The head's operations follow torch.autocast as torch.nn.functional.linear does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recap_fast.ops import linear_logprobs
from tests.ops.batches import random_batch

impls = pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
HALVES = (torch.bfloat16, torch.float16)


def _policy_loss(hidden: Tensor, impl: str) -> dict[str, Tensor]:
    # Ratios of sequences, whose means the reference takes by matrix products.
    batch = random_batch(old=True, bias=True, ratio_level="sequence", clip_low=0.9, clip_high=9.0)
    return batch.run(impl, torch.float32, hidden=hidden)


def _logprobs(hidden: Tensor, impl: str) -> dict[str, Tensor]:
    batch = random_batch()
    weight = batch.tensors["weight"].float().requires_grad_()
    logprobs, entropy = linear_logprobs(hidden, weight, batch.tensors["targets"], impl=impl)
    total = (logprobs * torch.linspace(-1, 2, 40)).sum() + entropy.sum()
    gradients = torch.autograd.grad(total, [hidden, weight])
    return dict(zip(("d_hidden", "d_weight"), gradients, strict=True)) | {
        "logprobs": logprobs.detach(), "entropy": entropy.detach(),
    }  # fmt: skip


operations = pytest.mark.parametrize("operation", [_policy_loss, _logprobs])
Operation = Callable[[Tensor, str], dict[str, Tensor]]


def _hidden(dtype: torch.dtype) -> Tensor:
    return random_batch().tensors["hidden"].to(dtype).requires_grad_()


@pytest.mark.thinned(4)
@impls
@operations
@pytest.mark.parametrize(
    ("dtype", "half"), [(torch.float32, HALVES[0]), (torch.float32, HALVES[1]), HALVES]
)
def test_hidden_is_cast_as_linear_casts_it(
    impl: str, operation: Operation, dtype: torch.dtype, half: torch.dtype
) -> None:
    hidden = _hidden(dtype)
    with torch.autocast("cpu", half):
        got = operation(hidden, impl)
        assert torch.nn.functional.linear(hidden, torch.zeros(3, 8, dtype=dtype)).dtype == half
    expected = operation(hidden.detach().to(half).requires_grad_(), impl)
    assert got["d_hidden"].dtype == dtype
    expected["d_hidden"] = expected["d_hidden"].to(dtype)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_float64_is_left_alone(impl: str) -> None:
    batch = random_batch(old=True, ratio_level="sequence")
    expected = batch.run(impl, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = batch.run(impl, torch.float64)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.thinned(4)
@impls
@operations
def test_autocast_that_is_off_changes_nothing(impl: str, operation: Operation) -> None:
    expected = operation(_hidden(torch.float32), impl)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        got = operation(_hidden(torch.float32), impl)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_a_compiled_caller_follows_it() -> None:
    """Autocast around the compiled function, and within it."""
    batch = random_batch()
    weight, targets = batch.tensors["weight"].float(), batch.tensors["targets"]

    def score(hidden: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, targets)[0]

    def score_in_bfloat16(hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return score(hidden)

    def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    hidden = _hidden(torch.float32)
    plain, expected = score(hidden), score_in_bfloat16(hidden)
    assert not torch.equal(plain, expected)
    assert torch.equal(compiled(score_in_bfloat16)(hidden), expected)
    around = compiled(score)
    assert torch.equal(around(hidden), plain)
    with torch.autocast("cpu", torch.bfloat16):
        got = around(hidden)
    assert torch.equal(got, expected)
    gradients = [torch.autograd.grad(x.sum(), hidden)[0] for x in (got, expected)]
    assert torch.equal(*gradients)
