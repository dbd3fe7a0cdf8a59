"""Tables and figures from what the benchmark suites measured.

Reads the JSON of pytest-benchmark as the suites in benchmarks/ fill it: times in `stats`, the rest
in `extra_info`, and what could not be measured, with the reason, in `not_measured`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from recap_fast.report.plot_style import COLOURS, DPI, INK, STYLE
from recap_fast.types import UserError

OURS = "recap-fast"
_FLOOR_COLOUR, _PEER_COLOUR = "#94a3b8", "#cbd5e1"
_ERRORS = {
    "error_logprobs": "log-prob err",
    "error_hidden": "dX err",
    "error_weight": "dW err",
    "error_logits": "dlogits err",
    "error_advantages": "error",
    "error_weights": "error",
}


@dataclass(frozen=True, slots=True)
class Result:
    """One implementation on one size of problem. Times in seconds."""

    suite: str
    size: str
    implementation: str
    median: float
    fastest: float
    slowest: float
    percent_of_floor: float | None = None
    tflops: float | None = None
    peak_mib: float | None = None  # beyond operands and gradients
    is_floor: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)  # column title -> number

    @property
    def is_ours(self) -> bool:
        return self.implementation.startswith(OURS)


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """An implementation without a time, and why."""

    group: str  # suite and size
    implementation: str
    reason: str
    failed: bool  # ours, or the floor: a bug, not an absence


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """What one run of the suites found."""

    results: list[Result]
    not_measured: list[NotMeasured]
    provenance: dict[str, Any]  # command, date, device, versions

    @property
    def groups(self) -> list[tuple[str, str]]:
        """(suite, size) in the order in which they ran."""
        return list(dict.fromkeys((r.suite, r.size) for r in self.results))

    def of(self, suite: str, size: str) -> list[Result]:
        return [r for r in self.results if (r.suite, r.size) == (suite, size)]


def load_benchmarks(path: Path) -> Benchmarks:
    """Reads a JSON file of the suites.

    Raises:
        UserError: no such file, or a file that the suites did not write.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Benchmarks(
            results=[_result(benchmark) for benchmark in record["benchmarks"]],
            not_measured=[NotMeasured(**entry) for entry in record["not_measured"]],
            provenance=record["recap_fast"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: wanted pytest-benchmark's JSON as the suites in benchmarks/ write it, "
            f"got {type(error).__name__}: {error}"
        ) from error


def _result(benchmark: dict[str, Any]) -> Result:
    extra, stats = benchmark["extra_info"], benchmark["stats"]
    return Result(
        suite=extra["suite"],
        size=extra["size"],
        implementation=extra["implementation"],
        median=stats["median"],
        fastest=stats["min"],
        slowest=stats["max"],
        percent_of_floor=extra.get("percent_of_floor"),
        tflops=extra.get("tflops"),
        peak_mib=extra.get("peak_mib"),
        is_floor=extra.get("kind") == "floor",
        errors={name: extra[name] for name in _ERRORS if name in extra},
        more=extra.get("more", {}),
    )


def draw_tables(benchmarks: Benchmarks) -> list[Table]:
    """One table for each suite and size, the fastest first."""
    return [_table(suite, size, benchmarks.of(suite, size)) for suite, size in benchmarks.groups]


def _table(suite: str, size: str, results: Sequence[Result]) -> Table:
    ordered = sorted(results, key=lambda result: result.median)
    unit, scale = time_unit(ordered[0].median)
    has_peers = any(not r.is_ours and not r.is_floor for r in results)
    ours = min((r.median for r in results if r.is_ours and has_peers), default=None)
    columns: dict[str, list[str]] = {
        unit: [_number(r.median * scale) for r in ordered],
        "fastest": [_number(r.fastest * scale) for r in ordered],
        "x ours": ["" if ours is None else f"{r.median / ours:.2f}" for r in ordered],
        "% of floor": [_optional(r.percent_of_floor, ".0f") for r in ordered],
        "TFLOP/s": [_optional(r.tflops, ".3g") for r in ordered],
        "peak MiB": [_optional(r.peak_mib, ".0f") for r in ordered],
    }
    for name in dict.fromkeys(key for r in ordered for key in r.more):
        columns[name] = [_optional(r.more.get(name), ".4g") for r in ordered]
    for name in dict.fromkeys(key for r in ordered for key in r.errors):
        columns[_ERRORS[name]] = [_optional(r.errors.get(name), ".1e") for r in ordered]
    table = Table(title=f"{suite}: {size}", title_justify="left", title_style="bold")
    table.add_column("implementation")
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for row, result in enumerate(ordered):
        cells = (column[row] for column in shown.values())
        table.add_row(result.implementation, *cells, style="bold" if result.is_ours else "")
    return table


def absences(benchmarks: Benchmarks) -> list[str]:
    """A line for each implementation and reason, with the number of times it came up."""
    counted: dict[tuple[str, str, str], int] = {}
    for entry in benchmarks.not_measured:
        key = (entry.group.split(" ")[0], entry.implementation, entry.reason)
        counted[key] = counted.get(key, 0) + 1
    return [
        f"{suite}, {name}: {reason}" + (f" ({count} times)" if count > 1 else "")
        for (suite, name, reason), count in counted.items()
    ]


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which `seconds` is a readable number, and units per second."""
    if seconds >= 10:
        return "s", 1.0
    return ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)


def _number(value: float) -> str:
    """Three digits, never in powers of ten."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 2)}f}"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw_plots(benchmarks: Benchmarks, folder: Path) -> list[Path]:
    """Draws time, peak memory and percent of the floor of each suite into `folder` as PNG.

    Each size of a suite is a panel. A figure without values is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(STYLE):
        for suite in dict.fromkeys(suite for suite, _ in benchmarks.groups):
            panels = [
                (size, benchmarks.of(suite, size)) for s, size in benchmarks.groups if s == suite
            ]
            for kind in ("time", "memory", "floor"):
                figure = _figure(suite, kind, panels)
                if figure is not None:
                    paths.append(folder / f"{suite}-{kind}.png")
                    figure.savefig(paths[-1])
    return paths


_TITLES = {
    "time": "median time, whiskers from fastest to slowest round",
    "memory": "peak memory beyond operands and gradients, MiB",
    "floor": "percent of the floor's speed",
}


def _figure(suite: str, kind: str, panels: Sequence[tuple[str, Sequence[Result]]]) -> Figure | None:
    kept = [(size, _values(kind, results)) for size, results in panels]
    kept = [(size, values) for size, values in kept if values]
    if not kept:
        return None
    columns = min(2, len(kept))
    rows = math.ceil(len(kept) / columns)
    most = max(len(values) for _, values in kept)
    figure = Figure(
        figsize=(7.2 * columns, 0.5 + rows * (0.95 + 0.27 * most)),
        dpi=DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.09),
    )
    figure.suptitle(f"{suite}: {_TITLES[kind]}", x=0.01, ha="left", fontsize=12, weight="bold")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (size, values) in zip(grid, kept, strict=False):
        _bars(axes, kind, size, values)
    for axes in grid[len(kept) :]:
        axes.set_axis_off()
    return figure


def _values(kind: str, results: Sequence[Result]) -> list[tuple[Result, float]]:
    """What a figure shows of each result, the best first."""
    attribute = {"time": "median", "memory": "peak_mib", "floor": "percent_of_floor"}[kind]
    found = [(result, getattr(result, attribute)) for result in results]
    known = [(result, value) for result, value in found if value is not None]
    return sorted(known, key=lambda pair: pair[1], reverse=kind == "floor")


def _bars(axes: Axes, kind: str, size: str, values: Sequence[tuple[Result, float]]) -> None:
    unit, scale = {"memory": ("MiB", 1.0), "floor": ("%", 1.0)}.get(kind) or time_unit(
        values[len(values) // 2][1]
    )
    names = [result.implementation for result, _ in values]
    lengths = [value * scale for _, value in values]
    axes.barh(names, lengths, height=0.62, color=[_colour(result) for result, _ in values])
    if kind == "time":
        lows = [(r.median - r.fastest) * scale for r, _ in values]
        highs = [(r.slowest - r.median) * scale for r, _ in values]
        axes.errorbar(
            lengths, range(len(values)), xerr=(lows, highs), fmt="none", ecolor=INK, elinewidth=0.9
        )
        ends = [length + high for length, high in zip(lengths, highs, strict=True)]
    else:
        ends = lengths
    for row, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        axes.annotate(
            f"{_number(length)}", (end, row), (4, 0), textcoords="offset points", va="center",
            fontsize=8.5,
        )  # fmt: skip
    axes.set_title(size, fontsize=10)
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.12 * max(ends) or 1.0)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _colour(result: Result) -> str:
    if result.is_ours:
        return COLOURS[0]
    return _FLOOR_COLOUR if result.is_floor else _PEER_COLOUR
