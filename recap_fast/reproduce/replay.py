"""The forgetting experiment where replay is scarce: methods, shares of replay, and the order of
their runs. docs/recap.md says what is claimed and how it is tested.

A share is the percentage of all rows that are replayed. Reinforcement without replay does not
depend on it, and has runs at share 0 alone.

    recap-fast reproduce replay --quick
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recap_fast.reproduce.digits import BaseSettings
from recap_fast.reproduce.experiment import ExperimentError, ExperimentSettings, configure
from recap_fast.reproduce.grid import Cell

NO_REPLAY = "reasoning-only"
CLAIM_SHARES, CLAIM_SEEDS = (10, 20), (0, 1, 2, 3, 4)
"""At which the claim is tested."""
SOLVED = 0.5
"""Mean reward of a prompt's rollouts from which on it counts as solved: the usual one for IoU."""
RETENTION = 20.0
"""Weight of the drop below the best in RECAP's priority."""

_Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ReplayMethod:
    """One way to keep what reinforcement does not train."""

    label: str
    changes: _Sections
    """Sections of a configuration, over those that all methods have in common."""
    is_new: bool = False
    """Whether the claim is about it."""
    is_adaptive: bool = False
    """Whether the sources' shares follow the weights, from where those of the others are."""
    has_review: bool = False
    """Whether prompts that were solved come back."""
    is_ablation: bool = False
    """Whether it is there to take the new methods apart: at the claim's shares alone."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Of an experiment, by what they are for."""

    reasoning: str
    replayed: tuple[str, ...]
    solving: list[str]
    """Rewards that say whether a prompt is solved."""


IMAGES = Sources("range", ("locate", "transcribe"), ["accuracy", "iou"])


_UNIFORM = {"method": "uniform"}
_BALANCED = {"method": "recap", "balance": "gradient"}
_RETENTION = {"parameters": {"retention": RETENTION}}

METHODS: dict[str, ReplayMethod] = {
    NO_REPLAY: ReplayMethod("Reasoning only", {"reweighting": _UNIFORM}),
    "uniform": ReplayMethod("Uniform", {"reweighting": _UNIFORM}),
    "recap": ReplayMethod(
        "RECAP", {"reweighting": {"method": "recap", "parameters": {"preset": "paper"}}}
    ),
    "recap-balanced": ReplayMethod("RECAP balanced", {"reweighting": _BALANCED}, is_new=True),
    "recap-retention": ReplayMethod(
        "RECAP balanced, retention", {"reweighting": _BALANCED | _RETENTION}, is_new=True
    ),
    "adaptive": ReplayMethod(
        "Adaptive replay",
        {"reweighting": {"method": "recap"} | _RETENTION},
        is_new=True,
        is_adaptive=True,
    ),
    "review": ReplayMethod(
        "Review of solved prompts", {"reweighting": _UNIFORM}, is_new=True, has_review=True
    ),
    "together": ReplayMethod(
        "All together",
        {"reweighting": _BALANCED | _RETENTION},
        is_new=True,
        is_adaptive=True,
        has_review=True,
    ),
    "balanced": ReplayMethod(
        "Uniform balanced", {"reweighting": _UNIFORM | {"balance": "gradient"}}
    ),
    "balanced-iou-3": ReplayMethod(
        "Balanced, IoU x 3",
        {
            "reweighting": {
                "method": "static",
                "parameters": {"weights": [1, 1, 3, 1, 1]},
                "balance": "gradient",
            }
        },
        is_ablation=True,
    ),
    "unclipped": ReplayMethod(
        "Uniform, not clipped",
        {"reweighting": _UNIFORM, "optimizer": {"max_grad_norm": 1e6}},
        is_ablation=True,
    ),
    "gdpo": ReplayMethod("GDPO", {"reweighting": _UNIFORM | {"advantages": "gdpo"}}),
    "dwa": ReplayMethod("DWA", {"reweighting": {"method": "dwa"}}),
    "saw": ReplayMethod("SAW", {"reweighting": {"method": "saw"}}),
}
NEW_METHODS = tuple(name for name, method in METHODS.items() if method.is_new)
_FIRST = ("uniform", "recap", "recap-balanced", "recap-retention", "together")


@dataclass(frozen=True, slots=True)
class ReplaySettings(ExperimentSettings):
    """A grid over shares of replay, and the lengths of its runs."""

    methods: tuple[str, ...] = tuple(METHODS)
    shares: tuple[int, ...] = (5, 10, 20, 33, 67)
    """Percent of all rows."""
    seeds: tuple[int, ...] = CLAIM_SEEDS
    steps: int = 200
    evaluate_every: int = 100


