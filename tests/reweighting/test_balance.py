"""Weights over the running means of gradient norms, held against a few lines of NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recap_fast.reweighting.balance import DECAY, MOST, TIE, GradientBalance
from tests.no_sync import ForbidHostSync


def _expected(history: np.ndarray, weights: np.ndarray) -> np.ndarray:
    means = np.full(history.shape[1], np.nan)
    for k, norms in enumerate(history.T):
        seen = 0
        for norm in norms:
            if not np.isfinite(norm) or norm <= 0:
                continue
            seen += 1
            share = max(1 / seen, 1 - DECAY)
            means[k] = norm if seen == 1 else (1 - share) * means[k] + share * norm
    strengths = np.where(np.isnan(means), np.exp(np.nanmean(np.log(means))), means)
    inverse = np.clip(np.exp(np.nanmean(np.log(means))) / strengths, 1 / MOST, MOST)
    inverse = np.where(np.isnan(means), np.linspace(1 - TIE, 1 + TIE, len(means)), inverse)
    balanced = weights * inverse
    return balanced * weights.mean() / balanced.mean()


def test_weighs_by_the_inverse_of_the_running_means() -> None:
    rng = np.random.default_rng(0)
    history = rng.lognormal(sigma=1.0, size=(60, 4)) * [30, 2, 0.5, 1]
    history[rng.random(history.shape) < 0.2] = 0
    history[rng.random(history.shape) < 0.1] = np.nan
    history[:, 3] = np.nan  # never seen: of middling strength
    weights = np.array([1.2, 0.8, 1.1, 0.9])
    balance = GradientBalance(4)
    with ForbidHostSync():
        rows = [torch.from_numpy(row) for row in history]
        given = torch.from_numpy(weights).float()
        for row in rows:
            balance.observe(row)
        found = balance.weigh(given)
    np.testing.assert_allclose(found.numpy(), _expected(history, weights), rtol=1e-5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(balance.weights, found)
    torch.testing.assert_close(given * balance.factors, found)


def test_equal_pulls_leave_the_weights() -> None:
    balance = GradientBalance(3)
    weights = torch.tensor([0.5, 1.0, 1.5])
    before = balance.weigh(weights)
    torch.testing.assert_close(before, weights, rtol=2 * TIE, atol=0)
    assert len(set((before / weights).tolist())) == 3, "no two are alike: they could cancel"
    balance.observe(torch.full((3,), 7.0))
    torch.testing.assert_close(balance.weigh(weights), weights)


def test_a_vanishing_pull_is_not_blown_up_without_end() -> None:
    balance = GradientBalance(2)
    balance.observe(torch.tensor([1e-12, 1.0]))
    weights = balance.weigh(torch.ones(2))
    assert weights[0] / weights[1] == pytest.approx(MOST**2)
    assert weights.mean() == pytest.approx(1.0)


def test_one_objective_keeps_its_weight() -> None:
    assert GradientBalance(1).weigh(torch.ones(1)).tolist() == [1]


def test_weights_that_are_all_0_stay_0() -> None:
    balance = GradientBalance(2)
    balance.observe(torch.tensor([1.0, 4.0]))
    assert balance.weigh(torch.zeros(2)).tolist() == [0, 0]
    assert balance.factors.tolist() == [2.0, 0.5]


def test_state_continues_to_the_bit() -> None:
    first, second = GradientBalance(3), GradientBalance(3)
    norms = torch.rand(20, 3)
    for row in norms[:10]:
        first.observe(row)
    second.load_state_dict(first.state_dict())
    for row in norms[10:]:
        first.observe(row)
        second.observe(row)
    assert torch.equal(first.weigh(torch.ones(3)), second.weigh(torch.ones(3)))


def test_refuses_other_shapes() -> None:
    balance = GradientBalance(3)
    with pytest.raises(ValueError, match=r"norms must be \[3\] floating, got \[2\] torch.float32"):
        balance.observe(torch.ones(2))
    with pytest.raises(ValueError, match=r"balance: wanted means \[3\] torch.float64, got none"):
        balance.load_state_dict({})
    with pytest.raises(ValueError, match=r"got \[2\] torch.float64"):
        balance.load_state_dict(GradientBalance(2).state_dict())
    state = balance.state_dict()
    with pytest.raises(ValueError, match=r"wanted counts \[3\] torch.int64, got \[3\] torch.flo"):
        balance.load_state_dict(state | {"counts": torch.ones(3)})
    means = torch.tensor([1, math.nan, 1], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"means below 0 or not finite: \[1.0, nan, 1.0\]"):
        balance.load_state_dict(state | {"means": means})
    with pytest.raises(ValueError, match="num_objectives must be an integer >= 1, got 0"):
        GradientBalance(0)
