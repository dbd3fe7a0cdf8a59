"""Runs the benchmark suites of a checkout and reports what they found."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recap_fast.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ("small", "cpu", "gpu")
RESULTS = "results.json"


def suites() -> dict[str, Path]:
    """The suites' files by name; empty where this is no checkout of the repository."""
    files = sorted((ROOT / "benchmarks").glob("test_*.py"))
    return {file.stem.removeprefix("test_"): file for file in files}


def run_suites(
    names: Sequence[str],
    *,
    shapes: str = "small",
    keyword: str | None = None,
    rounds: int = 5,
    deadline: float | None = None,
    output: Path,
) -> int:
    """Runs suites, prints their tables and writes `output`/results.json and PNGs.

    Args:
        names: suites; empty: all.
        shapes: "small" (seconds), "cpu" (the shape of the CPU budgets), "gpu" (of the GPU's).
        keyword: only implementations that match this expression, as pytest's -k.
        rounds: timed rounds of each implementation.
        deadline: seconds after which no further measurement starts.

    Returns:
        0, or 1 where an implementation of ours failed or gave a wrong result.

    Raises:
        UserError: an unknown suite or word for shapes, or nothing that matches `keyword`.
    """
    known = suites()
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none (not a checkout)"
            raise UserError(f"bench: no suite {name!r}; there are: {listed}")
    if shapes not in SHAPES:
        raise UserError(f"bench: --shapes wants one of {', '.join(SHAPES)}, got {shapes!r}")
    results = output.resolve() / RESULTS
    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    options = [f"--shapes={shapes}", f"--rounds={rounds}"]
    if keyword is not None:
        options += ["-k", keyword]
    if deadline is not None:
        options.append(f"--deadline={deadline}")
    # Rewritten, so that no path of this machine gets into the results.
    command = shlex.join(["recap-fast", "bench", *names, *options])
    status = subprocess.call(
        [
            sys.executable, "-m", "pytest", *(str(known[name]) for name in names or known),
            *options, f"--command={command}", f"--benchmark-json={results}", "--benchmark-quiet",
            "-q", "--disable-warnings", "-p", "no:cacheprovider", f"--rootdir={ROOT}",
        ],
        cwd=ROOT,
    )  # fmt: skip
    if status == 5:
        raise UserError(f"bench: nothing matches -k {keyword!r}")
    if results.exists():
        print_report(results, results.parent)
    return min(status, 1)


def print_report(results: Path, figures: Path) -> None:
    """Prints the tables of a results file, and draws its plots into the folder `figures`.

    Raises:
        UserError: no such file, or a file that the suites did not write.
    """
    from recap_fast.bench.report import absences, draw_plots, draw_tables, load_benchmarks

    benchmarks = load_benchmarks(results)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in draw_tables(benchmarks):
        console.print(table)
    if missing := absences(benchmarks):
        console.print("Not measured:", style="bold")
        for line in missing:
            console.print("  " + line, markup=False, highlight=False)
    plots = draw_plots(benchmarks, figures)
    console.print(
        f"{results}; {len(plots)} figures in {figures}", soft_wrap=True, markup=False,
        highlight=False,
    )  # fmt: skip
