"""A run's metrics as series, for figures and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

Array = np.ndarray


class RunHistory:
    """A run's metrics as series. Rows of the same step are merged, the later one winning."""

    def __init__(self, rows: Iterable[Mapping[str, float | int | None]]) -> None:
        merged: dict[int, dict[str, float | int | None]] = {}
        for row in rows:
            merged.setdefault(int(row["step"] or 0), {}).update(row)
        self.rows = [merged[step] for step in sorted(merged)]
        """In order of step; a value that was not finite is None."""

    def series(self, key: str) -> tuple[Array, Array]:
        """Steps and values [n] float64 of the rows that have a number under `key`."""
        points = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
        table = np.array(points, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def keys(self, prefix: str) -> list[str]:
        """Keys that start with `prefix`, in order of first appearance."""
        return list(dict.fromkeys(k for row in self.rows for k in row if k.startswith(prefix)))

    @property
    def num_steps(self) -> int:
        """Training steps done."""
        steps, _ = self.series("time/total")
        return int(steps[-1]) if len(steps) else 0
