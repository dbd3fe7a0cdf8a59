"""What the toy problem's runs amount to: measures, tables, figures, and the command's work."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recap_fast.report.metrics import describe_machine
from recap_fast.report.plot_style import COLOURS, INK, MUTED, STYLE
from recap_fast.reproduce.grid import make_output
from recap_fast.reproduce.toy import (
    FAMILIES,
    NEAR,
    NOISE,
    PRINTINGS,
    SEEDS,
    STARTS,
    STEPS,
    Runs,
    Setting,
    distance_to_front,
    pareto_front,
    simulate,
    toy_losses,
)

QUICK_STEPS, QUICK_SEEDS = 2_000, 2
_TITLES = {
    "methods": "Methods",
    "alpha": "alpha (s = alpha c + (1 - alpha) i, T = 5)",
    "temperature": "Temperature (s = (c + i) / 2)",
    "window": "Window (s = c + i, T = 5)",
    "variants": "Variants of RECAP",
}
_COLUMNS = 5  # panels in a row
_CONTOURS = ListedColormap(mpl.colormaps["Greys_r"](np.linspace(0.5, 0.97, 16)))


@dataclass(frozen=True)
class Outcome:
    """One setting under one printing. Arrays are [starts, seeds] float64."""

    setting: Setting
    printing: str
    distance: np.ndarray  # to the front, at the end
    losses: np.ndarray  # [starts, seeds, 2] noise-free, at the end
    steps_until_near: np.ndarray  # NaN where it never came near
    share_near: np.ndarray  # of the last tenth of the steps
    wander: np.ndarray  # standard deviation of the position over the last tenth
    jitter: np.ndarray  # mean change of a weight in a step

    @property
    def reached(self) -> np.ndarray:
        """Starts [starts] from which every seed ends near the front."""
        return np.all(self.distance <= NEAR, axis=1)


def run_toy(
    output: Path,
    *,
    quick: bool = False,
    steps: int | None = None,
    seeds: int | None = None,
    noise: float = NOISE,
) -> Path:
    """Simulates, and writes table.md, results.json and one PNG a family into `output`.

    Args:
        quick: fewer steps and seeds, for a check; unless given by `steps` and `seeds`.

    Returns:
        The table's path.
    """
    make_output(output)
    steps = steps or (QUICK_STEPS if quick else STEPS)
    seeds = seeds or (QUICK_SEEDS if quick else SEEDS)
    settings = [setting for family in FAMILIES.values() for setting in family]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("toy problem", total=steps)
        runs = simulate(
            settings, steps, seeds, noise, lambda done: progress.update(task, completed=done)
        )
    fronts = {printing: pareto_front(printing) for printing in PRINTINGS}
    outcomes = measure(runs, fronts)
    table = output / "table.md"
    table.write_text(render_tables(outcomes, steps, seeds, noise), encoding="utf-8")
    results = as_json(outcomes, steps, seeds, noise)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for printing in PRINTINGS:
        for family in FAMILIES:
            path = output / f"toy-{family}-{printing}.png"
            draw_family(runs, FAMILIES[family], printing, fronts[printing].numpy(), path)
    return table


def measure(runs: Runs, fronts: Mapping[str, torch.Tensor]) -> list[Outcome]:
    """An outcome for each setting and printing, in the order of FAMILIES, then PRINTINGS."""
    losses = runs.losses()
    late = runs.steps > 0.9 * runs.steps[-1]
    outcomes = []
    for setting in sorted(runs.settings, key=_place):
        at = runs.settings.index(setting)
        for p, printing in enumerate(PRINTINGS):
            distance = distance_to_front(losses[:, at, p], fronts[printing])  # [G, starts, seeds]
            is_near = distance <= NEAR
            first = torch.where(is_near.any(0), runs.steps[is_near.byte().argmax(0)], math.nan)
            spread = runs.positions[late, at, p].double().std(dim=0, correction=0).norm(dim=-1)
            outcomes.append(
                Outcome(
                    setting,
                    printing,
                    distance[-1].double().numpy(),
                    losses[-1, at, p].numpy(),
                    first.numpy(),
                    is_near[late].double().mean(dim=0).numpy(),
                    spread.numpy(),
                    runs.jitter[at, p].double().numpy(),
                )
            )
    return outcomes


def _place(setting: Setting) -> int:
    return [one.name for family in FAMILIES.values() for one in family].index(setting.name)


def render_tables(outcomes: Sequence[Outcome], steps: int, seeds: int, noise: float) -> str:
    """Markdown: a table for each family and printing, and one by start for the methods."""
    lines = [
        f"Toy problem: {steps:,} steps of Adam, {len(STARTS)} starts, {seeds} noise seeds, noise "
        f"{noise:g}. Runs that miss are not near the front at the end, start by start. "
        f"Distances are in loss space; near is within {NEAR:g}. "
        "Plus-minus is the standard deviation over seeds of the mean over starts; "
        '"moves" is the standard deviation of the position over the last tenth of the steps, '
        '"jitter" the mean change of a weight in a step.'
    ]
    for printing in PRINTINGS:
        for family, title in _TITLES.items():
            names = {setting.name for setting in FAMILIES[family]}
            rows = [o for o in outcomes if o.printing == printing and o.setting.name in names]
            lines += ["", f"## {title}, bowls of {printing}", "", *_summary(rows)]
            if family == "methods":
                lines += ["", *_by_start(rows)]
    return "\n".join(lines) + "\n"


def _summary(rows: Sequence[Outcome]) -> list[str]:
    lines = [
        "| setting | starts reached by every seed | runs that miss, by start | distance "
        "| worst run | L1 | L2 | steps until near | time near, last tenth | moves | jitter |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        cells = [
            row.setting.name,
            f"{row.reached.sum()} of {len(STARTS)}",
            ", ".join(str(count) for count in (row.distance > NEAR).sum(axis=1)),
            _spread(row.distance),
            f"{row.distance.max():.2f}",
            _spread(row.losses[..., 0]),
            _spread(row.losses[..., 1]),
            _mean_steps(row.steps_until_near),
            f"{row.share_near.mean():.0%}",
            f"{row.wander.mean():.3f}",
            f"{row.jitter.mean():.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _by_start(rows: Sequence[Outcome]) -> list[str]:
    """Distance at the end from each start, and where on the front: the losses."""
    heads = [f"from ({a:g}, {b:g})" for a, b in STARTS]
    lines = [f"| distance; L1, L2 | {' | '.join(heads)} |", "|---" * (len(STARTS) + 1) + "|"]
    for row in rows:
        cells = [
            f"{distance.mean():.2f} ± {distance.std():.2f}; "
            f"{losses[:, 0].mean():.1f}, {losses[:, 1].mean():.1f}"
            for distance, losses in zip(row.distance, row.losses, strict=True)
        ]
        lines.append(f"| {row.setting.name} | {' | '.join(cells)} |")
    return lines


def _spread(values: np.ndarray) -> str:
    """Mean of [starts, seeds] with the standard deviation over seeds of the starts' mean."""
    by_seed = values.mean(axis=0)
    return f"{by_seed.mean():.2f} ± {by_seed.std():.2f}"


