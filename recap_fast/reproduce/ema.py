"""RECAP with exponential averages in place of windows, to compare the two."""

from __future__ import annotations

import torch
from torch import Tensor

from recap_fast.reweighting.base import (
    Reweighter,
    Signal,
    away_from_zero,
    bounded_ratio,
    checked_bound,
    checked_int,
    checked_positive,
)


class EmaRecapReweighter(Reweighter):
    """RECAP's c, i and softmax on three running numbers an objective instead of 2W values.

    An average with decay b looks back b/(1-b) steps on average, so decays are chosen for the mean
    ages of the windows they replace: `fast` (W-1)/2 for the newer window, `slow` W more, by
    averaging `fast` once again, for the older one. The variance is the exponentially weighted one
    with the mean age of all 2W values, corrected for bias as Algorithm 2's is. An objective with
    fewer than 2W values weighs 1, as in `RecapReweighter`.

    Args:
        window: W, the window whose age is matched.
        temperature, max_rate: as in `RecapReweighter`; the priority is c + i.
    """

    def __init__(
        self,
        num_objectives: int,
        window: int = 10,
        temperature: float = 5.0,
        max_rate: float | None = 10.0,
        signals: Signal = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        self.window = checked_int("window", window)
        self.temperature = checked_positive("temperature", temperature)
        self.max_rate = checked_bound("max_rate", max_rate)
        super().__init__(num_objectives, signals, device)
        self._fast = self._buffer("fast", 0.0)
        self._slow = self._buffer("slow", 0.0)
        self._mean = self._buffer("mean", 0.0)
        self._variance = self._buffer("variance", 0.0)
        self._counts = self._buffer("counts", 0, dtype=torch.int64)

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        first = observed & (self._counts == 0)
        for average in (self._fast, self._slow, self._mean):
            average.copy_(torch.where(first, values, average))
        seen = torch.where(observed, values, self._mean)
        fast = torch.lerp(seen, self._fast, _decay((self.window - 1) / 2))
        slow = torch.lerp(fast, self._slow, _decay(self.window))
        decay = _decay((2 * self.window - 1) / 2)
        variance = decay * (self._variance + (1 - decay) * (seen - self._mean).square())
        mean = torch.lerp(seen, self._mean, decay)
        pairs = (
            (self._fast, fast),
            (self._slow, slow),
            (self._mean, mean),
            (self._variance, variance),
        )
        for average, new in pairs:
            average.copy_(torch.where(observed, new, average))
        self._counts.add_(observed)
        ready = self._counts >= 2 * self.window
        c = bounded_ratio(
            torch.where(self._is_reward, self._fast, self._slow),
            torch.where(self._is_reward, self._slow, self._fast),
            self.max_rate,
        )
        # The weights' squares sum to (1-b)/(1+b): what remains of the variance is 2b/(1+b).
        sigma = (self._variance * (1 + decay) / (2 * decay)).sqrt()
        i = sigma / away_from_zero(self._fast + self._slow)
        self.rates.copy_(c.masked_fill(~ready, torch.nan))
        self.instabilities.copy_(i.masked_fill(~ready, torch.nan))
        self._publish_priorities(c + i, ready)
        return (c + i) / self.temperature, ready


def _decay(mean_age: float) -> float:
    return mean_age / (1 + mean_age)
