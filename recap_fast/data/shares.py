"""The sources' shares of the rows, and how many each source gives to a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recap_fast.config import DataConfig

_SMOOTHING = 0.1
"""Of each step in the pulls: about ten steps count. A window's noise shall not change the mix."""
_SMALLEST_PULL = 1e-6
"""Of any source, so that shares which add up to 1 exist within every bound."""


def mixing_shares(config: DataConfig, sizes: Mapping[str, int]) -> list[float]:
    """Share of every source in a step's rows, in the order of `config.sources`; they add up to 1.

    "uniform" gives all sources the same, "proportional" goes by their training rows (the paper's
    PropMix), "coreset" gives the replay sources together half the rows of the others, equally
    within each of the two (the paper's Coreset). Explicit ratios are normalised; sources that they
    leave out get nothing. Of adaptive shares it is what they start from.
    """
    sources, mixing = config.sources, config.base_mixing
    if isinstance(mixing, dict):
        ratios = [mixing.get(source.name, 0.0) for source in sources]
    elif mixing == "proportional":
        ratios = [float(sizes[source.name]) for source in sources]
    elif mixing == "coreset":
        num_replay = sum(source.is_replay for source in sources)
        replay, others = 1 / max(num_replay, 1), 2 / max(len(sources) - num_replay, 1)
        ratios = [replay if source.is_replay else others for source in sources]
    else:
        ratios = [1.0] * len(sources)
    return [ratio / sum(ratios) for ratio in ratios]


def allocate(shares: Sequence[float], drawn: Sequence[float], batch_size: int) -> list[int]:
    """How many of the next `batch_size` rows each source gives.

    Row by row, the source that is furthest behind its share of all rows so far is next; the first
    of them on a tie. Random draws would give the same shares on average, but a different mix in
    every step, and that noise would reach the objectives' windows and pass there for instability.

    Args:
        shares: they add up to 1.
        drawn: rows that each source has given before.
    """
    counts = [0] * len(shares)
    total = sum(drawn)
    for _ in range(batch_size):
        total += 1
        deficits = [
            share * total - before - now if share else -np.inf
            for share, before, now in zip(shares, drawn, counts, strict=True)
        ]
        counts[int(np.argmax(deficits))] += 1
    return counts


class AdaptiveShares:
    """Shares that follow the weights of the objectives, and what each source is owed of the rows.

    A source's pull is the mean weight of its objectives over the mean pull of all sources: 1 at the
    start, and smoothed. Its share is what it started from times its pull, within bounds. All of it
    is arithmetic of the host on what a step reports, so that it is the same in every process.

    Attributes:
        shares: of the rows to come, one per source; they add up to 1.

    Args:
        base: shares to start from, one per source; they add up to 1. A source with 0 stays there.
        most: above 1; a share stays within [base / most, base * most].
        objectives: names of those that each source carries.
    """

    def __init__(
        self, base: Sequence[float], most: float, objectives: Sequence[Sequence[str]]
    ) -> None:
        self.shares = list(base)
        self._base, self._most, self._objectives = list(base), most, objectives
        self._pulls = [1.0] * len(base)
        self._owed = [0.0] * len(base)

    def follow(self, weights: Mapping[str, float]) -> None:
        """Sets the shares by a step's weights, of all objectives by name."""
        means = [float(np.mean([weights[name] for name in names])) for names in self._objectives]
        mean = sum(base * pull for base, pull in zip(self._base, means, strict=True))
        if mean > 0:  # else the weight is all on objectives that no source has a share for
            self._pulls = [
                pull + _SMOOTHING * (new / mean - pull)
                for pull, new in zip(self._pulls, means, strict=True)
            ]
            self.shares = bounded_shares(self._base, self._pulls, self._most)

    def allocate(self, batch_size: int) -> list[int]:
        """How many of the next `batch_size` rows each source gives.

        Rows that a source is owed are those by its shares as they were when each row was drawn: a
        change of the shares acts on the next row, and none has to be made up for. A source is never
        owed as much as one row for each of the other sources, and so waits for no longer than
        (number of sources) / share rows.
        """
        counts = allocate(self.shares, [-owed for owed in self._owed], batch_size)
        self._owed = [
            owed + share * batch_size - count
            for owed, share, count in zip(self._owed, self.shares, counts, strict=True)
        ]
        return counts

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"pulls": list(self._pulls), "owed": list(self._owed), "shares": list(self.shares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._pulls, self._owed = list(state["pulls"]), list(state["owed"])
        self.shares = list(state["shares"])


def bounded_shares(base: Sequence[float], pulls: Sequence[float], most: float) -> list[float]:
    """Shares in proportion to base * pull, as far as each stays within [base / most, base * most].

    They are base * clip(scale * pull, 1 / most, most) with the one scale at which they add up to 1:
    what a bound takes from a source, or gives it, is shared by those that are within theirs.

    Args:
        base: at least 0; they add up to 1.
        pulls: at least 0, one per source.
        most: above 1.
    """
    bounds = 1 / most, most
    pulls = [max(pull, _SMALLEST_PULL) for pull in pulls]

    def shares(scale: float) -> list[float]:
        return [
            share * min(max(scale * pull, bounds[0]), bounds[1])
            for share, pull in zip(base, pulls, strict=True)
        ]

    # Their sum is piecewise linear in the scale, from 1 / most to most.
    scales = sorted(bound / pull for pull in pulls for bound in bounds)
    sums = [sum(shares(scale)) for scale in scales]
    upper = int(np.searchsorted(sums, 1.0))
    lower = upper - 1
    part = (1 - sums[lower]) / (sums[upper] - sums[lower])
    return shares(scales[lower] + part * (scales[upper] - scales[lower]))