def _mean_steps(values: np.ndarray) -> str:
    there = values[~np.isnan(values)]
    if not len(there):
        return "never"
    missing = "" if len(there) == values.size else f" ({len(there)} of {values.size} runs)"
    return f"{there.mean():,.0f}{missing}"


def as_json(outcomes: Sequence[Outcome], steps: int, seeds: int, noise: float) -> dict[str, Any]:
    """Everything in the tables, run by run, with the machine. NaN is None."""
    rows = [
        {
            "setting": row.setting.name,
            "method": row.setting.method,
            "parameters": row.setting.parameters,
            "printing": row.printing,
            "distance": _rounded(row.distance),
            "losses": _rounded(row.losses),
            "steps_until_near": _rounded(row.steps_until_near),
            "share_near": _rounded(row.share_near),
            "wander": _rounded(row.wander),
            "jitter": _rounded(row.jitter),
        }
        for row in outcomes
    ]
    return {
        "machine": describe_machine(),
        "steps": steps,
        "seeds": seeds,
        "noise": noise,
        "starts": STARTS,
        "near": NEAR,
        "outcomes": rows,
    }


def _rounded(values: np.ndarray) -> Any:
    """Nested lists of numbers with six decimals; NaN becomes None."""
    if values.ndim:
        return [_rounded(value) for value in values]
    return None if math.isnan(values) else round(float(values), 6)


