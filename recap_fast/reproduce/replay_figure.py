"""The figure of scarce replay: abilities against the share of rows that are replayed.

Fourteen lines in one panel cannot be told apart, so methods stand in columns of a few, each with
Uniform in grey, the base and what is left without replay.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from recap_fast.report.plot_style import COLOURS, DPI, INK, MUTED, STYLE
from recap_fast.report.plots import Plot
from recap_fast.reproduce.intervals import interval
from recap_fast.reproduce.replay import METHODS, NO_REPLAY
from recap_fast.reproduce.replay_results import Outcomes
from recap_fast.reproduce.results import ABILITIES

_COLUMNS: dict[str, tuple[str, ...]] = {
    "Weights": ("recap", "recap-balanced", "recap-retention"),
    "Rows": ("adaptive", "review", "together"),
    "Taken apart": ("balanced", "balanced-iou-3", "unclipped"),
    "Rivals": ("gdpo", "dwa", "saw"),
}
_ROWS = ("grounding", "ocr", "reasoning")
_SHORT = ("recap", "recap-balanced", "balanced")
"""Of the figure with one panel."""
_PANEL = (3.9, 3.0)  # inches
_DODGE = 0.035  # of a method's points in log(share), so that intervals do not cover one another


def draw_replay(outcomes: Outcomes, folder: Path) -> list[Plot]:
    """Draws the figure into `folder`, which is made if missing; nothing without a share."""
    if not any(share for _, share, _ in outcomes.runs):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(_PANEL[0] * len(_COLUMNS), _PANEL[1] * len(_ROWS)),
            dpi=DPI,
            layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08),
        )
        panels = figure.subplots(len(_ROWS), len(_COLUMNS), sharex=True, sharey="row")
        for row, ability in zip(panels, _ROWS, strict=True):
            for axes, methods in zip(row, _COLUMNS.values(), strict=True):
                _draw_panel(axes, outcomes, ability, methods)
            row[0].set_ylabel(f"{ABILITIES[ability].label}, change")
        for axes, title in zip(panels[0], _COLUMNS, strict=True):
            axes.set_title(title)
            axes.legend(loc="lower right", frameon=True, framealpha=0.85, edgecolor="none")
        for axes in panels[-1]:
            axes.set_xlabel("rows replayed")
        path = folder / "replay.png"
        figure.savefig(path)
    caption = "Change of held-out abilities by the share of rows replayed: means, 95 % intervals."
    return [Plot("replay", caption, path), _draw_grounding(outcomes, folder)]


def _draw_grounding(outcomes: Outcomes, folder: Path) -> Plot:
    """What most will look at: grounding alone, by a few methods."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        _draw_panel(axes, outcomes, "grounding", _SHORT)
        axes.set_title("What reinforcement on another task does to grounding")
        axes.set_ylabel(f"{ABILITIES['grounding'].label}, change")
        axes.set_xlabel("rows replayed")
        axes.legend(loc="lower right", frameon=True, framealpha=0.85, edgecolor="none")
        path = folder / "replay-grounding.png"
        figure.savefig(path)
    caption = "Change of held-out grounding by the share of rows replayed: means, 95 % intervals."
    return Plot("replay-grounding", caption, path)


def _draw_panel(axes: Axes, outcomes: Outcomes, ability: str, methods: tuple[str, ...]) -> None:
    if ability != "reasoning":  # of which the base has so little that methods would look the same
        axes.axhline(0, color=INK, linewidth=1, zorder=1)
        _label(axes, 0, "base", INK)
    alone = -outcomes.losses(NO_REPLAY, 0, ability)
    if len(alone):
        left = interval(alone)
        axes.axhline(left.mean, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.axhspan(left.low, left.high, color=MUTED, alpha=0.08, linewidth=0)
        _label(axes, left.mean, "no replay", MUTED)
    _draw_line(axes, outcomes, ability, "uniform", MUTED, -1.5)
    for place, (method, colour) in enumerate(zip(methods, COLOURS, strict=False)):
        _draw_line(axes, outcomes, ability, method, colour, place - 0.5)
    shares = sorted({share for _, share, _ in outcomes.runs if share})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(shares))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0f} %"))


def _label(axes: Axes, value: float, text: str, colour: str) -> None:
    axes.annotate(
        text, (0.01, value), xycoords=axes.get_yaxis_transform(), xytext=(0, 2),
        textcoords="offset points", color=colour, fontsize=8,
    )  # fmt: skip


def _draw_line(
    axes: Axes, outcomes: Outcomes, ability: str, method: str, colour: str, place: float
) -> None:
    """Means over seeds at the rows that were replayed, with their intervals."""
    shares = outcomes.shares(method)
    if not shares:
        return
    found = [interval(-outcomes.losses(method, share, ability)) for share in shares]
    at = [outcomes.replayed(method, share) * np.exp(_DODGE * place) for share in shares]
    means = np.array([one.mean for one in found])
    axes.errorbar(
        at,
        means,
        yerr=np.stack([means - [one.low for one in found], [one.high for one in found] - means]),
        color=colour,
        label=METHODS[method].label,
        linewidth=1.6,
        elinewidth=1,
        marker="o",
        markersize=3.5,
    )
