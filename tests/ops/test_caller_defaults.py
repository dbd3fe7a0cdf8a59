"""The caller's default dtype and default device change nothing: what counts is the arguments'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from recap_fast import make_reweighter
from recap_fast.ops import (
    group_advantages,
    linear_logprobs,
    linear_token_statistics,
    selective_logprobs,
)
from recap_fast.reweighting.recap import REWEIGHTERS
from tests.ops.batches import outputs, random_batch

IMPLEMENTATIONS = ("reference", "torch", "triton")
EVERYTHING = {"old": True, "ref": True, "rollout": True, "bias": True, "spread": 1.0}
PENALTIES = {"kl_coef": 0.1, "entropy_coef": 0.1}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),  # a tensor made there could not be read
}
defaults = pytest.mark.parametrize("default", DEFAULTS)


def assert_unchanged(compute: Callable[[], dict[str, Tensor]], default: str) -> None:
    expected = compute()
    with DEFAULTS[default]():
        got = compute()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].device == value.device, name
        assert torch.equal(got[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


@pytest.mark.thinned(9)
@defaults
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options",
    [
        EVERYTHING | PENALTIES | {"aggregation": "sequence", "kl_estimator": "k2"},
        EVERYTHING | PENALTIES | {"ratio_level": "sequence", "loss_type": "cispo"},
        {"rewards": True, "aggregation": "constant"},
    ],
)
def test_policy_loss(impl: str, options: dict, default: str) -> None:
    batch = random_batch(**options)
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in batch.tensors.items()}
    del tensors["objective_weights"]
    leaves = {k: tensors[k].requires_grad_() for k in ("hidden", "weight", "bias") if k in tensors}

    def compute() -> dict[str, Tensor]:
        from recap_fast.ops import fused_linear_policy_loss

        output = fused_linear_policy_loss(
            **tensors, config=batch.config, impl=impl, kl_denominator=1237
        )
        gradients = torch.autograd.grad(output.loss, list(leaves.values()))
        named = {f"d_{k}": g for k, g in zip(leaves, gradients, strict=True)}
        return outputs(output) | named

    assert_unchanged(compute, default)


@pytest.mark.thinned(3)
@defaults
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_logprobs(impl: str, default: str) -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.tensor([1, 8, -100, 0, 3, 3])

    def compute() -> dict[str, Tensor]:
        linear = linear_logprobs(hidden, weight, targets, temperature=0.7, impl=impl)
        selective = selective_logprobs(hidden @ weight.T, targets, temperature=0.7, impl=impl)
        more = linear_token_statistics(hidden, weight, targets, temperature=0.7, impl=impl)
        fields = [getattr(more, name) for name in type(more).__dataclass_fields__]
        total = sum(x.sum() for x in (*linear, *selective, *fields))
        found = [*linear, *selective, *fields, *torch.autograd.grad(total, [hidden, weight])]
        return {str(i): x.detach() for i, x in enumerate(found)}

    assert_unchanged(compute, default)


@pytest.mark.thinned(5)
@defaults
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalize", ["std", "none", "leave_one_out"])
def test_advantages(impl: str, normalize: str, default: str) -> None:
    rewards = torch.rand(12, 3)
    rewards[2, 1] = torch.nan
    groups = torch.arange(12) // 4

    def compute() -> dict[str, Tensor]:
        return {"": group_advantages(rewards, groups, normalize=normalize, impl=impl)}

    assert_unchanged(compute, default)


@defaults
@pytest.mark.parametrize("name", sorted(REWEIGHTERS))
def test_reweighters(name: str, default: str) -> None:
    values = torch.rand(20, 3)
    options = {"weights": [0.3, 1.0, 2.0]} if name == "static" else {}

    def compute() -> dict[str, Tensor]:
        reweighter = make_reweighter(name, 3, device="cpu", **options)
        steps = [reweighter.update(step, deviations=step / 3) for step in values]
        return {"weights": torch.stack(steps)} | reweighter.state_dict()

    assert_unchanged(compute, default)
