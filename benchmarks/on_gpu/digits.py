"""The forgetting experiment at its larger size; goes on where an earlier call was stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.on_gpu.part import Context, SkipPartError
from recap_fast.reproduce.digits import base_scores
from recap_fast.reproduce.digits_report import SIZES, run_digits
from recap_fast.reproduce.experiment import ExperimentSettings, grid
from recap_fast.reproduce.grid import GridError
from recap_fast.reproduce.results import RESULTS_FILE

JOBS = 4
"""Runs at a time: a model of this size leaves a GPU idle between launches."""
SAVING_SECONDS = 90
"""Kept of LIMIT for the runs' last checkpoints."""


def run(context: Context) -> dict[str, Any]:
    """Held-out scores of the runs that are finished, and how many are not.

    The runs stay in runs/reproduce/, which git ignores.

    Raises:
        SkipPartError: scikit-learn, which has the digits, is not installed.
    """
    if find_spec("sklearn") is None:
        raise SkipPartError("scikit-learn is not installed")
    settings = SIZES["large"]
    output = Path("runs/reproduce/digits-large")
    if context.rehearse:
        quick = SIZES["quick"]
        settings = replace(
            quick,
            base=replace(quick.base, reading_steps=2, steps=2),
            methods=("recap",),
            steps=2,
            held_out=4,
        )
        output = context.work / "digits"
        os.environ["RECAP_FAST_CACHE"] = str(context.work / "cache")  # keeps no such base

    def stop(number: int, frame: FrameType | None) -> None:
        raise GridError("stopped between runs; the same command goes on from here")

    # The grid takes SIGTERM as the wish to save and stop; outside of it nothing is lost.
    signal.signal(signal.SIGTERM, stop)
    limit = int(os.environ.get("LIMIT", "600")) - SAVING_SECONDS
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(limit, expire)
    timer.daemon = True
    timer.start()
    try:
        run_digits(output, settings, jobs=1 if context.rehearse else JOBS)
    except GridError as error:
        if not expired.is_set():
            raise  # a run failed
        print(error)
    finally:
        timer.cancel()
    return _results(settings, output)


def _results(settings: ExperimentSettings, output: Path) -> dict[str, Any]:
    base = settings.base.folder
    cells = grid(settings, base, output)
    finished = [cell for cell in cells if cell.is_finished]
    results: dict[str, Any] = {"runs": len(cells), "finished_runs": len(finished)}
    if base.is_dir():
        results["base"] = base_scores(base)
    if finished:  # the experiment has written what they gave, also where it was stopped
        results |= json.loads((output / RESULTS_FILE).read_text(encoding="utf-8"))
    return results
