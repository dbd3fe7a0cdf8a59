"""The reweighters that RECAP is compared to. Shapes: K objectives, W the window in steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recap_fast.reweighting.base import (
    MIN_DENOMINATOR,
    Reweighter,
    Signal,
    WindowedReweighter,
    bounded_ratio,
    checked_bound,
    checked_int,
    checked_positive,
    is_number,
)


class UniformReweighter(Reweighter):
    """Linear scalarisation: every weight 1. Signals, values and presence make no difference."""

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(values), torch.ones_like(observed)


class StaticReweighter(Reweighter):
    """Fixed weights, divided by their mean. Signals, values and presence make no difference.

    Args:
        weights: K numbers >= 0, one of them above 0.
    """

    def __init__(
        self,
        num_objectives: int,
        weights: Sequence[float] | Tensor,
        signals: Signal | Sequence[Signal] = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_objectives, signals, device)
        fixed = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
        valid = fixed.shape == (num_objectives,) and bool((fixed.isfinite() & (fixed >= 0)).all())
        if not valid or not bool(fixed.any()):
            raise ValueError(
                f"weights must be {num_objectives} finite numbers >= 0, one of them above 0, "
                f"got {fixed.tolist()}"
            )
        self._logits = fixed.log().to(self.device)
        self.weights.copy_(fixed / fixed.mean())

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._logits, torch.ones_like(observed)


class DwaReweighter(WindowedReweighter):
    """Dynamic Weight Average (Liu et al. 2019, arXiv 1803.10704): K softmax(r/T).

    r is the loss of the last period over that of the period before, so what falls slowly weighs
    more. The paper's periods are epochs; ours are the last W values and the W before. For a
    reward the ratio is turned round (before/last), so what rises slowly weighs more. `rates` is
    1/r. Non-positive means: denominators keep their sign and a magnitude of `MIN_DENOMINATOR`. An
    objective with fewer than 2W values weighs 1, as in the paper's first two epochs; absence
    pushes nothing. The paper's weights have mean 1 as they are.

    Args:
        window: W, in values of the objective.
        temperature: T; 2 in the paper.
        max_rate: r is clamped to [-max_rate, max_rate] (ours); None: no clamp.
    """

    def __init__(
        self,
        num_objectives: int,
        window: int = 10,
        temperature: float = 2.0,
        signals: Signal | Sequence[Signal] = "loss",
        max_rate: float | None = 10.0,
        device: torch.device | str | None = None,
    ) -> None:
        self.window = checked_int("window", window)
        self.temperature = checked_positive("temperature", temperature)
        self.max_rate = checked_bound("max_rate", max_rate)
        super().__init__(num_objectives, 2 * window, signals, device)

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self._push(values, observed)
        ready = self._counts >= len(self._slots)
        last, before = self._window_means()
        worse = torch.where(self._is_reward, before, last)
        better = torch.where(self._is_reward, last, before)
        r = bounded_ratio(worse, better, self.max_rate)
        self.rates.copy_(bounded_ratio(better, worse, self.max_rate).masked_fill(~ready, math.nan))
        self._publish_priorities(r, ready)
        return r / self.temperature, ready


class RlwReweighter(Reweighter):
    """Random Loss Weighting (Lin et al. 2022, arXiv 2111.10603): K softmax of K standard normals.

    Drawn anew at each update; signals, values and presence make no difference. The paper's
    weights sum to 1; times K here. Normals come from hashing (seed, step, objective) on the device
    instead of from a torch generator: the same on every device and rank, with a state of two
    integers, and a captured graph draws anew on each replay.

    Args:
        seed: in [0, 2**32).
    """

    def __init__(
        self,
        num_objectives: int,
        seed: int = 0,
        signals: Signal | Sequence[Signal] = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_objectives, signals, device)
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
        # One copy of seed and step per objective keeps every state entry [K].
        self._seeds = self._buffer("seeds", seed, dtype=torch.int64)
        self._steps = self._buffer("steps", 0, dtype=torch.int64)
        self._objectives = torch.arange(num_objectives, device=self.device)

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self._steps.add_(1)
        key = _hash32(_hash32(_hash32(self._seeds) ^ self._steps) ^ self._objectives)
        normals = torch.special.ndtri((key.double() + 0.5) / 2**32)
        ready = torch.ones_like(observed)
        self._publish_priorities(normals, ready)
        return normals, ready


class ScaleInvariantReweighter(Reweighter):
    """Scale-invariant scalarisation: descend sum log L_k, so weight 1/L_k, divided by the mean.

    For a reward the sum of log rewards is climbed, which is weight 1/reward: again nothing
    depends on the scale. Values below `floor`, negative ones included, count as `floor`. An
    absent objective keeps its last value; one never seen weighs 1. `priorities` is -log L.

    Args:
        floor: 0.01, just under one success in 64 rollouts.
    """

    def __init__(
        self,
        num_objectives: int,
        floor: float = 1e-2,
        signals: Signal | Sequence[Signal] = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        self.floor = checked_positive("floor", floor)
        super().__init__(num_objectives, signals, device)
        self._logits = self._buffer("logits", math.nan)

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        latest = -values.clamp_min(self.floor).log()
        self._logits.copy_(torch.where(observed, latest, self._logits))
        ready = ~self._logits.isnan()
        self._publish_priorities(self._logits, ready)
        return self._logits, ready


class _GradientReweighter(Reweighter):
    """K parameters that Adam (default betas) moves, each by its own objective's steps."""

    _BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8

    def __init__(
        self,
        num_objectives: int,
        learning_rate: float,
        floor: float,
        signals: Signal | Sequence[Signal],
        device: torch.device | str | None,
    ) -> None:
        self.learning_rate = checked_positive("learning_rate", learning_rate)
        self.floor = checked_positive("floor", floor)
        super().__init__(num_objectives, signals, device)
        self._parameters = self._buffer("parameters", 0.0)
        self._first_moments = self._buffer("first_moments", 0.0)
        self._second_moments = self._buffer("second_moments", 0.0)
        self._steps = self._buffer("steps", 0, dtype=torch.int64)

    def _descend(self, gradient: Tensor, moving: Tensor) -> None:
        """One Adam step against `gradient` [K] where `moving` [K]; the rest stays untouched."""
        self._steps.add_(moving)
        steps = self._steps.clamp_min(1).double()
        first = torch.lerp(gradient, self._first_moments, self._BETA1)
        second = torch.lerp(gradient.square(), self._second_moments, self._BETA2)
        first_unbiased = first / (1 - torch.exp(math.log(self._BETA1) * steps))
        second_unbiased = second / (1 - torch.exp(math.log(self._BETA2) * steps))
        step = self.learning_rate * first_unbiased / (second_unbiased.sqrt() + self._EPS)
        self._first_moments.copy_(torch.where(moving, first, self._first_moments))
        self._second_moments.copy_(torch.where(moving, second, self._second_moments))
        self._parameters.copy_(torch.where(moving, self._parameters - step, self._parameters))


