"""The figures of the forgetting experiment, numbered as in the paper (arXiv 2510.21978v2).

Each is drawn from the runs' own metrics. Lines are means over seeds, bands one standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from recap_fast.report.plot_style import COLOURS, DPI, MUTED, STYLE, label_axes
from recap_fast.report.plots import Plot, moving_average
from recap_fast.reproduce.experiment import COMPARED
from recap_fast.reproduce.results import ABILITIES, MethodRuns

_PANEL = (3.4, 2.9)  # inches
_SMOOTHING = 9  # steps: a step's mean reward is that of a few groups
_BASELINE_REWEIGHTERS = ("dwa", "rlw", "uw", "saw")
_METHOD_COLOURS = {
    "reasoning-only": "#94a3b8", "propmix": "#d69a00", "uniform": "#2563eb", "coreset": "#0891b2",
    "lwf": "#8b5cf6", "recap": "#e4572e", "dwa": "#0f9d74", "rlw": "#be3f7d", "uw": "#64748b",
    "saw": "#78350f",
}  # fmt: skip

Runs = Sequence[MethodRuns]


def draw_figures(runs: Runs, folder: Path) -> list[Plot]:
    """Draws every figure that the compared methods have data for into `folder`, which is made if
    missing."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [method for method in runs if method.name in COMPARED]
    plots = []
    with mpl.rc_context(STYLE):
        for name, caption, draw in _FIGURES:
            figure = Figure(dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
            if draw(figure, runs):
                path = folder / f"{name}.png"
                figure.savefig(path)
                plots.append(Plot(name, caption, path))
    return plots


def _named(runs: Runs, name: str) -> MethodRuns | None:
    return next((method for method in runs if method.name == name), None)


def _panels(figure: Figure, count: int) -> list[Axes]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure.set_size_inches(_PANEL[0] * columns, _PANEL[1] * rows)
    panels = np.ravel(figure.subplots(rows, columns))
    for axes in panels[count:]:
        axes.set_visible(False)
    return list(panels[:count])


def _legend_below(figure: Figure, axes: Axes, columns: int = 5) -> None:
    """One legend for all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _line(
    axes: Axes, method: MethodRuns, key: str, colour: str, label: str, window: int = 1
) -> bool:
    """Mean over seeds with a band. Returns whether the runs have that metric."""
    steps, values = method.curve(key)
    if not len(steps):
        return False
    smooth = np.stack([moving_average(row, window) for row in values])
    middle = smooth.mean(0)
    axes.plot(steps, middle, color=colour, label=label, linewidth=1.6)
    if len(smooth) > 1:
        spread = smooth.std(0, ddof=1)
        axes.fill_between(
            steps, middle - spread, middle + spread, color=colour, alpha=0.12, linewidth=0
        )
    return True


def _objective_colours(method: MethodRuns) -> dict[str, str]:
    names = [objective.name for objective in method.config.objectives]
    return dict(zip(names, COLOURS, strict=False))


def _forgetting(figure: Figure, runs: Runs) -> bool:
    """Change of each ability from before to after, a bar for each method."""
    for axes, score in zip(_panels(figure, len(ABILITIES)), ABILITIES.values(), strict=True):
        changes = [method.ends(score) - method.starts(score) for method in runs]
        axes.bar(
            range(len(runs)),
            [change.mean() for change in changes],
            yerr=[change.std(ddof=1) if len(change) > 1 else 0.0 for change in changes],
            color=[_METHOD_COLOURS[method.name] for method in runs],
            error_kw={"ecolor": MUTED, "elinewidth": 1},
        )
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.set_title(score.label)
        axes.set_ylabel("after minus before")
        axes.grid(visible=False, axis="x")
        axes.set_xticks(
            range(len(runs)), [method.label for method in runs], rotation=55, ha="right"
        )
    return True


def _signals(figure: Figure, runs: Runs) -> bool:
    """What RECAP sees of each objective: its value, rate and instability."""
    recap = _named(runs, "recap")
    if recap is None:
        return False
    panels = _panels(figure, 3)
    titles = (
        ("Reward, or loss of ntp", "mean of a step", ("reward", "loss")),
        ("Convergence rate", "c", ("rate",)),
        ("Instability", "i", ("instability",)),
    )
    for axes, (title, unit, prefixes) in zip(panels, titles, strict=True):
        label_axes(axes, title, unit)
        for objective in recap.config.objectives:
            prefix = prefixes[0] if len(prefixes) == 1 else objective.kind
            colour = _objective_colours(recap)[objective.name]
            window = _SMOOTHING if len(prefixes) > 1 else 1
            _line(axes, recap, f"{prefix}/{objective.name}", colour, objective.name, window)
    panels[1].axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _legend_below(figure, panels[0])
    return True


def _training_curves(figure: Figure, runs: Runs) -> bool:
    """Training reward (or loss) of every objective, RECAP beside Uniform."""
    compared = [m for m in runs if m.name in ("uniform", "recap")]
    if len(compared) < 2:
        return False
    objectives = compared[0].config.objectives
    panels = _panels(figure, len(objectives))
    for axes, objective in zip(panels, objectives, strict=True):
        label_axes(axes, objective.name, objective.kind)
        for method in compared:
            key = f"{objective.kind}/{objective.name}"
            _line(axes, method, key, _METHOD_COLOURS[method.name], method.label, _SMOOTHING)
    _legend_below(figure, panels[0])
    return True


def _ability_curves(figure: Figure, runs: Runs) -> bool:
    """Held-out abilities over the steps, every method."""
    panels = _panels(figure, len(ABILITIES))
    for axes, score in zip(panels, ABILITIES.values(), strict=True):
        label_axes(axes, score.label, "held out, greedy")
        for method in runs:
            _line(axes, method, score.key, _METHOD_COLOURS[method.name], method.label)
    _legend_below(figure, panels[0])
    return True


def _losses(figure: Figure, runs: Runs) -> bool:
    """The replayed loss over time, and how unsteady the reasoning reward is, every method."""
    left, right = _panels(figure, 2)
    label_axes(left, "Replayed loss (ntp)", "nats per token")
    label_axes(right, "Unsteadiness of accuracy", "σ / (μ + μ~)")
    for method in runs:
        colour = _METHOD_COLOURS[method.name]
        _line(left, method, "loss/ntp", colour, method.label, _SMOOTHING)
        _unsteadiness(right, method, "reward/accuracy", colour)
    _legend_below(figure, right, columns=4)
    return True


def _unsteadiness(axes: Axes, method: MethodRuns, key: str, colour: str, window: int = 10) -> None:
    """The paper's instability of a metric, computed alike for methods that do not use it."""
    steps, values = method.curve(key)
    if len(steps) < 2 * window:
        return
    blocks = np.lib.stride_tricks.sliding_window_view(values, 2 * window, axis=1)
    sums = blocks[..., :window].mean(-1) + blocks[..., window:].mean(-1)
    unsteady = blocks.std(-1, ddof=1) / np.maximum(sums, 1e-6)  # [R, E - 2 * window + 1]
    axes.plot(
        steps[2 * window - 1 :], unsteady.mean(0), color=colour, label=method.label, linewidth=1.6
    )


def _weights(figure: Figure, runs: Runs) -> bool:
    """RECAP's weights over time as shares, which is what the paper's figure shows."""
    recap = _named(runs, "recap")
    if recap is None:
        return False
    (axes,) = _panels(figure, 1)
    figure.set_size_inches(6.4, 3.6)
    _draw_shares(axes, recap, "RECAP's weights")
    _legend_below(figure, axes)
    return True


def _baseline_weights(figure: Figure, runs: Runs) -> bool:
    methods = [method for method in runs if method.name in _BASELINE_REWEIGHTERS]
    if not methods:
        return False
    panels = _panels(figure, len(methods))
    for axes, method in zip(panels, methods, strict=True):
        _draw_shares(axes, method, method.label)
    _legend_below(figure, panels[0])
    return True


def _draw_shares(axes: Axes, method: MethodRuns, title: str) -> None:
    names = [objective.name for objective in method.config.objectives]
    label_axes(axes, title, "λ / K")
    axes.axhline(1 / len(names), color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for name, colour in _objective_colours(method).items():
        steps, values = method.curve(f"weight/{name}")
        axes.plot(steps, values.mean(0) / len(names), color=colour, label=name, linewidth=1.6)


_FIGURES: tuple[tuple[str, str, Callable[[Figure, Runs], bool]], ...] = (
    ("figure-02", "Held-out abilities after training against before.", _forgetting),
    ("figure-04", "RECAP's signals: value, convergence rate and instability.", _signals),
    ("figure-05", "Training rewards and loss, RECAP beside Uniform.", _training_curves),
    ("figure-07", "Held-out abilities over the steps.", _ability_curves),
    ("figure-10", "The replayed loss, and the unsteadiness of the reasoning reward.", _losses),
    ("figure-11", "RECAP's weights over the steps.", _weights),
    ("figure-12", "The other reweighters' weights over the steps.", _baseline_weights),
)
