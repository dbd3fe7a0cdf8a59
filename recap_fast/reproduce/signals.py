"""What RECAP's knobs and its reading of rewards do, on synthetic curves without a model.

The curves are shaped like the paper's Figure 4 describes them. The weights do not act back on
them: this shows what a reweighter answers to, not whether the answer helps.

Shapes: N noise seeds, T steps, K objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from recap_fast.reproduce.batch import stack
from recap_fast.reproduce.ema import EmaRecapReweighter
from recap_fast.reweighting.recap import RecapReweighter, Reweighter

STEPS, SEEDS = 500, 10
OBJECTIVES = ("accuracy", "thinking format", "IoU", "answer format", "ntp")
SIGNALS = ("reward", "reward", "reward", "reward", "loss")
FORMAT_LEARNT = 40
"""Step at which the thinking format is half learnt: after the warm-up of 2W = 20 steps."""
SETTLED = 150  # formats are learnt, and have left both windows
PAPER_RANGE = (0.16, 0.30)
"""Of lambda/K in the paper's Figure 11, five objectives, T = 5."""


@dataclass(frozen=True)
class Trace:
    """What a reweighter said at every step. Arrays are [N, T, K] float64."""

    rates: np.ndarray
    instabilities: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Reading:
    """One way to read the paper: what enters the windows, and the softmax of their figures."""

    name: str
    instability_scale: float = 1.0
    """What the reading's i is, in ours."""
    rate_factor: float = 1.0
    instability_factor: float = 1.0
    """The priority is rate_factor c + instability_factor i."""
    temperature: float = 5.0
    separate: bool = False  # the mean of a softmax of the rates and one of the instabilities
    signals: tuple[str, ...] = SIGNALS
    transform: Callable[[np.ndarray], np.ndarray] = lambda rewards: rewards

    def trace(self, values: np.ndarray) -> Trace:
        """Of values [N, T, K], of which all but the last objective are rewards."""
        read = values.copy()
        read[..., :-1] = self.transform(values[..., :-1])
        found = trace(read, self.signals)
        instabilities = self.instability_scale * found.instabilities
        terms = self.rate_factor * found.rates, self.instability_factor * instabilities
        priorities = terms if self.separate else (sum(terms),)
        scaled = torch.tensor(np.stack(priorities)) / self.temperature
        weights = values.shape[-1] * torch.softmax(scaled, -1).mean(0).numpy()
        weights[np.isnan(weights)] = 1.0  # not ready yet
        return Trace(found.rates, instabilities, weights)


def hybrid_curves(seeds: int = SEEDS, steps: int = STEPS) -> np.ndarray:
    """Step values [N, T, 5] in the order of OBJECTIVES, like the paper's hybrid set-up.

    The thinking format is learnt from 0.17 within some ten steps, the answer format from 0.4 a
    little earlier, and each then fails once in 300 rollouts (64 a step). Accuracy climbs from 0.4
    to 0.65, measured on two prompts whose rollouts agree. IoU climbs from 0.65 to 0.75 with the
    noise of 32 boxes; the token loss falls from 1.6 to 1.2.
    """
    generator, step = np.random.default_rng(0), np.arange(steps)
    size = (seeds, steps)
    thinking = _learnt(step, 0.17, FORMAT_LEARNT)
    answer = _learnt(step, 0.4, FORMAT_LEARNT - 5)
    curves = (
        generator.binomial(2, 0.4 + 0.25 * step / steps, size) / 2,
        generator.binomial(64, thinking, size) / 64,
        0.65 + 0.1 * step / steps + 0.05 * generator.standard_normal(size),
        generator.binomial(64, answer, size) / 64,
        1.2 + 0.4 * np.exp(-step / 150) + 0.03 * generator.standard_normal(size),
    )
    return np.stack(curves, axis=-1)


def _learnt(step: np.ndarray, before: float, middle: int) -> np.ndarray:
    return before + (0.997 - before) / (1 + np.exp(-(step - middle) / 2))


def trace(
    values: np.ndarray,
    signals: Sequence[str] = SIGNALS,
    make: Callable[..., Reweighter] = RecapReweighter,
    **parameters: Any,
) -> Trace:
    """Feeds values [N, T, K] to a reweighter, one run for each seed."""
    seeds, _, count = values.shape
    each = [make(count, signals=signals, device="cpu", **parameters) for _ in range(seeds)]
    reweighter = stack(each)
    rows = []
    for step in torch.tensor(values).unbind(1):
        weights = reweighter.update(step)
        rows.append(torch.stack((reweighter.rates, reweighter.instabilities, weights)))
    by_step = torch.stack(rows, dim=2).double().numpy()  # [3, N, T, K]
    return Trace(*by_step)


