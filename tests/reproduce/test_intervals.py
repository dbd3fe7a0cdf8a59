"""Intervals of means, and how they are shown."""

from __future__ import annotations

import math

import numpy as np

from recap_fast.reproduce.intervals import interval, markdown


def test_an_interval_is_students() -> None:
    found = interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)  # t of 0.975 and 4 degrees, from a table
    assert np.allclose([found.mean, found.low, found.high], [3, 3 - half, 3 + half])
    corrected = interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 0.99)
    assert np.isclose(corrected.high, 3 + 4.6040949 * math.sqrt(2.5) / math.sqrt(5))
    alone = interval(np.array([2.0]))
    assert alone.mean == 2
    assert math.isnan(alone.low)


def test_a_mean_is_shown_with_its_interval_where_there_is_one() -> None:
    found, alone = interval(np.array([1.0, 3.0])), interval(np.array([2.0]))
    assert found.plus_minus() == "2.000 ± 12.706"
    assert found.ends(digits=1) == "2.0 (-10.7 to 14.7)"
    assert alone.plus_minus() == alone.ends() == "2.000"


def test_a_table_has_a_line_under_its_head() -> None:
    assert markdown(["", "a"], [["b", "1"]]) == "|  | a |\n| --- | --- |\n| b | 1 |\n"