class UwReweighter(_GradientReweighter):
    """Uncertainty weighting (Kendall et al. 2018, arXiv 1705.07115): weight exp(-s_k).

    The log-variances s descend sum 0.5 (exp(-s_k) L_k + s_k), whose minimum is exp(s_k) = L_k.
    The paper learns them with the network; here only values are seen, which is all this gradient
    needs: one Adam step an update. The paper's weights have no fixed sum; ours are divided by
    their mean. A reward is taken by its magnitude, like a loss: weight tends to 1/reward. Values
    below `floor`, negative ones included, count as `floor`. An absent objective keeps its s; one
    never seen weighs 1. `priorities` is -s.

    Args:
        learning_rate: how far Adam moves s in one update, about.
        floor: least value.
    """

    def __init__(
        self,
        num_objectives: int,
        learning_rate: float = 0.025,
        floor: float = 1e-2,
        signals: Signal | Sequence[Signal] = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_objectives, learning_rate, floor, signals, device)

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        precision = torch.exp(-self._parameters)
        self._descend(0.5 * (1 - precision * values.clamp_min(self.floor)), observed)
        ready = self._steps > 0
        self._publish_priorities(-self._parameters, ready)
        return -self._parameters, ready


class FamoReweighter(_GradientReweighter):
    """FAMO (Liu et al. 2023, arXiv 2306.03792): weight z_k/L_k with z = softmax(xi).

    z moves towards the objectives whose log loss falls least: xi descends
    sum_k z_k (log L_k before - log L_k now) with Adam and decay `gamma`, as the authors' code
    does. They evaluate both losses on one batch, before and after its step; here they are the
    values of two successive updates, which costs no pass and adds the batches' noise. The weights
    are those of the gradient of sum z log L, divided by their mean (theirs sum to 1).

    For a reward, progress is log now - log before, and the weight z/reward. Values below `floor`,
    negative ones included, count as `floor`. An absent objective keeps xi and its last value, and
    the step is taken among the others; one never seen weighs 1. `priorities` is xi.

    Args:
        learning_rate: of xi.
        gamma: decay of xi towards 0, that is, of z towards uniform.
        floor: least value.
    """

    def __init__(
        self,
        num_objectives: int,
        learning_rate: float = 0.025,
        gamma: float = 0.01,
        floor: float = 1e-2,
        signals: Signal | Sequence[Signal] = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        if not (is_number(gamma) and gamma >= 0):
            raise ValueError(f"gamma must be a finite number >= 0, got {gamma!r}")
        self.gamma = gamma
        super().__init__(num_objectives, learning_rate, floor, signals, device)
        self._logs = self._buffer("logs", math.nan)  # log of the last value seen; NaN: none yet

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logs = values.clamp_min(self.floor).log()
        moving = observed & ~self._logs.isnan()
        fall = (self._logs - logs).masked_fill(~moving, 0.0)
        progress = torch.where(self._is_reward, -fall, fall)
        shares = torch.exp(torch.log_softmax(self._parameters, dim=-1)) * moving
        z = shares / shares.sum(dim=-1, keepdim=True).clamp_min(
            1e-300
        )  # all zero when nothing moves
        average = (z * progress).sum(dim=-1, keepdim=True)
        gradient = z * (progress - average) + self.gamma * self._parameters
        self._descend(gradient, moving)
        self._logs.copy_(torch.where(observed, logs, self._logs))
        ready = ~self._logs.isnan()
        self._publish_priorities(self._parameters, ready)
        return self._parameters - self._logs, ready


class SawReweighter(WindowedReweighter):
    """Stage-Aware Dynamic Weighting (SAW, arXiv 2606.07705): weight sigma_k/|mu_k|, over its mean.

    sigma and mu are those of the step's samples: pass `deviations` to `update`. Without them the
    deviation and mean of the objective's last W step values stand in, which sees noise between
    steps instead of spread within one, and an objective with fewer than W values weighs 1.

    Rewards and losses are treated alike (the paper has rewards only). |mu| is at least
    `MIN_DENOMINATOR`. An absent objective keeps its last coefficient; one never seen weighs 1.
    Where all coefficients are 0 the weights are equal. `instabilities` and `priorities` are the
    coefficients.

    Args:
        window: W, in values of the objective; at least 2.
    """

    reads_deviations = True
    _MIN_COEFFICIENT = 1e-8  # keeps the logarithm finite

    def __init__(
        self,
        num_objectives: int,
        window: int = 10,
        signals: Signal | Sequence[Signal] = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        self.window = checked_int("window", window, least=2)
        super().__init__(num_objectives, window, signals, device)
        self._coefficients = self._buffer("coefficients", math.nan)

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self._push(values, observed)
        if deviations is None:
            mean = self._values.mean(dim=-1)
            sigma = self._deviation_from(mean)
            known = observed & (self._counts >= len(self._slots))
        else:
            mean, sigma = values, deviations
            known = observed & deviations.isfinite()
        latest = sigma / mean.abs().clamp_min(MIN_DENOMINATOR)
        self._coefficients.copy_(torch.where(known, latest, self._coefficients))
        ready = ~self._coefficients.isnan()
        self.instabilities.copy_(self._coefficients)
        self._publish_priorities(self._coefficients, ready)
        return self._coefficients.clamp_min(self._MIN_COEFFICIENT).log(), ready


def _hash32(x: Tensor) -> Tensor:
    """Mix [*] int64 in [0, 2**32) to the same range: multiply and xor-shift, each a bijection.

    The constants are those of Ettinger's "lowbias32". int64 products wrap, and masking to 32 bits
    leaves what 32-bit arithmetic would.
    """
    mask = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)
