from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recap_fast.ops import group_advantages, reference
from tests.no_sync import ForbidHostSync

NAN = float("nan")
impls = pytest.mark.parametrize("impl", ["torch", "triton"])


@impls
def test_matches_numbers_worked_out_by_hand(impl: str) -> None:
    rewards = torch.tensor([[1.0], [0.0], [0.0], [3.0]])
    groups = torch.tensor([7, 7, 7, -2])
    # mean 1/3; unbiased variance ((2/3)^2 + 2 (1/3)^2) / 2 = 1/3
    deviation = (1 / 3) ** 0.5 + 1e-4
    expected = torch.tensor([[2 / 3], [-1 / 3], [-1 / 3], [0.0]])
    leave_one_out = torch.tensor([[1.0], [-0.5], [-0.5], [0.0]])
    for normalize, truth in (
        ("std", expected / deviation),
        ("none", expected),
        ("leave_one_out", leave_one_out),
    ):
        got = group_advantages(rewards, groups, normalize=normalize, impl=impl)
        torch.testing.assert_close(got, truth)


@impls
@pytest.mark.parametrize("normalize", ["std", "none", "leave_one_out"])
def test_equal_rewards_and_lone_members_give_exactly_zero(impl: str, normalize: str) -> None:
    rewards = torch.tensor([[0.1], [0.1], [0.1], [5.0], [NAN]])
    groups = torch.tensor([0, 0, 0, 1, 1])
    advantages = group_advantages(rewards, groups, normalize=normalize, impl=impl)
    assert torch.equal(advantages, torch.zeros(5, 1))


@impls
def test_absent_objectives_leave_their_own_statistics_alone(impl: str) -> None:
    rewards = torch.tensor([[1.0, NAN], [0.0, 2.0], [NAN, 4.0]])
    groups = torch.zeros(3, dtype=torch.int32)
    advantages = group_advantages(rewards, groups, normalize="none", impl=impl)
    assert torch.equal(advantages, torch.tensor([[0.5, 0.0], [-0.5, -1.0], [0.0, 1.0]]))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    s=st.integers(0, 12),
    k=st.integers(1, 8),
    normalize=st.sampled_from(["std", "none", "leave_one_out"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_agrees_with_the_oracle(
    seed: int, s: int, k: int, normalize: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (s, k), generator=generator).to(dtype) / 3
    rewards[torch.randint(0, 3, (s, k), generator=generator) == 0] = NAN
    groups = torch.randint(-5, 5, (s,), generator=generator) * 1000
    with ForbidHostSync():
        got = group_advantages(rewards, groups, normalize=normalize)
    assert got.dtype == dtype
    expected = reference.group_advantages(rewards.double(), groups, normalize)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(4)}, r"rewards: wanted shape \[S, K\], got \[4\]"),
        ({"group_ids": torch.zeros(3)}, r"group_ids: wanted shape \[S=4\], got \[3\]"),
        ({"group_ids": torch.zeros(4)}, "group_ids: wanted dtype int64, .*got float32"),
        ({"rewards": torch.zeros(4, 2).half()}, "rewards: wanted dtype .*got float16"),
        ({"normalize": "max"}, "normalize: wanted one of .*got 'max'"),
        ({"eps": -1.0}, "eps: wanted a number >= 0, got -1.0"),
        ({"impl": "fast"}, "impl: wanted one of .*got 'fast'"),
        ({"impl": "triton", "rewards": torch.zeros(4, 2).double()}, "the operands are float64"),
    ],
)
def test_refuses_bad_arguments(change: dict, message: str) -> None:
    arguments = {"rewards": torch.zeros(4, 2), "group_ids": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        group_advantages(**(arguments | change))
