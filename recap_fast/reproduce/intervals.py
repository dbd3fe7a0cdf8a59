"""Means over seeds with their intervals, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the ends of its interval: nan of a single value."""

    mean: float
    low: float
    high: float

    def ends(self, digits: int = 3) -> str:
        """The mean, and both ends in brackets."""
        if math.isnan(self.low):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"

    def plus_minus(self) -> str:
        half = self.high - self.mean
        return f"{self.mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def interval(values: np.ndarray, level: float = CONFIDENCE) -> Interval:
    """Student's t interval of the mean of values [S], S at least 1."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    quantile = float(student_t.ppf((1 + level) / 2, count - 1))
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of `rows` under `head`."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
