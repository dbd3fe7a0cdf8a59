"""Objective weights from recent values: RECAP, and the baselines it is compared to.

Every reweighter turns K step values into K weights whose mean is 1. All of them end in the same
line: `weights = K_ready * softmax(logits)` over the objectives that are ready, 1 for the others.
A method is therefore nothing but its logits: `softmax(-log L)` is the weighting 1/L, and so on.

`update` launches tensor operations on buffers of fixed size and never reads one back: no host
sync, no branch on data, no shape that depends on data. It can be captured in a CUDA graph.

Shapes: K objectives, W the window in steps. Arithmetic is float64, so that a window of a thousand
equal values has deviation 0; what is published (`weights`, `rates`, ...) is float32.
"""

from __future__ import annotations

import difflib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from recap_fast.ops._validate import resolve_impl

Signal = Literal["loss", "reward"]
Deviation = Literal["window", "current"]

MIN_DENOMINATOR = 1e-6
"""Means that divide are moved away from zero to at least this magnitude, keeping their sign."""


class Reweighter(ABC):
    """What all methods share: validation, presence, the softmax, the published buffers, the state.

    Attributes (static buffers, overwritten by each `update`; clone to keep):
        weights: [K] float32, mean 1.
        rates: [K] float32, above 1 while the objective improves; NaN where the method has none.
        instabilities: [K] float32, relative deviation; NaN where the method has none.
        priorities: [K] float32, what the method ranks objectives by; NaN while not ready.

    Args:
        num_objectives: K.
        signals: "loss" or "reward", one word or one per objective. Improvement is falling for a
            loss and rising for a reward. Methods that do not look at direction ignore it.
        device: where the buffers live; None: torch's default device.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        num_objectives: int,
        signals: Signal | Sequence[Signal] = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        self.num_objectives = _checked_int("num_objectives", num_objectives)
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.signals = _checked_signals(signals, num_objectives)
        self._is_reward = torch.tensor([s == "reward" for s in self.signals], device=self.device)
        self._state: dict[str, Tensor] = {}
        self.weights = self._buffer("weights", 1.0, dtype=torch.float32)
        self.rates = self._buffer("rates", math.nan, dtype=torch.float32)
        self.instabilities = self._buffer("instabilities", math.nan, dtype=torch.float32)
        self.priorities = self._buffer("priorities", math.nan, dtype=torch.float32)

    @torch.no_grad()
    def update(
        self, values: Tensor, present: Tensor | None = None, deviations: Tensor | None = None
    ) -> Tensor:
        """Take in one step's values and return the weights that follow from them.

        Args:
            values: [K] floating, each objective's mean over the step: the mean reward for a
                "reward" signal, the mean unweighted loss for a "loss" signal.
            present: [K] bool, which objectives the step had; None: all. An absent objective, and
                one whose value is NaN or infinite, leaves its state as it was.
            deviations: [K] floating, standard deviation of each objective over the step's
                samples. Only "saw" reads it.

        Returns:
            [K] float32, mean 1: a copy of `weights`, which later updates do not overwrite.

        Raises:
            ValueError: a tensor of another shape, dtype or device.
        """
        self._check("values", values)
        if present is not None:
            self._check("present", present, boolean=True)
        if deviations is not None:
            self._check("deviations", deviations)
        return self._advance(values.detach(), present, deviations)

    def _advance(self, values: Tensor, present: Tensor | None, deviations: Tensor | None) -> Tensor:
        """`update` for checked arguments."""
        observed = torch.isfinite(values)
        if present is not None:
            observed = observed & present
        if deviations is not None:
            deviations = deviations.detach().double()
        logits, ready = self._score(values.double(), observed, deviations)
        shares = torch.softmax(logits.masked_fill(~ready, -math.inf), dim=0)
        # With nothing ready the softmax is NaN everywhere, and the fill replaces all of it.
        self.weights.copy_((shares * ready.sum()).masked_fill(~ready, 1.0))
        return self.weights.clone()

    @abstractmethod
    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Advance the state. Returns logits [K] float64 and which objectives are ready [K] bool.

        `values` [K] float64 may hold anything where `observed` [K] is False.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later `update` depends on, and the published buffers; copies."""
        return {name: buffer.clone() for name, buffer in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`. Buffers keep their addresses: captured graphs stay valid.

        Raises:
            ValueError: the state is of another method, another K or another window.
        """
        if set(state) != set(self._state):
            raise ValueError(
                f"state of {type(self).__name__} has the entries {sorted(self._state)}, "
                f"got {sorted(state)}"
            )
        for name, buffer in self._state.items():
            if state[name].shape != buffer.shape or state[name].dtype != buffer.dtype:
                raise ValueError(
                    f"state entry {name!r} must be {list(buffer.shape)} {buffer.dtype}, "
                    f"got {list(state[name].shape)} {state[name].dtype}"
                )
        for name, buffer in self._state.items():
            buffer.copy_(state[name])

    def _buffer(
        self, name: str, fill: float, *columns: int, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """A [K, *columns] tensor that belongs to the state."""
        shape = (self.num_objectives, *columns)
        self._state[name] = torch.full(shape, fill, dtype=dtype, device=self.device)
        return self._state[name]

    def _publish_priorities(self, priorities: Tensor, ready: Tensor) -> None:
        self.priorities.copy_(priorities.masked_fill(~ready, math.nan))

    def _check(self, name: str, given: Tensor, boolean: bool = False) -> None:
        wanted = "bool" if boolean else "floating"
        right_dtype = given.dtype == torch.bool if boolean else given.is_floating_point()
        if given.shape != (self.num_objectives,) or not right_dtype or given.device != self.device:
            raise ValueError(
                f"{name} must be [{self.num_objectives}] {wanted} on {self.device}, "
                f"got {list(given.shape)} {given.dtype} on {given.device}"
            )


class _WindowedReweighter(Reweighter):
    """A ring of the last `columns` values per objective, each with its own counter."""

    def __init__(
        self,
        num_objectives: int,
        columns: int,
        signals: Signal | Sequence[Signal],
        device: torch.device | str | None,
    ) -> None:
        super().__init__(num_objectives, signals, device)
        self._values = self._buffer("values", 0.0, columns)
        self._counts = self._buffer("counts", 0, dtype=torch.int64)
        self._slots = torch.arange(columns, device=self.device)

    def _push(self, values: Tensor, observed: Tensor) -> None:
        """Append where observed. Value number n of an objective lies in slot n mod columns."""
        is_next = self._slots == (self._counts % len(self._slots)).unsqueeze(1)
        written = is_next & observed.unsqueeze(1)  # [K, columns]
        self._values.copy_(torch.where(written, values.unsqueeze(1), self._values))
        self._counts.add_(observed)

    def _window_means(self) -> tuple[Tensor, Tensor]:
        """Means of the newer and of the older half of the ring, [K] each."""
        columns = len(self._slots)
        age = (self._counts.unsqueeze(1) - 1 - self._slots) % columns
        newer = self._values.masked_fill(age >= columns // 2, 0.0).sum(dim=1)
        older = self._values.masked_fill(age < columns // 2, 0.0).sum(dim=1)
        return newer / (columns // 2), older / (columns // 2)

    def _deviation_from(self, center: Tensor) -> Tensor:
        """sqrt(sum (value - center)^2 / (columns - 1)) over the whole ring, [K]."""
        squares = (self._values - center.unsqueeze(1)).square().sum(dim=1)
        return (squares / (len(self._slots) - 1)).sqrt()


class RecapReweighter(_WindowedReweighter):
    """RECAP's dynamic weights (arXiv 2510.21978v2, Algorithm 2). One kernel launch on CUDA.

    With mu the mean of the last W values, mu~ that of the W before, and sigma the deviation of
    the 2W: rate c = mu~/mu for a loss and mu/mu~ for a reward, instability i = sigma/(mu + mu~),
    priority s = c + i, weight = K softmax(s/T). An objective with fewer than 2W values weighs 1.

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
            take all the weight; None: no clamp.
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
        device: torch.device | str | None = None,
    ) -> None:
        self.window = _checked_int("window", window)
        self.temperature = _checked_positive("temperature", temperature)
        self.max_rate = _checked_bound("max_rate", max_rate)
        if alpha is not None and not (_is_number(alpha) and 0 <= alpha <= 1):
            raise ValueError(f"alpha must be None or a number in [0, 1], got {alpha!r}")
        if std not in get_args(Deviation):
            raise ValueError(f"std must be one of {get_args(Deviation)}, got {std!r}")
        self.alpha = alpha
        self.std = std
        super().__init__(num_objectives, 2 * window, signals, device)
        self._in_one_launch = resolve_impl("auto", self.device, torch.float32) == "triton"

    def _advance(self, values: Tensor, present: Tensor | None, deviations: Tensor | None) -> Tensor:
        if not self._in_one_launch:
            return super()._advance(values, present, deviations)
        from recap_fast.ops.triton_reweighting import RecapState, recap_update

        state = RecapState(
            ring=self._values,
            counts=self._counts,
            weights=self.weights,
            rates=self.rates,
            instabilities=self.instabilities,
            priorities=self.priorities,
        )
        return recap_update(
            values,
            present,
            self._is_reward,
            state,
            temperature=self.temperature,
            alpha=self.alpha,
            max_rate=self.max_rate,
            from_current_mean=self.std == "current",
        )

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self._push(values, observed)
        ready = self._counts >= len(self._slots)
        mu, mu_before = self._window_means()
        c = _ratio(
            torch.where(self._is_reward, mu, mu_before),
            torch.where(self._is_reward, mu_before, mu),
            self.max_rate,
        )
        sigma = self._deviation_from(mu if self.std == "current" else (mu + mu_before) / 2)
        i = sigma / _away_from_zero(mu + mu_before)
        s = c + i if self.alpha is None else self.alpha * c + (1 - self.alpha) * i
        self.rates.copy_(c.masked_fill(~ready, math.nan))
        self.instabilities.copy_(i.masked_fill(~ready, math.nan))
        self._publish_priorities(s, ready)
        return s / self.temperature, ready


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
        fixed = torch.as_tensor(weights, dtype=torch.float64, device=self.device)
        valid = fixed.shape == (num_objectives,) and bool((fixed.isfinite() & (fixed >= 0)).all())
        if not valid or not bool(fixed.any()):
            raise ValueError(
                f"weights must be {num_objectives} finite numbers >= 0, one of them above 0, "
                f"got {fixed.tolist()}"
            )
        self._logits = fixed.log()
        self.weights.copy_(fixed / fixed.mean())

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._logits, torch.ones_like(observed)


class DwaReweighter(_WindowedReweighter):
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
        self.window = _checked_int("window", window)
        self.temperature = _checked_positive("temperature", temperature)
        self.max_rate = _checked_bound("max_rate", max_rate)
        super().__init__(num_objectives, 2 * window, signals, device)

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self._push(values, observed)
        ready = self._counts >= len(self._slots)
        last, before = self._window_means()
        worse = torch.where(self._is_reward, before, last)
        better = torch.where(self._is_reward, last, before)
        r = _ratio(worse, better, self.max_rate)
        self.rates.copy_(_ratio(better, worse, self.max_rate).masked_fill(~ready, math.nan))
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
        self.floor = _checked_positive("floor", floor)
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
        self.learning_rate = _checked_positive("learning_rate", learning_rate)
        self.floor = _checked_positive("floor", floor)
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
        if not (_is_number(gamma) and gamma >= 0):
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
        shares = torch.exp(torch.log_softmax(self._parameters, dim=0)) * moving
        z = shares / shares.sum().clamp_min(1e-300)  # all zero when nothing moves
        gradient = z * (progress - (z * progress).sum()) + self.gamma * self._parameters
        self._descend(gradient, moving)
        self._logs.copy_(torch.where(observed, logs, self._logs))
        ready = ~self._logs.isnan()
        self._publish_priorities(self._parameters, ready)
        return self._parameters - self._logs, ready


class SawReweighter(_WindowedReweighter):
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

    _MIN_COEFFICIENT = 1e-8  # keeps the logarithm finite

    def __init__(
        self,
        num_objectives: int,
        window: int = 10,
        signals: Signal | Sequence[Signal] = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        self.window = _checked_int("window", window, least=2)
        super().__init__(num_objectives, window, signals, device)
        self._coefficients = self._buffer("coefficients", math.nan)

    def _score(
        self, values: Tensor, observed: Tensor, deviations: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self._push(values, observed)
        if deviations is None:
            mean = self._values.mean(dim=1)
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


def make_reweighter(name: str, num_objectives: int, **keywords: Any) -> Reweighter:
    """The reweighter called `name`, for K objectives. Every method takes `signals` and `device`.

    Raises:
        ValueError: an unknown name or keyword (the nearest valid one is named), a missing keyword,
            or a value outside its range.
    """
    if name not in REWEIGHTERS:
        raise ValueError(f"unknown reweighting method {name!r}{_nearest(name, REWEIGHTERS)}")
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


def _away_from_zero(x: Tensor) -> Tensor:
    magnitude = x.abs().clamp_min(MIN_DENOMINATOR)
    return torch.where(x < 0, -magnitude, magnitude)


def _ratio(numerator: Tensor, denominator: Tensor, bound: float | None) -> Tensor:
    ratio = numerator / _away_from_zero(denominator)
    return ratio if bound is None else ratio.clamp(-bound, bound)


def _hash32(x: Tensor) -> Tensor:
    """Mix [*] int64 in [0, 2**32) to the same range: multiply and xor-shift, each a bijection.

    The constants are those of Ettinger's "lowbias32". int64 products wrap, and masking to 32 bits
    leaves what 32-bit arithmetic would.
    """
    mask = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def _nearest(given: str, valid: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(given, list(valid), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}; valid: {', '.join(valid)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked_int(name: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return value


def _checked_positive(name: str, value: float) -> float:
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return value


def _checked_bound(name: str, value: float | None) -> float | None:
    if value is not None and (not _is_number(value) or value <= 0):
        raise ValueError(f"{name} must be None or a finite number > 0, got {value!r}")
    return value


def _checked_signals(signals: Signal | Sequence[Signal], num_objectives: int) -> tuple[Signal, ...]:
    each = (signals,) * num_objectives if isinstance(signals, str) else tuple(signals)
    if len(each) != num_objectives or any(s not in get_args(Signal) for s in each):
        raise ValueError(
            f"signals must be one of {get_args(Signal)}, or {num_objectives} of them, "
            f"got {signals!r}"
        )
    return each
