"""Tables and figures of what `signals` finds, and the command's work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recap_fast.report.metrics import describe_machine
from recap_fast.report.plot_style import COLOURS, MUTED, STYLE
from recap_fast.reproduce.grid import make_output
from recap_fast.reproduce.signals import (
    CASES,
    FORMAT_LEARNT,
    KNOBS,
    OBJECTIVES,
    PAPER_RANGE,
    READINGS,
    SCALES,
    SEEDS,
    SETTLED,
    STEPS,
    describe_case,
    describe_knobs,
    describe_reading,
    describe_scale,
    hybrid_curves,
    trace,
)

Rows = Mapping[str, Mapping[str, Any]]

_READING_HEADS = (
    "highest rate of the thinking format",
    "its distance from 1, settled",
    "its instability, settled",
    "accuracy's instability",
    "lowest share",
    "highest share",
    "settled: 1% of shares below",
    "1% above",
    "Figure 4",
    "Figure 11",
)
_KNOB_HEADS = (
    "format: highest weight",
    "steps to it",
    "accuracy, settled",
    "format, settled",
    "jitter",
)
_SCALE_HEADS = (
    "largest change of a weight",
    "accuracy, settled",
    "heaviest objective, settled",
    "largest instability",
)
_CASE_HEADS = ("c", "i", "weight meanwhile", "highest", "lowest", "weight afterwards")


@contextmanager
def _one_thread() -> Iterator[None]:
    """A call here is about a handful of numbers: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run_signals(output: Path) -> Path:
    """Analyses, and writes signals.md, results.json and PNGs into `output`.

    Returns:
        The tables' path.
    """
    make_output(output)
    values = hybrid_curves()
    tables: dict[str, tuple[Sequence[str], Rows]] = {
        "Readings": (
            _READING_HEADS,
            {one.name: describe_reading(one.trace(values)) for one in READINGS},
        ),
        "Knobs": (
            _KNOB_HEADS,
            {
                one.name: describe_knobs(trace(values, make=one.make, **one.parameters))
                for one in KNOBS
            },
        ),
        "Scales": (
            _SCALE_HEADS,
            {name: describe_scale(transform, values) for name, transform in SCALES.items()},
        ),
        "Cases": (_CASE_HEADS, {case.name: describe_case(case) for case in CASES}),
    }
    results = {name.lower(): rows for name, (_, rows) in tables.items()}
    document = {"machine": describe_machine(), **results}
    (output / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    path = output / "signals.md"
    path.write_text(render_signals(tables), encoding="utf-8")
    draw_curves(values, output / "signals-curves.png")
    draw_readings(tables["Readings"][1], output / "signals-readings.png")
    return path


def render_signals(tables: Mapping[str, tuple[Sequence[str], Rows]]) -> str:
    """Markdown, a table for each entry: first column the row's name, then its figures."""
    lines = [
        f"Synthetic curves: {STEPS} steps, {SEEDS} noise seeds, five objectives; settled from step "
        f"{SETTLED} on. Shares are lambda/K, weights are lambda."
    ]
    for title, (heads, rows) in tables.items():
        lines += ["", f"## {title}", "", f"| | {' | '.join(heads)} |"]
        lines.append("|---" * (len(heads) + 1) + "|")
        for name, figures in rows.items():
            lines.append(f"| {name} | {' | '.join(_cell(v) for v in figures.values())} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def draw_curves(values: np.ndarray, path: Path) -> None:
    """Curves, rates, instabilities and shares of one seed under the signal "reward"."""
    found = READINGS[0].trace(values)
    panels = (
        ("Step values", values[0]),
        ("Rate c", found.rates[0]),
        ("Instability i", found.instabilities[0]),
        ("Share of the weight, λ/K", found.weights[0] / len(OBJECTIVES)),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 5.6), dpi=90, layout="constrained")
        for axes, (title, series) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            axes.set_title(title)
            for k, name in enumerate(OBJECTIVES):
                axes.plot(series[:, k], color=COLOURS[k], linewidth=1.1, label=name, alpha=0.9)
            axes.set_xlabel("step")
        _mark_paper(axes, vertical=True)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(OBJECTIVES))
        figure.savefig(path)


def draw_readings(rows: Rows, path: Path) -> None:
    """The range of shares of each reading, over the run and settled, with the paper's range."""
    names = list(rows)[::-1]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.4), dpi=90, layout="constrained")
        axes = figure.subplots()
        for y, name in enumerate(names):
            row = rows[name]
            colour = COLOURS[2] if row["figure_11"] else COLOURS[7]
            whole = (row["lowest_share"], row["highest_share"])
            settled = (row["settled_low"], row["settled_high"])
            axes.plot(whole, (y, y), color=colour, linewidth=2)
            axes.plot(settled, (y, y), color=colour, linewidth=7, solid_capstyle="butt")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1), xlabel="share of the weight, λ/K (thin: whole run, thick: settled)")
        axes.set_title("Five objectives: which reading spans the paper's 0.16 to 0.30?")
        _mark_paper(axes, vertical=False)
        figure.savefig(path)


def _mark_paper(axes: Axes, *, vertical: bool) -> None:
    span = axes.axhspan if vertical else axes.axvspan
    span(*PAPER_RANGE, color=MUTED, alpha=0.15, zorder=0, linewidth=0)
    if vertical:
        axes.axvline(FORMAT_LEARNT, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
