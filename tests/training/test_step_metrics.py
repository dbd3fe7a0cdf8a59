from __future__ import annotations

import numpy as np
import pytest

from recap_fast.training.step_metrics import (
    column_deviations,
    column_means,
    learnt_something,
    staleness_metrics,
)
from recap_fast.types import Prompt, Rollout


def test_columns_are_averaged_over_what_is_present():
    values = np.array([[1, np.nan, np.nan], [3, np.nan, 2]], np.float32)
    np.testing.assert_allclose(column_means(values), [2, np.nan, 2])
    np.testing.assert_allclose(column_deviations(values), [np.sqrt(2), np.nan, np.nan])
    np.testing.assert_allclose(column_means(np.empty((0, 2), np.float32)), [np.nan, np.nan])


@pytest.mark.parametrize(
    ("norm", "expected"), [(0.5, True), (0.0, False), (None, False), (float("nan"), False),
                           (float("inf"), False)]
)  # fmt: skip
def test_a_step_has_learnt_if_it_had_a_finite_gradient(norm, expected):
    assert learnt_something({"step": 1, "grad_norm": norm}) is expected
    assert not learnt_something({"step": 0, "eval/sums/length": 0.5})


def test_staleness_counts_tokens():
    prompt = Prompt("s", 0, [1], "", None, {})
    rollouts = [
        Rollout(prompt, 0, [1, 2, 3], [0.0] * 3, "stop", "", [4, 4, 5]),
        Rollout(prompt, 0, [1], [0.0], "stop", "", [3]),
    ]
    assert staleness_metrics(rollouts, 5) == {
        "staleness/mean": 1.0,
        "staleness/max": 2,
        "staleness/share_0": 0.25,
        "staleness/share_1": 0.5,
        "staleness/share_2": 0.25,
    }
    assert staleness_metrics([Rollout(prompt, 0, [1], [0.0], "stop", "")], 5) == {}
