"""`recap-fast reproduce replay`: the base, the runs that are asked for, and what came out."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recap_fast.reproduce.digits import base_scores, ensure_base
from recap_fast.reproduce.grid import GridError, check_folders, make_output, run_grid
from recap_fast.reproduce.replay import (
    CLAIM_SHARES,
    ReplayCell,
    ReplaySettings,
    choose,
    grid,
    make_cell,
)
from recap_fast.reproduce.replay_figure import draw_replay
from recap_fast.reproduce.replay_results import (
    CALLS_FILE,
    Outcomes,
    collect,
    is_missing,
    read_earlier,
    write_results,
)
from recap_fast.reproduce.results import ABILITIES


def run_replay(
    output: Path,
    settings: ReplaySettings,
    *,
    methods: Sequence[str] | None = None,
    shares: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int = 2,
    budget: float = math.inf,
    earlier: Path | None = None,
) -> str:
    """Runs what is missing of a part of the grid, and returns the tables of all that is finished.

    Args:
        output: folder of runs, calls.jsonl, results.json, results.md and figures/.
        settings: the grid; replay.FULL or replay.QUICK.
        methods, shares, seeds: the part, by name, percent and number; None: all.
        jobs: runs at a time.
        budget: minutes after which no run is started any more.
        earlier: results.json of another folder or machine; its runs are not done again, but
            Uniform's where the base is another here.

    Raises:
        UserError: stopped, a run failed, the folder or `earlier` holds another experiment, or the
            grid has no such part.
    """
    content, done = None, Outcomes({}, settings)
    if earlier is not None:
        content, done = read_earlier(earlier, settings)
    console = Console(stderr=True)
    began = time.monotonic()
    make_output(output)
    base = ensure_base(
        settings.base,
        lambda model: make_cell(settings, model, output, "uniform", CLAIM_SHARES[0], 0).config,
        console,
    )
    cells = grid(settings, base, output)
    chosen = choose(cells, methods, shares, seeds)
    measured = base_scores(base)
    scores = {name: measured[score.key] for name, score in ABILITIES.items()}
    missing = [cell for cell in chosen if is_missing(cell, scores, done)]
    check_folders(cells)
    _note_call(missing, jobs, output)

    def write() -> str:
        outcomes = collect(cells, scores, settings, output, done)
        if not outcomes.runs:
            return "no run is finished yet\n"
        for plot in draw_replay(outcomes, output / "figures"):
            console.print(f"{plot.path}: {plot.caption}", highlight=False, soft_wrap=True)
        return write_results(outcomes, cells, settings, output, content)

    try:
        run_grid(missing, jobs, console, budget=60 * budget - (time.monotonic() - began))
    except GridError:
        console.print(write())
        raise
    return write() + _describe_rest(missing, len(chosen))


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _note_call(chosen: Sequence[ReplayCell], jobs: int, output: Path) -> None:
    """Step times are compared within a call: others may have had other cores, or company."""
    call = {
        "started": now(),
        "jobs": jobs,
        "runs": [cell.key for cell in chosen if not cell.is_finished],
    }
    if call["runs"]:
        with (output / CALLS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(call) + "\n")


def _describe_rest(missing: Sequence[ReplayCell], asked: int) -> str:
    left = [cell for cell in missing if not cell.is_finished]
    if not left:
        return f"All {asked} runs that were asked for are finished.\n"
    counts = Counter((cell.method, cell.share) for cell in left)
    lines = [f"  {method}, {share} % replay: {n}\n" for (method, share), n in counts.items()]
    told = f"{len(left)} of the {asked} runs are left; the same command goes on:\n"
    return "\n" + told + "".join(lines)