def _surrogate(rewards: np.ndarray) -> np.ndarray:
    """The value of an on-policy GRPO loss: 0 but for rounding and the number of tokens."""
    return 1e-3 * np.random.default_rng(1).standard_normal(rewards.shape)


_AS_LOSSES = ("loss",) * len(OBJECTIVES)
READINGS = (
    Reading("mean reward, c = mu/mu~ (signal reward)"),
    Reading("the same, alpha = 0.5", rate_factor=0.5, instability_factor=0.5),
    Reading("the same, T = 1", temperature=1.0),
    Reading("the same, i times W", instability_scale=10.0),
    Reading("the same, sigma over sums of the windows", instability_scale=0.1),
    Reading("the same, sigma not divided by 2W - 1", instability_scale=19**0.5),
    Reading("the same, c alone", instability_factor=0.0),
    Reading("the same, i alone", rate_factor=0.0),
    Reading("mean reward as a loss, c = mu~/mu", signals=_AS_LOSSES),
    # github.com/VietHoang1512/recap in its steps with rewards: sigma / mean, of all 2W values.
    Reading(
        "the authors' code, mu~/mu",
        instability_scale=2 * (19 / 20) ** 0.5,
        separate=True,
        signals=_AS_LOSSES,
    ),
    Reading("minus the reward as a loss", signals=_AS_LOSSES, transform=np.negative),
    Reading("deficit 1 - reward as a loss", signals=_AS_LOSSES, transform=lambda r: 1 - r),
    Reading("GRPO surrogate as a loss", signals=_AS_LOSSES, transform=_surrogate),
)


def describe_reading(found: Trace) -> dict[str, Any]:
    """The figures by which a reading is held against the paper's Figures 4 and 11.

    Extremes are medians over seeds of a run's extreme. `figure_4`: the thinking format's rate
    peaks between 3 and 4.5 and then stays at 1 within 0.05, its instability below 0.02, and
    accuracy's lies between 0.2 and 0.4. `figure_11`: lowest and highest share within 0.02 of the
    paper's.
    """
    thinking, accuracy = OBJECTIVES.index("thinking format"), OBJECTIVES.index("accuracy")
    late = slice(SETTLED, None)
    shares = found.weights / len(OBJECTIVES)
    peak = _median(np.nanmax(found.rates[..., thinking], axis=1))
    off_one = _median(np.abs(found.rates[:, late, thinking] - 1).max(axis=1))
    format_instability = _median(found.instabilities[:, late, thinking])
    accuracy_instability = _median(found.instabilities[:, late, accuracy])
    lowest = _median(shares.min(axis=(1, 2)))
    highest = _median(shares.max(axis=(1, 2)))
    settled = np.percentile(shares[:, late], (1, 99))
    return {
        "format_peak_rate": peak,
        "format_rate_off_1": off_one,
        "format_instability": format_instability,
        "accuracy_instability": accuracy_instability,
        "lowest_share": lowest,
        "highest_share": highest,
        "settled_low": float(settled[0]),
        "settled_high": float(settled[1]),
        "figure_4": 3 <= peak <= 4.5
        and off_one <= 0.05
        and abs(format_instability) <= 0.02
        and 0.2 <= accuracy_instability <= 0.4,
        "figure_11": abs(lowest - PAPER_RANGE[0]) <= 0.02 and abs(highest - PAPER_RANGE[1]) <= 0.02,
    }


def _median(values: np.ndarray) -> float:
    return float(np.median(values))


@dataclass(frozen=True)
class Knobs:
    """RECAP with one knob turned, for the table of sensitivities."""

    name: str
    make: Callable[..., Reweighter] = RecapReweighter
    parameters: Mapping[str, Any] = field(default_factory=dict)


KNOBS = (
    Knobs("W 10, T 5, c + i"),
    *(Knobs(f"W {w}", parameters={"window": w}) for w in (2, 5, 20, 50)),
    *(Knobs(f"T {t:g}", parameters={"temperature": t}) for t in (0.1, 1.0, 2.5, 10.0, 30.0)),
    *(
        # T halved keeps alpha = 0.5 equal to c + i at T = 5.
        Knobs(f"alpha {a:g}, T 2.5", parameters={"alpha": a, "temperature": 2.5})
        for a in (0.0, 0.25, 0.5, 0.75, 1.0)
    ),
    Knobs("sigma around the newer mean", parameters={"std": "current"}),
    *(Knobs(f"averages, W {w}", EmaRecapReweighter, {"window": w}) for w in (5, 10, 20)),
)


