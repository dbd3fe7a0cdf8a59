from __future__ import annotations

import numpy as np
import pytest

from recap_fast.training.step_metrics import (
    column_deviations,
    column_means,
    learnt_something,
)


def testcolumns_are_averaged_over_what_is_present():
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
