from __future__ import annotations

import numpy as np

from recap_fast.training.step_metrics import column_deviations, column_means


def testcolumns_are_averaged_over_what_is_present():
    values = np.array([[1, np.nan, np.nan], [3, np.nan, 2]], np.float32)
    np.testing.assert_allclose(column_means(values), [2, np.nan, 2])
    np.testing.assert_allclose(column_deviations(values), [np.sqrt(2), np.nan, np.nan])
    np.testing.assert_allclose(column_means(np.empty((0, 2), np.float32)), [np.nan, np.nan])