def describe_knobs(found: Trace) -> dict[str, float]:
    """How strongly, how soon and how steadily weights answer, as means over seeds.

    `peak`: highest weight of the thinking format; `delay`: steps from half learnt to that peak;
    `accuracy` and `format`: mean settled weights; `jitter`: mean change of a settled weight from
    one step to the next.
    """
    thinking, accuracy = OBJECTIVES.index("thinking format"), OBJECTIVES.index("accuracy")
    settled = found.weights[:, SETTLED:]
    return {
        "peak": float(found.weights[..., thinking].max(axis=1).mean()),
        "delay": float(found.weights[..., thinking].argmax(axis=1).mean() - FORMAT_LEARNT),
        "accuracy": float(settled[..., accuracy].mean()),
        "format": float(settled[..., thinking].mean()),
        "jitter": float(np.abs(np.diff(settled, axis=1)).mean()),
    }


SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rewards times 100": lambda r: 100 * r,
    "accuracy times 100": lambda r: r * np.array([100.0, 1, 1, 1]),
    "rewards plus 1 (from 1 to 2)": lambda r: r + 1,
    "rewards from -1 to 1": lambda r: 2 * r - 1,
    "accuracy from -1 to 1": lambda r: r * np.array([2.0, 1, 1, 1]) - np.array([1.0, 0, 0, 0]),
}


def describe_scale(transform: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> dict:
    """What another scale of the rewards does to the weights of values [N, T, 5].

    `change`: largest change of a weight against the same rewards from 0 to 1; `top`: mean settled
    weight, over steps, of whatever objective has most; `highest_i`: largest |i|.
    """
    scaled = values.copy()
    scaled[..., :-1] = transform(values[..., :-1])
    found, plain = trace(scaled), trace(values)
    return {
        "change": float(np.abs(found.weights - plain.weights).max()),
        "accuracy": float(found.weights[:, SETTLED:, 0].mean()),
        "top": float(found.weights[:, SETTLED:].max(axis=-1).mean()),
        "highest_i": float(np.nanmax(np.abs(found.instabilities))),
    }


@dataclass(frozen=True)
class Case:
    """One objective in which something happens between two steps, beside two that are settled."""

    name: str
    signal: str
    mean: Callable[[np.ndarray], np.ndarray]  # of the step numbers [T]
    during: tuple[int, int] = (100, 200)
    noise: float = 0.02


def _ramp(low: float, high: float, length: int = 100) -> Callable[[np.ndarray], np.ndarray]:
    return lambda step: low + (high - low) * np.clip((step - 100) / length, 0, 1)


CASES = (
    Case("reward rises 0.4 to 0.8 in 100 steps", "reward", _ramp(0.4, 0.8)),
    Case("reward falls 0.8 to 0.4 in 100 steps", "reward", _ramp(0.8, 0.4)),
    Case("reward falls 0.8 to 0.4 in 10 steps", "reward", _ramp(0.8, 0.4, 10), (100, 120)),
    Case("loss rises 0.5 to 1 in 100 steps", "loss", _ramp(0.5, 1.0)),
    Case("reward is 0 throughout", "reward", lambda step: 0.0 * step, noise=0.0),
    Case("reward leaves 0, to 0.5 in 50 steps", "reward", _ramp(0, 0.5, 50), (100, 150), 0.0),
    Case("reward about 0.02, nothing learnt", "reward", lambda step: 0.0 * step, noise=0.03),
    Case("reward rises -0.5 to 0.5 in 100 steps", "reward", _ramp(-0.5, 0.5)),
    Case("loss falls -1 to -3 in 100 steps", "loss", _ramp(-1, -3)),
)


def describe_case(case: Case, seeds: int = SEEDS, steps: int = 300) -> dict[str, float]:
    """Weights of the case's objective: mean and extremes while it happens, mean afterwards."""
    generator = np.random.default_rng(0)
    settled = 0.6 + 0.02 * generator.standard_normal((seeds, steps, 2))
    happening = case.mean(np.arange(steps)) + case.noise * generator.standard_normal((seeds, steps))
    if case.signal == "reward" and case.mean(np.arange(steps)).min() >= 0:
        happening = np.abs(happening)
    values = np.concatenate((happening[..., None], settled), axis=-1)
    found = trace(values, (case.signal, "reward", "reward"))
    start, end = case.during
    weights = found.weights[..., 0]
    return {
        "rate": _median(found.rates[:, start:end, 0]),
        "instability": _median(found.instabilities[:, start:end, 0]),
        "mean": float(weights[:, start:end].mean()),
        "highest": _median(weights[:, start:end].max(axis=1)),
        "lowest": _median(weights[:, start:end].min(axis=1)),
        "after": float(weights[:, end + 20 :].mean()),
    }
