"""Objective weights from recent values: RECAP, and every method by its name.

`reweighting_base.py` says what all methods share, `reweighting_baselines.py` has the other ones.
Shapes: K objectives, W the window in steps.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from recap_fast.ops._validate import resolve_impl
from recap_fast.reweighting.base import (
    MIN_DENOMINATOR,
    Reweighter,
    Signal,
    WindowedReweighter,
    away_from_zero,
    bounded_ratio,
    checked_bound,
    checked_int,
    checked_positive,
    is_number,
)
from recap_fast.reweighting.baselines import (
    DwaReweighter,
    FamoReweighter,
    RlwReweighter,
    SawReweighter,
    ScaleInvariantReweighter,
    StaticReweighter,
    UniformReweighter,
    UwReweighter,
)

__all__ = [
    "MIN_DENOMINATOR",
    "PRESETS",
    "REWEIGHTERS",
    "Deviation",
    "DwaReweighter",
    "FamoReweighter",
    "RecapReweighter",
    "Reweighter",
    "RlwReweighter",
    "SawReweighter",
    "ScaleInvariantReweighter",
    "Signal",
    "StaticReweighter",
    "UniformReweighter",
    "UwReweighter",
    "make_reweighter",
]

Deviation = Literal["window", "current"]

NOISE_MULTIPLE = 4.0
"""Deviations of a windowed mean that count as noise, on either side of a drop."""

NOISE_MEMORY = 10
"""Windows over which the long-run estimate of the noise averages."""

MIN_RETENTION_WINDOW = 4
"""Fewer values say too little of their own noise."""


class RecapReweighter(WindowedReweighter):
    """RECAP's dynamic weights (arXiv 2510.21978v2, Algorithm 2). One kernel launch on CUDA.

    With mu the mean of the last W values, mu~ that of the W before, and sigma the deviation of
    the 2W: rate c = mu~/mu for a loss and mu/mu~ for a reward, instability i = sigma/(mu + mu~),
    priority s = c + i, weight = K softmax(s/T). An objective with fewer than 2W values weighs 1.

    `retention` is ours, not the paper's, in which forgetting lowers c and with it the weight: it
    adds `retention` times r, the relative drop of mu below the best windowed mean so far, beyond
    what noise explains. For a reward

        r = max(0, best - m e - mu) / max(|best|, m e),    best = max over the steps of mu - m e,

    and for a loss the same with mu's sign turned. e is the deviation of mu:
    e^2 = max(v, v') / W, where v is half the mean square of the differences between successive
    values (von Neumann et al. 1941: a trend hardly enters it) over the last W values and v' is v
    over the last 10 W or so. Because each mean pays for its own noise before it may become the
    best, a long run does not inflate the best. m = 4 is from a simulation of stationary noise:
    normal, uniform, exponential, lognormal, Student's t, means of 1 to 32 binary rewards with p
    from 0.05 to 0.995. Over 1,500 steps r is above 0 in at most 0.04 % of them at W = 10 and in
    0.23 % at W = 4; with m = 3 in up to 0.42 % at W = 10. A lasting drop shows from 5 to 6 e on.
    With `retention` an objective takes part from W values on, at c = 1 and i = 0 until it has 2W.

    Values should be of one sign, as losses and rewards from 0 up are: then i <= sqrt(W/2). Where
    mu + mu~ crosses zero, i is bounded by `MIN_DENOMINATOR` only.

    Args:
        num_objectives: K.
        window: W, in values of the objective (steps in which it was present).
        temperature: T. Small: winner takes all; large: uniform.
        alpha: None: s = c + i (Algorithm 1); a number in [0, 1]: s = alpha c + (1 - alpha) i.
        signals: "loss" or "reward", one word or one per objective.
        std: sigma's centre: "window", the mean of the 2W values (Algorithm 2), or "current", mu
            (Section 4). Both divide by 2W - 1.
        max_rate: c is clamped to [-max_rate, max_rate], so that a reward which leaves 0 does not
            take all the weight, and r to at most max_rate; None: no clamp.
        retention: the factor of r in s, with and without alpha. A drop of d raises the objective's
            share by about the factor exp(retention d / T). 0: no r, `retentions` is None and the
            state has no entries for it.
        device: where the buffers live; None: torch's default device.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        num_objectives: int,
        window: int = 10,
        temperature: float = 5.0,
        alpha: float | None = None,
        signals: Signal | Sequence[Signal] = "loss",
        std: Deviation = "window",
        max_rate: float | None = 10.0,
        retention: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        self.window = checked_int("window", window)
        self.temperature = checked_positive("temperature", temperature)
        self.max_rate = checked_bound("max_rate", max_rate)
        if alpha is not None and not (is_number(alpha) and 0 <= alpha <= 1):
            raise ValueError(f"alpha must be None or a number in [0, 1], got {alpha!r}")
        if std not in get_args(Deviation):
            raise ValueError(f"std must be one of {get_args(Deviation)}, got {std!r}")
        if not is_number(retention) or retention < 0:
            raise ValueError(f"retention must be a finite number >= 0, got {retention!r}")
        if retention > 0 and window < MIN_RETENTION_WINDOW:
            raise ValueError(
                f"window must be >= {MIN_RETENTION_WINDOW} with retention > 0, got {window}"
            )
        self.alpha = alpha
        self.std = std
        self.retention = retention
        super().__init__(num_objectives, 2 * window, signals, device)
        self._best: Tensor | None = None
        self._noise: Tensor | None = None
        if retention > 0:
            self._best = self._buffer("best", math.inf)
            self._best.masked_fill_(self._is_reward, -math.inf)
            self._noise = self._buffer("noise", 0.0)
            self.retentions = self._buffer("retentions", math.nan, dtype=torch.float32)
        self._in_one_launch = resolve_impl("auto", self.device, torch.float32) == "triton"

    def _advance(self, values: Tensor, present: Tensor | None, deviations: Tensor | None) -> Tensor:
        if not self._in_one_launch:
            return super()._advance(values, present, deviations)
        from recap_fast.ops.triton_reweighting import recap_update

        return recap_update(
            values,
            present,
            self._is_reward,
            ring=self._values,
            counts=self._counts,
            weights=self.weights,
            rates=self.rates,
            instabilities=self.instabilities,
            priorities=self.priorities,
            best=self._best,
            noise=self._noise,
            retentions=self.retentions,
            temperature=self.temperature,
            alpha=self.alpha,
            max_rate=self.max_rate,
            from_current_mean=self.std == "current",
            retention=self.retention,
        )

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self._follow_noise(values, observed)
        self._push(values, observed)
        ready = full = self._counts >= len(self._slots)
        mu, mu_before = self._window_means()
        c = bounded_ratio(
            torch.where(self._is_reward, mu, mu_before),
            torch.where(self._is_reward, mu_before, mu),
            self.max_rate,
        )
        sigma = self._deviation_from(mu if self.std == "current" else (mu + mu_before) / 2)
        i = sigma / away_from_zero(mu + mu_before)
        self.rates.copy_(c.masked_fill(~full, math.nan))
        self.instabilities.copy_(i.masked_fill(~full, math.nan))
        if self.retentions is not None:
            ready = self._counts >= self.window
            c, i = c.masked_fill(~full, 1.0), i.masked_fill(~full, 0.0)
        s = c + i if self.alpha is None else self.alpha * c + (1 - self.alpha) * i
        if self.retentions is not None:
            r = self._drop(mu, ready)
            self.retentions.copy_(r.masked_fill(~ready, math.nan))
            s = s + self.retention * r
        self._publish_priorities(s, ready)
        return s / self.temperature, ready

    def _follow_noise(self, values: Tensor, observed: Tensor) -> None:
        """Average in half the square of the step from the last value to `values` [K]."""
        if self._noise is None:
            return
        square = (values - self._last_values()).square() / 2
        share = 1.0 / self._counts.clamp(1, NOISE_MEMORY * self.window).double()
        noise = self._noise * (1 - share) + square * share
        self._noise.copy_(torch.where(observed & (self._counts > 0), noise, self._noise))

    def _drop(self, mu: Tensor, ready: Tensor) -> Tensor:
        """r [K], after `mu` [K] has had its chance to become the best."""
        assert self._best is not None
        assert self._noise is not None
        variance = torch.maximum(self._successive_variance(), self._noise)
        floor = NOISE_MULTIPLE * (variance / self.window).sqrt()
        height = torch.where(self._is_reward, mu, -mu)
        best = torch.where(self._is_reward, self._best, -self._best)
        best = torch.where(ready & (height - floor > best), height - floor, best)
        self._best.copy_(torch.where(self._is_reward, best, -best))
        drop = (best - floor - height).clamp_min(0)
        return bounded_ratio(drop, torch.maximum(best.abs(), floor), self.max_rate)


REWEIGHTERS: dict[str, type[Reweighter]] = {
    "recap": RecapReweighter,
    "uniform": UniformReweighter,
    "static": StaticReweighter,
    "dwa": DwaReweighter,
    "rlw": RlwReweighter,
    "uw": UwReweighter,
    "scale_invariant": ScaleInvariantReweighter,
    "famo": FamoReweighter,
    "saw": SawReweighter,
}


PRESETS: dict[str, dict[str, Any]] = {
    # Algorithm 2 has neither a clamp nor retention. The other values are our defaults too
    # (docs/recap.md says why), but stay what they are here if those change.
    "paper": {
        "window": 10,
        "temperature": 5.0,
        "alpha": None,
        "std": "window",
        "max_rate": None,
        "retention": 0.0,
    },
}
"""Named parameters of "recap"."""


def make_reweighter(
    name: str, num_objectives: int, *, preset: str | None = None, **keywords: Any
) -> Reweighter:
    """The reweighter called `name`, for K objectives. Every method takes `signals` and `device`.

    Args:
        preset: for "recap", a name in `PRESETS`, whose parameters `keywords` go before.

    Raises:
        ValueError: an unknown name, preset or keyword (the nearest valid one is named), a missing
            keyword, or a value outside its range.
    """
    if name not in REWEIGHTERS:
        raise ValueError(f"unknown reweighting method {name!r}{_nearest(name, REWEIGHTERS)}")
    if preset is not None:
        if name != "recap":
            raise ValueError(f"reweighting method {name!r} has no presets, got {preset!r}")
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}{_nearest(preset, PRESETS)}")
        keywords = PRESETS[preset] | keywords
    parameters = dict(inspect.signature(REWEIGHTERS[name]).parameters)
    del parameters["num_objectives"]
    for keyword in keywords:
        if keyword not in parameters:
            raise ValueError(
                f"reweighting method {name!r} has no parameter {keyword!r}"
                f"{_nearest(keyword, parameters)}"
            )
    for keyword, parameter in parameters.items():
        if parameter.default is parameter.empty and keyword not in keywords:
            raise ValueError(f"reweighting method {name!r} needs the parameter {keyword!r}")
    return REWEIGHTERS[name](num_objectives, **keywords)


def _nearest(given: str, valid: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(given, list(valid), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}; valid: {', '.join(valid)}"