def draw_family(
    runs: Runs, family: Sequence[Setting], printing: str, front: np.ndarray, path: Path
) -> None:
    """A PNG with two panels a setting: the path over the loss contours, and in loss space.

    A line is the first noise seed from one start, a dot is where one seed ends.
    """
    blocks = math.ceil(len(family) / _COLUMNS)
    columns = min(len(family), _COLUMNS)
    losses = runs.losses()
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(2.15 * columns + 0.5, 4.3 * blocks), dpi=80, layout="constrained")
        grid = figure.subplots(2 * blocks, columns, squeeze=False)
        for number in range(len(family), blocks * columns):
            block, column = divmod(number, columns)
            grid[2 * block, column].remove()
            grid[2 * block + 1, column].remove()
        for number, setting in enumerate(family):
            block, column = divmod(number, columns)
            at = runs.settings.index(setting), PRINTINGS.index(printing)
            above, below = grid[2 * block, column], grid[2 * block + 1, column]
            above.set_title(setting.name)
            _draw_positions(above, runs.positions[:, at[0], at[1]].numpy(), printing)
            _draw_losses(below, losses[:, at[0], at[1]].numpy(), front)
            if column == 0:
                above.set_ylabel("x2")
                below.set_ylabel("L2")
        figure.savefig(path)


def _draw_positions(axes: Axes, positions: np.ndarray, printing: str) -> None:
    """`positions` [G, starts, seeds, 2] over contours of the mean loss."""
    side = torch.linspace(-11, 11, 160, dtype=torch.float64)
    x2, x1 = torch.meshgrid(side, side, indexing="ij")
    mean = toy_losses(torch.stack((x1, x2), -1), torch.tensor(printing == "paper")).mean(-1)
    axes.contourf(side, side, mean, levels=16, cmap=_CONTOURS)
    _draw_paths(axes, positions)
    axes.set(xlim=(-11, 11), ylim=(-11, 11), xlabel="x1", xticks=(-10, 0, 10), yticks=(-10, 0, 10))


def _draw_losses(axes: Axes, losses: np.ndarray, front: np.ndarray) -> None:
    """`losses` [G, starts, seeds, 2] and the front [F, 2]."""
    axes.plot(front[:, 0], front[:, 1], color=INK, linewidth=3, alpha=0.35, zorder=1)
    _draw_paths(axes, losses)
    axes.set(xlim=(-21, 11), ylim=(-21, 11), xlabel="L1", xticks=(-20, -10, 0, 10))
    axes.set_yticks((-20, -10, 0, 10))


def _draw_paths(axes: Axes, paths: np.ndarray) -> None:
    for start, colour in zip(range(len(STARTS)), COLOURS, strict=False):
        path = paths[:, start, 0]
        axes.plot(path[:, 0], path[:, 1], color=colour, linewidth=1, zorder=2)
        axes.plot(*path[0], marker="o", color="white", markeredgecolor=colour, markersize=4)
        ends = paths[-1, start]
        axes.scatter(ends[:, 0], ends[:, 1], s=9, color=colour, edgecolors="none", zorder=3)
    axes.tick_params(labelcolor=MUTED)
