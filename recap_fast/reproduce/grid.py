"""A resumable grid of training runs, each in a process of its own.

Each run has its own folder, and `recap-fast train` could run any of them. A grid that is started
again skips what is finished and resumes what was interrupted.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from recap_fast.config import ConfigError, TrainConfig, load_config, save_config
from recap_fast.report.metrics import read_metrics
from recap_fast.training.checkpoint import list_checkpoints
from recap_fast.training.stop_signals import collect_stop_signals
from recap_fast.types import UserError

LOG_FILE = "train.log"

_POLL_SECONDS = 0.5


class GridError(UserError):
    """A grid that cannot be run, that was stopped, or a run of it that failed."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid."""

    method: str
    seed: int
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def step(self) -> int:
        """Steps recorded so far."""
        rows = read_metrics(self.folder)
        return int(rows[-1]["step"] or 0) if rows else 0

    @property
    def is_finished(self) -> bool:
        """Whether the last step and the evaluation after it are recorded."""
        rows = read_metrics(self.folder)
        last = rows[-1] if rows else {}
        return last.get("step") == self.config.training.steps and any(
            key.startswith("eval/") for key in last
        )


def run_grid(
    cells: Sequence[Cell], jobs: int, console: Console, *, budget: float = math.inf
) -> None:
    """Runs what is not finished, `jobs` runs at a time, each with its share of the cores.

    On SIGTERM or Ctrl-C the runs write checkpoints and stop, and so does the grid.

    Args:
        budget: seconds after which no run is started any more; those under way are finished.

    Raises:
        GridError: a folder holds a run with other settings; a run failed (the others are
            finished first); or the grid was stopped.
    """
    check_folders(cells)
    deadline = time.monotonic() + budget
    waiting = [cell for cell in cells if not cell.is_finished]
    done = len(cells) - len(waiting)
    if done:
        console.print(f"{done} of {len(cells)} runs are finished already")
    running: list[_Process] = []
    failed: list[_Process] = []
    with (
        collect_stop_signals("asking the runs to save and stop") as stop,
        _Bars(cells, console) as bars,
    ):
        try:
            while True:
                while waiting and len(running) < jobs and not stop and time.monotonic() < deadline:
                    running.append(_Process(waiting.pop(0), jobs))
                if not running:
                    break
                time.sleep(_POLL_SECONDS)
                if stop:
                    for process in running:
                        process.stop()
                bars.update([process.cell for process in running])
                for process in [p for p in running if p.has_ended]:
                    running.remove(process)
                    if process.cell.is_finished:
                        bars.finish(process.cell, process.seconds)
                    elif not stop:
                        failed.append(process)
        finally:
            for process in running:  # of a grid that is interrupted: they save and end
                process.stop()
    if stop:
        raise GridError("stopped; the same command goes on from here")
    if failed:
        raise GridError("\n".join(process.describe_failure() for process in failed))


def make_output(folder: Path) -> None:
    """Makes the folder of an experiment, if it is missing.

    Raises:
        GridError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GridError(f"--output: {folder} cannot be made a folder: {error.strerror}") from None


def check_folders(cells: Sequence[Cell]) -> None:
    """Refuses the folder of another grid.

    Raises:
        GridError: a cell's folder holds a run with other settings.
    """
    for cell in cells:
        path = cell.folder / "config.yaml"
        if path.exists() and not _holds(path, cell.config):
            raise GridError(
                f"{cell.folder} holds a run with other settings than this grid's: remove it, or "
                f"choose another folder with --output"
            )


def _holds(path: Path, config: TrainConfig) -> bool:
    try:
        return load_config(path) == config
    except ConfigError:  # of another version
        return False


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "recap_fast.cli", "train", *arguments]


class _Process:
    """One run in a process of its own."""

    def __init__(self, cell: Cell, jobs: int) -> None:
        self.cell = cell
        self._began = time.monotonic()
        folder = cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        flags = []
        if list_checkpoints(folder / "checkpoints"):
            flags = ["--resume"]
        elif (folder / "config.yaml").exists():
            flags = ["--overwrite"]
        config = folder.with_suffix(".yaml")
        save_config(cell.config, config)
        self._log: IO[bytes] = (folder / LOG_FILE).open("ab")
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        # A session of its own: Ctrl-C reaches the grid alone, which asks the runs to save and stop.
        self._process = subprocess.Popen(
            _command(str(config), *flags),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            start_new_session=True,
        )
        self._asked_to_stop = False

    @property
    def has_ended(self) -> bool:
        ended = self._process.poll() is not None
        if ended:
            self._log.close()
        return ended

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def stop(self) -> None:
        if not self._asked_to_stop:
            self._process.send_signal(signal.SIGTERM)
            self._asked_to_stop = True

    def describe_failure(self) -> str:
        log = self.cell.folder / LOG_FILE
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        end = "\n".join(f"    {line}" for line in lines[-8:])
        return f"{self.cell.name} failed with status {self._process.returncode} ({log}):\n{end}"


class _Bars:
    """Progress of the whole grid and of the runs that are under way."""

    def __init__(self, cells: Sequence[Cell], console: Console) -> None:
        self._steps = {cell.folder: cell.step for cell in cells}
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            # Runs take turns at sampling, training and evaluating: the speed is that of minutes.
            speed_estimate_period=600,
        )
        total = sum(cell.config.training.steps for cell in cells)
        self._all = self._progress.add_task(
            "all runs", total=total, completed=sum(self._steps.values())
        )
        self._tasks: dict[Path, TaskID] = {}

    def __enter__(self) -> _Bars:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def update(self, running: Sequence[Cell]) -> None:
        for cell in running:
            self._steps[cell.folder] = cell.step
            if cell.folder not in self._tasks:
                self._tasks[cell.folder] = self._progress.add_task(
                    cell.name, total=cell.config.training.steps
                )
            self._progress.update(self._tasks[cell.folder], completed=self._steps[cell.folder])
        self._progress.update(self._all, completed=sum(self._steps.values()))
        for folder in set(self._tasks) - {cell.folder for cell in running}:
            self._progress.remove_task(self._tasks.pop(folder))

    def finish(self, cell: Cell, seconds: float) -> None:
        self._steps[cell.folder] = cell.config.training.steps
        self._console.print(f"finished {cell.name} in {seconds:.0f} s", highlight=False)
