"""`recap-fast reproduce digits`: the base, the grid, and what came out of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from recap_fast.reproduce.digits import SCORES_FILE, BaseSettings, base_scores, ensure_base
from recap_fast.reproduce.experiment import METHODS, ExperimentSettings, grid, run_config
from recap_fast.reproduce.figures import draw_figures
from recap_fast.reproduce.grid import Cell, GridError, make_output, run_grid
from recap_fast.reproduce.results import SCORES, collect, write_results

FULL = ExperimentSettings()
QUICK = ExperimentSettings(
    base=BaseSettings(
        text_width=64, text_layers=2, vision_width=64, vision_layers=2, reading_steps=60, steps=60
    ),
    methods=("reasoning-only", "uniform", "recap"),
    seeds=(0,),
    steps=12,
    batch_size=6,
    evaluate_every=6,
    held_out=32,
    window=3,
)
"""Shows that everything works, and nothing else: its base has hardly learnt to see."""
LARGE = ExperimentSettings(
    base=BaseSettings(
        text_width=384,
        text_layers=8,
        vision_width=192,
        vision_layers=4,
        batch_size=32,
        learning_rate=3e-4,
    ),
    methods=("reasoning-only", "uniform", "lwf", "recap"),
    seeds=(0, 1, 2, 3, 4),
    batch_size=48,
    learning_rate=2e-4,
)
"""Thirteen times the parameters, for a GPU. Its learning rates are FULL's over the ratio of widths,
rounded: no pilot has been made."""
SIZES = {"quick": QUICK, "full": FULL, "large": LARGE}


def run_digits(
    output: Path,
    settings: ExperimentSettings,
    *,
    extended: bool = False,
    jobs: int = 2,
    base_only: bool = False,
) -> str:
    """Runs what is missing of the experiment and returns its table.

    Args:
        output: folder of runs, results.json, results.md and figures/.
        settings: what runs; SIZES has three.
        extended: other KLs, longer Uniform runs and parts of RECAP beside the ten methods.
        jobs: runs at a time.
        base_only: builds the base if it is missing, and returns its scores.

    Raises:
        UserError: stopped, a run failed, or the folder holds another experiment.
    """
    if extended:
        settings = replace(settings, methods=tuple(METHODS))
    console = Console(stderr=True)
    make_output(output)
    built = (settings.base.folder / SCORES_FILE).exists()
    console.print(
        f"the base is {settings.base.folder}" if built else "building the base", highlight=False
    )
    scored = settings.methods[0]
    base = ensure_base(
        settings.base, lambda model: run_config(settings, model, output, scored, seed=0), console
    )
    if base_only:
        return _describe_base(base_scores(base))
    cells = grid(settings, base, output)
    try:
        run_grid(cells, jobs, console)
    except GridError:
        if collect(cells):
            console.print(_write(cells, settings, output, console))
        raise
    return _write(cells, settings, output, console)


def _write(
    cells: Sequence[Cell], settings: ExperimentSettings, output: Path, console: Console
) -> str:
    """Tables and figures of the finished runs."""
    runs = collect(cells)
    table = write_results(runs, settings, output)
    for plot in draw_figures(runs, output / "figures"):
        console.print(f"{plot.path}: {plot.caption}", highlight=False, soft_wrap=True)
    return table


def _describe_base(scores: Mapping[str, float]) -> str:
    shown = {score.label: scores[score.key] for score in SCORES.values()}
    return json.dumps({**shown, "seconds": scores["seconds"]}, indent=1)
