"""The metric's arithmetic and the guard's decisions, on engines that are made up."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from recap_fast.config import RolloutConfig
from recap_fast.rollout.mismatch import MismatchGuard, logprob_diff, weight_differences
from recap_fast.rollout.protocol import column_picks, iter_weights
from recap_fast.types import WeightSyncError
from tests.no_sync import ForbidHostSync
from tests.rollout.conftest import random_llama

BLIND = SimpleNamespace(name="made-up", version="3.1", dtype=torch.float32)


class Mirror:
    """Shows the weights that it was given."""

    name, version, dtype = "mirror", "1.0", torch.float32

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)

    def read_columns(self, shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, Tensor]:
        return {
            name: w[:, column_picks(w.shape[1], count)] if w.ndim == 2 else w
            for name, w in self.weights.items()
        }


@pytest.fixture
def model() -> Any:
    return random_llama()


def test_logprob_diff_counts_sampled_tokens_only() -> None:
    ours = torch.tensor([-1.0, -2.0, float("nan"), -4.0], requires_grad=True)
    theirs = torch.tensor([-1.5, -2.0, 0.0, -4.25])
    mean, largest = logprob_diff(ours, theirs, torch.tensor([True, True, False, True]))
    assert mean.item() == pytest.approx(0.25)
    assert largest.item() == pytest.approx(0.5)
    assert not mean.requires_grad


@pytest.mark.parametrize("size", [0, 3])
def test_logprob_diff_without_sampled_tokens_is_zero(size: int) -> None:
    mean, largest = logprob_diff(
        torch.ones(size), torch.zeros(size), torch.zeros(size, dtype=torch.bool)
    )
    assert (mean.item(), largest.item()) == (0.0, 0.0)


def test_logprob_diff_does_not_hide_nan() -> None:
    mean, _ = logprob_diff(torch.tensor([float("nan")]), torch.zeros(1), torch.ones(1))
    assert mean.isnan()


def test_logprob_diff_never_waits_for_the_device() -> None:
    with ForbidHostSync():
        logprob_diff(torch.rand(5), torch.rand(5), torch.ones(5, dtype=torch.bool))


def test_guard_is_silent_below_the_warning(caplog: pytest.LogCaptureFixture) -> None:
    MismatchGuard(RolloutConfig(), BLIND).check(0.09, 9.0, step=1)
    assert caplog.text == ""


def test_guard_warns_then_stops(caplog: pytest.LogCaptureFixture) -> None:
    guard = MismatchGuard(RolloutConfig(max_logprob_diff=0.5, warn_logprob_diff=0.1), BLIND)
    with caplog.at_level(logging.WARNING):
        guard.check(0.2, 0.7, step=4)
    assert "step 4" in caplog.text
    assert "made-up 3.1" in caplog.text
    with pytest.raises(WeightSyncError, match=r"step 5: .*made-up 3\.1.*0\.6 .*tied lm_head"):
        guard.check(0.6, 0.7, step=5)


def test_guard_without_a_maximum_only_warns(caplog: pytest.LogCaptureFixture) -> None:
    MismatchGuard(RolloutConfig(max_logprob_diff=None), BLIND).check(7.0, 9.0, step=1)
    assert "differ from the trainer's by 7" in caplog.text


def test_guard_does_not_take_drift_for_a_mismatch(
    caplog: pytest.LogCaptureFixture, model: Any
) -> None:
    guard = MismatchGuard(RolloutConfig(), Mirror(dict(iter_weights(model))), model)
    guard.check(0.2, 0.7, step=4, staleness=1)
    assert caplog.text == ""
    guard.check(0.2, 0.7, step=1, staleness=0)
    assert "differ from the trainer's by 0.2" in caplog.text
    with pytest.raises(WeightSyncError, match="up to 2 optimizer steps old, .*learning_rate"):
        guard.check(0.6, 0.7, step=5, staleness=2)


def test_guard_names_a_weight_that_is_off_where_tokens_are_old_too(model: Any) -> None:
    weights = {name: tensor.clone() for name, tensor in iter_weights(model)}
    weights["model.norm.weight"] *= 1.5
    with pytest.raises(WeightSyncError, match=r"of 1 of 21 weights: model\.norm\.weight"):
        MismatchGuard(RolloutConfig(), Mirror(weights), model).check(0.6, 0.7, 5, staleness=1)


@pytest.mark.parametrize("maximum", [0.5, None])
def test_guard_stops_at_nan(maximum: float | None) -> None:
    guard = MismatchGuard(RolloutConfig(max_logprob_diff=maximum), BLIND)
    with pytest.raises(WeightSyncError, match="step 2.*diverged"):
        guard.check(float("nan"), float("nan"), step=2)


def test_guard_names_the_weight_that_is_off(model: Any) -> None:
    weights = {name: tensor.clone() for name, tensor in iter_weights(model)}
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] += torch.randn_like(weights[name])
    # An optimizer step since the sync moves everything a little; that is not to be named.
    weights["model.norm.weight"] *= 1 + 1e-4
    with pytest.raises(WeightSyncError, match=rf"of 1 of 21 weights: {name} \(off by"):
        MismatchGuard(RolloutConfig(), Mirror(weights), model).check(1.0, 2.0, step=3)


def test_guard_clears_the_sync_where_all_weights_agree(model: Any) -> None:
    guard = MismatchGuard(RolloutConfig(), Mirror(dict(iter_weights(model))), model)
    with pytest.raises(WeightSyncError, match="other than the sync: .*temperature"):
        guard.check(1.0, 2.0, step=3)


def test_weight_differences_are_zero_only_for_equal_weights(model: Any) -> None:
    weights = {name: tensor.clone() for name, tensor in iter_weights(model)}
    assert set(weight_differences(Mirror(weights), iter_weights(model)).values()) == {0.0}
    weights["model.norm.weight"] *= 1.5
    differences = weight_differences(Mirror(weights), iter_weights(model))
    assert differences["model.norm.weight"] == pytest.approx(1 / 3)
    assert sum(differences.values()) == differences["model.norm.weight"]
