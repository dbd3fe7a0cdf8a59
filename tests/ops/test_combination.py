from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recap_fast.ops import (
    PolicyLossConfig,
    combined_advantages,
    fused_linear_policy_loss,
    group_advantages,
    reference,
)
from tests.no_sync import ForbidHostSync

NAN = float("nan")
METHODS = ("gdpo", "gd2po", "dvao")
methods = pytest.mark.parametrize("method", METHODS)


def draw(seed: int, s: int, k: int, absent: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [S, K] float64 with ties and holes, and groups [S]."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (s, k), generator=generator).double() / 3
    rewards[torch.rand(s, k, generator=generator) < absent] = NAN
    return rewards, torch.randint(-5, 5, (s,), generator=generator) * 1000


def test_gdpo_worked_out_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]).double()
    groups = torch.tensor([0, 0, 1, 1])
    a = 0.5**0.5  # of the better of two, in units of their unbiased deviation
    # Sums of the two objectives' advantages: a, -a, 2a, -2a, of which the second weighs half.
    combined = np.array([a, -a, 1.5 * a, -1.5 * a])
    wanted = combined / np.std(combined, ddof=1)
    weights = torch.tensor([1.0, 0.5]).double()
    got = combined_advantages(rewards, groups, weights, method="gdpo", eps=0.0)
    np.testing.assert_allclose(got.numpy(), np.stack([wanted, wanted], axis=1), rtol=1e-12)


def test_gd2po_masks_rollouts_whose_objectives_disagree() -> None:
    rewards = torch.tensor(
        [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [3.0, NAN], [2.0, NAN]]
    ).double()
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    a = 0.5 / (1 / 3) ** 0.5  # one of two that have 1 among four: deviation sqrt(1/3)
    b = 0.5**0.5
    # Rows 0 and 1 conflict: half of group 0 is left, and so is half of its advantage.
    combined = np.array([0.5 * 2 * a, -0.5 * 2 * a, b, -b])
    wanted = combined / np.std(combined, ddof=1)
    got = combined_advantages(rewards, groups, torch.ones(2).double(), method="gd2po", eps=0.0)
    np.testing.assert_allclose(got[:, 0].numpy(), [0, 0, *wanted], rtol=1e-12)
    assert torch.equal(got[:4, 1], got[:4, 0])
    assert torch.equal(got[4:, 1], torch.zeros(2).double())


def test_gd2po_gives_what_has_no_signal_its_part_of_the_mean() -> None:
    """Masking leaves a mean, which the authors' code takes from every unmasked rollout."""
    rewards = torch.tensor(
        [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    ).double()  # the last two are a group without a signal
    groups = torch.tensor([0, 0, 0, 1, 1])
    got = combined_advantages(rewards, groups, torch.ones(2).double(), method="gd2po", eps=0.0)
    # Unmasked are row 2 with some V and the last two with 0: thirds of it, whitened.
    wanted = np.array([2 / 3, -1 / 3, -1 / 3]) / (1 / 3) ** 0.5
    np.testing.assert_allclose(got[:, 0].numpy(), [0, 0, *wanted], rtol=1e-12, atol=1e-15)


def test_an_objective_without_weight_makes_no_conflict() -> None:
    rewards, groups = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, dtype=torch.int64)
    both = combined_advantages(rewards, groups, torch.tensor([1.0, 1.0]), method="gd2po")
    one = combined_advantages(rewards, groups, torch.tensor([1.0, 0.0]), method="gd2po")
    assert not both.any()
    assert one[0, 0] > 0 > one[1, 0]


def test_rounding_makes_no_conflict() -> None:
    """The second reward of the last rollout is the mean of its group, up to float32."""
    rewards = torch.tensor([[0.0, 0.1], [0.0, 0.3], [1.0, 0.2]])
    groups = torch.zeros(3).int()
    assert group_advantages(rewards.double(), groups)[2, 1] < -1e-8
    got = combined_advantages(rewards, groups, torch.ones(2), method="gd2po")
    assert got[2].all()


def test_dvao_weighs_by_the_deviation_in_the_group() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 1.0], [0.0, 1.0]]).double()
    groups = torch.zeros(4, dtype=torch.int64)
    weights = torch.tensor([2.0, 1.0]).double()
    values = rewards.numpy()
    sigma = values.std(0, ddof=1)
    share = np.array([2.0, 1.0]) * sigma / (2 * sigma[0] + sigma[1])
    wanted = ((values - values.mean(0)) / sigma) @ share
    got = combined_advantages(rewards, groups, weights, method="dvao", eps=0.0)
    np.testing.assert_allclose(got[:, 0].numpy(), wanted, rtol=1e-12)
    # Proposition 2: never above the advantage of the summed reward, for any group.
    summed = values @ np.array([2.0, 1.0])
    bound = np.abs(summed - summed.mean()) / summed.std(ddof=1)
    assert (np.abs(wanted) <= bound + 1e-12).all()


