"""What all reweighters share: the interface, the softmax, the published buffers, the state.

Every reweighter turns K step values into K weights whose mean is 1. All of them end in the same
line: `weights = K_ready * softmax(logits)` over the objectives that are ready, 1 for the others.
A method is therefore nothing but its logits: `softmax(-log L)` is the weighting 1/L, and so on.

`update` launches tensor operations on buffers of fixed size and never reads one back: no host
sync, no branch on data, no shape that depends on data. It can be captured in a CUDA graph.

Shapes: K objectives, W the window in steps; `reproduce.batch` puts a dimension of independent runs
before K. Arithmetic is float64, so that a window of a thousand equal values has deviation 0; what
is published (`weights`, `rates`, ...) is float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

Signal = Literal["loss", "reward"]

MIN_DENOMINATOR = 1e-6
"""Means that divide are moved away from zero to at least this magnitude, keeping their sign."""


class Reweighter(ABC):
    """What all methods share: validation, presence, the softmax, the published buffers, the state.

    Attributes (static buffers, overwritten by each `update`; clone to keep):
        weights: [K] float32, mean 1.
        rates: [K] float32, above 1 while the objective improves; NaN where the method has none.
        instabilities: [K] float32, relative deviation; NaN where the method has none.
        priorities: [K] float32, what the method ranks objectives by; NaN while not ready.
        retentions: [K] float32, relative drop below the objective's best beyond the noise, NaN
            while not ready; None where the method does not look for one.

    Args:
        num_objectives: K.
        signals: "loss" or "reward", one word or one per objective. Improvement is falling for a
            loss and rising for a reward. Methods that do not look at direction ignore it.
        device: where the buffers live; None: torch's default device.

    Raises:
        ValueError: an argument outside its range.
    """

    reads_deviations: ClassVar[bool] = False
    """Whether `update` makes use of `deviations`."""

    def __init__(
        self,
        num_objectives: int,
        signals: Signal | Sequence[Signal] = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        self.num_objectives = checked_int("num_objectives", num_objectives)
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.signals = checked_signals(signals, num_objectives)
        self._is_reward = torch.tensor([s == "reward" for s in self.signals], device=self.device)
        self._state: dict[str, Tensor] = {}
        self.weights = self._buffer("weights", 1.0, dtype=torch.float32)
        self.rates = self._buffer("rates", math.nan, dtype=torch.float32)
        self.instabilities = self._buffer("instabilities", math.nan, dtype=torch.float32)
        self.priorities = self._buffer("priorities", math.nan, dtype=torch.float32)
        self.retentions: Tensor | None = None

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
                samples. Only methods with `reads_deviations` ("saw") read it.

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
        shares = torch.softmax(logits.masked_fill(~ready, -math.inf), dim=-1)
        # With nothing ready the softmax is NaN everywhere, and the fill replaces all of it.
        num_ready = ready.sum(dim=-1, keepdim=True)
        self.weights.copy_((shares * num_ready).masked_fill(~ready, 1.0))
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
        if given.shape != self.weights.shape or not right_dtype or given.device != self.device:
            raise ValueError(
                f"{name} must be {list(self.weights.shape)} {wanted} on {self.device}, "
                f"got {list(given.shape)} {given.dtype} on {given.device}"
            )


class WindowedReweighter(Reweighter):
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
        is_next = self._slots == (self._counts % len(self._slots)).unsqueeze(-1)
        written = is_next & observed.unsqueeze(-1)  # [K, columns]
        self._values.copy_(torch.where(written, values.unsqueeze(-1), self._values))
        self._counts.add_(observed)

    def _window_means(self) -> tuple[Tensor, Tensor]:
        """Means of the newer and of the older half of the ring, [K] each."""
        columns = len(self._slots)
        age = (self._counts.unsqueeze(-1) - 1 - self._slots) % columns
        newer = self._values.masked_fill(age >= columns // 2, 0.0).sum(dim=-1)
        older = self._values.masked_fill(age < columns // 2, 0.0).sum(dim=-1)
        return newer / (columns // 2), older / (columns // 2)

    def _last_values(self) -> Tensor:
        """The value pushed last, [K]; meaningless before the first."""
        slot = (self._counts - 1) % len(self._slots)
        return self._values.gather(-1, slot.unsqueeze(-1)).squeeze(-1)

    def _successive_variance(self) -> Tensor:
        """sum (x_i - x_(i-1))^2 / (2 (n - 1)) over the n values of the ring's newer half, [K]."""
        columns = len(self._slots)
        pairs = columns // 2 - 1
        age = (self._counts.unsqueeze(-1) - 1 - self._slots) % columns
        steps = self._values - self._values.roll(1, dims=-1)
        return steps.square().masked_fill(age >= pairs, 0.0).sum(dim=-1) / (2 * pairs)

    def _deviation_from(self, center: Tensor) -> Tensor:
        """sqrt(sum (value - center)^2 / (columns - 1)) over the whole ring, [K]."""
        squares = (self._values - center.unsqueeze(-1)).square().sum(dim=-1)
        return (squares / (len(self._slots) - 1)).sqrt()


def away_from_zero(x: Tensor) -> Tensor:
    magnitude = x.abs().clamp_min(MIN_DENOMINATOR)
    return torch.where(x < 0, -magnitude, magnitude)


def bounded_ratio(numerator: Tensor, denominator: Tensor, bound: float | None) -> Tensor:
    ratio = numerator / away_from_zero(denominator)
    return ratio if bound is None else ratio.clamp(-bound, bound)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def checked_int(name: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return value


def checked_positive(name: str, value: float) -> float:
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return value


def checked_bound(name: str, value: float | None) -> float | None:
    if value is not None and (not is_number(value) or value <= 0):
        raise ValueError(f"{name} must be None or a finite number > 0, got {value!r}")
    return value


def checked_signals(signals: Signal | Sequence[Signal], num_objectives: int) -> tuple[Signal, ...]:
    each = (signals,) * num_objectives if isinstance(signals, str) else tuple(signals)
    if len(each) != num_objectives or any(s not in get_args(Signal) for s in each):
        raise ValueError(
            f"signals must be one of {get_args(Signal)}, or {num_objectives} of them, "
            f"got {signals!r}"
        )
    return each