FULL = ReplaySettings()
QUICK = ReplaySettings(
    base=BaseSettings(
        text_width=64, text_layers=2, vision_width=64, vision_layers=2, reading_steps=60, steps=60
    ),
    methods=("uniform", "together"),
    shares=CLAIM_SHARES,
    seeds=(0, 1),
    steps=6,
    batch_size=6,
    evaluate_every=6,
    held_out=32,
    window=4,
)
"""Shows that everything works, and nothing else. The base is that of the quick digits."""


Place = tuple[str, int, int]
"""Of a run in the grid: method, share, seed."""


@dataclass(frozen=True, slots=True)
class ReplayCell(Cell):
    """One run of the grid."""

    share: int = field(kw_only=True)
    """Percent of all rows that are replayed."""

    @property
    def name(self) -> str:
        return f"{self.method}, {self.share} % replay, seed {self.seed}"

    @property
    def place(self) -> Place:
        return self.method, self.share, self.seed

    @property
    def key(self) -> str:
        return f"{self.method}/replay-{self.share}/seed-{self.seed}"


def method_changes(method: str, share: int, sources: Sources) -> dict[str, Any]:
    """The sections of a configuration that make a method, with `share` percent of all rows from
    the replayed sources in equal parts and the others from the reasoning's."""
    chosen = METHODS[method]
    each = share / 100 / len(sources.replayed)
    shares = {sources.reasoning: 1 - share / 100, **dict.fromkeys(sources.replayed, each)}
    data: dict[str, Any] = {"mixing": shares}
    if chosen.is_adaptive:
        data = {"mixing": "adaptive", "adaptive": {"shares": shares}}
    if chosen.has_review:
        data["review"] = {"rewards": sources.solving, "threshold": SOLVED}
    return {**chosen.changes, "data": data}


def grid(settings: ReplaySettings, base: Path, output: Path) -> list[ReplayCell]:
    """All runs, those first that the claim is about.

    First Uniform, RECAP and the likeliest new methods at the shares of the claim; then the others
    that its test needs; then all else at these shares, and last the other shares. Each time seed by
    seed, so that what was cut short has all its methods.
    """
    places = [
        (method, share, seed)
        for seed in settings.seeds
        for share in (0, *settings.shares)
        for method in settings.methods
        if (method == NO_REPLAY) == (share == 0)
        and (share in CLAIM_SHARES or not METHODS[method].is_ablation)
    ]
    places.sort(key=lambda place: _stage(place[0], place[1]))  # stable
    return [make_cell(settings, base, output, *place) for place in places]


def make_cell(
    settings: ReplaySettings, base: Path, output: Path, method: str, share: int, seed: int
) -> ReplayCell:
    """One run. It is not evaluated before its first step: the base's scores are known."""
    changes = method_changes(method, share, IMAGES)
    changes["evaluation"] = {"before": False}
    folder = output / method / f"replay-{share}" / f"seed-{seed}"
    config = configure(settings, base, folder, seed, changes)
    return ReplayCell(method, seed, config, share=share)


def _stage(method: str, share: int) -> int:
    at_claim = share in CLAIM_SHARES
    if at_claim and method in _FIRST:
        return 0
    if at_claim and method in NEW_METHODS or method == "uniform":
        return 1  # Uniform's other shares are what adaptive ones are compared with
    return 2 if at_claim or method == NO_REPLAY else 3


def choose(
    cells: Sequence[ReplayCell],
    methods: Sequence[str] | None,
    shares: Sequence[int] | None,
    seeds: Sequence[int] | None,
) -> list[ReplayCell]:
    """The cells of these methods, shares and seeds, in the grid's order; None: of all. Runs
    without replay belong to every share.

    Raises:
        ExperimentError: the grid has no such method, share or seed.
    """
    _check("--methods", methods, [cell.method for cell in cells])
    _check("--shares", shares, [cell.share for cell in cells if cell.share])
    _check("--seeds", seeds, [cell.seed for cell in cells])
    return [
        cell
        for cell in cells
        if (methods is None or cell.method in methods)
        and (shares is None or cell.share in (0, *shares))
        and (seeds is None or cell.seed in seeds)
    ]


def _check(option: str, given: Sequence[str | int] | None, known: Sequence[str | int]) -> None:
    for value in given or ():
        if value not in known:
            there = ", ".join(map(str, dict.fromkeys(known)))
            raise ExperimentError(f"{option}: {value} is not in the grid, which has {there}")