@methods
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    s=st.integers(0, 16),
    k=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_agrees_with_the_published_formulas(
    method: str, seed: int, s: int, k: int, dtype: torch.dtype
) -> None:
    rewards, groups = draw(seed, s, k)
    weights = torch.rand(k, generator=torch.Generator().manual_seed(seed)).double()
    with ForbidHostSync():
        got = combined_advantages(rewards.to(dtype), groups, weights.to(dtype), method=method)
    assert got.dtype == dtype
    given = rewards.to(dtype).double(), groups, weights.to(dtype).double()
    wanted = reference.combined_advantages(*given, method)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-8}
    torch.testing.assert_close(got.double(), wanted, **close)


@methods
def test_one_reward_alone_keeps_its_order_and_gets_one_scale(method: str) -> None:
    rewards, groups = draw(3, 40, 1, absent=0.2)
    alone = group_advantages(rewards, groups)
    got = combined_advantages(rewards, groups, torch.tensor([3.0]).double(), method=method)
    has = alone != 0
    scale = (got / alone)[has]
    torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-3, atol=0)
    if method == "dvao":
        torch.testing.assert_close(got, alone)
    else:
        assert float(got[~rewards.isnan()].std()) == pytest.approx(1, rel=1e-3)


@methods
def test_nothing_to_tell_apart_gives_exactly_zero(method: str) -> None:
    rewards = torch.tensor([[0.1, NAN], [0.1, NAN], [NAN, 0.7], [NAN, NAN]])
    groups = torch.tensor([0, 0, 1, 1])
    got = combined_advantages(rewards, groups, torch.ones(2), method=method)
    assert torch.equal(got, torch.zeros(4, 2))
    assert torch.equal(
        combined_advantages(rewards, groups, torch.zeros(2), method=method), torch.zeros(4, 2)
    )


class Batch:
    """Eight rollouts of two groups with three rewards each, and what the loss needs of a model."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # Rewards that agree enough for GD2PO to leave some rollouts.
        self.rewards = normal(8, 1) + 0.5 * normal(8, 3)
        self.groups = torch.arange(8) // 4
        self.hidden, self.head = normal(40, 6), normal(11, 6)
        self.targets = torch.randint(0, 11, (40,), generator=generator)
        logprobs = torch.log_softmax(self.hidden @ self.head.T, dim=-1)
        self.old = logprobs.gather(1, self.targets[:, None])[:, 0] + 0.4 * normal(40)

    def gradient(self, advantages: torch.Tensor, **options: Any) -> torch.Tensor:
        """Of the loss by the hidden states, [N, H]."""
        hidden = self.hidden.clone().requires_grad_()
        ids = torch.arange(8).repeat_interleave(5).int()
        output = fused_linear_policy_loss(
            hidden, self.head, self.targets, sequence_ids=ids, advantages=advantages, **options
        )
        output.loss.backward()
        assert hidden.grad is not None
        self.clip_fraction = float(output.clip_fraction.max())
        return hidden.grad


@methods
@pytest.mark.parametrize("loss_type", ["clip", "cispo"])
def test_the_loss_is_that_of_the_published_advantage(
    method: Any, loss_type: Literal["clip", "cispo"]
) -> None:
    """With all objectives in all rollouts, sum_k lambda_k / K L_k is mean(lambda) times the loss of
    one objective with the combined advantage, clipped tokens included."""
    batch, lambdas = Batch(), torch.tensor([0.5, 1.0, 1.5]).double()
    table = combined_advantages(batch.rewards, batch.groups, lambdas, method=method)
    options = {"old_logprobs": batch.old, "config": PolicyLossConfig(loss_type=loss_type)}
    got = batch.gradient(table, objective_weights=lambdas, **options)
    assert 0 < batch.clip_fraction < 1
    torch.testing.assert_close(got, batch.gradient(table[:, :1].contiguous(), **options))


def test_gdpo_is_group_advantages_times_a_number_where_nothing_is_clipped() -> None:
    batch, ones = Batch(), torch.ones(3).double()
    alone = group_advantages(batch.rewards, batch.groups)
    table = combined_advantages(batch.rewards, batch.groups, ones, method="gdpo", eps=0.0)
    number = 3 / float(alone.sum(dim=1).std())
    # The advantages' own eps of 1e-4 is in one of the two alone.
    torch.testing.assert_close(
        batch.gradient(table), number * batch.gradient(alone), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(4)}, r"rewards: wanted shape \[S, K\], got \[4\]"),
        ({"group_ids": torch.zeros(3)}, r"group_ids: wanted shape \[S=4\], got \[3\]"),
        ({"weights": torch.ones(3)}, r"weights: wanted shape \[K=2\], got \[3\]"),
        ({"method": "group"}, "method: wanted one of .*got 'group'"),
        ({"eps": -1.0}, "eps: wanted a number >= 0, got -1.0"),
    ],
)
def test_refuses_bad_arguments(change: dict, message: str) -> None:
    arguments = {
        "rewards": torch.zeros(4, 2),
        "group_ids": torch.zeros(4, dtype=torch.int64),
        "weights": torch.ones(2),
        "method": "gdpo",
    }
    with pytest.raises(ValueError, match=message):
        combined_advantages(**(arguments | change))
