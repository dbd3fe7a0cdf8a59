"""Follows a run of another process through its files: `recap-fast watch RUN`.

What is read: complete lines of metrics.jsonl, a last one that is torn when the rest is there; the
configuration; and from the kernel's list of locks, whether a process trains in the folder. Nothing
is written, and no lock is taken: that could keep a trainer from starting.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console

from recap_fast.config import TrainConfig, load_config
from recap_fast.paths import shown
from recap_fast.report.metrics import METRICS_FILE, ProgressView
from recap_fast.types import UserError

_POLL = 0.5
"""Seconds between looks."""
_SHOWN_BEFORE = 10
"""Rows found at the start that are printed where there is no terminal."""
_QUIET = 30.0
"""Seconds without a row, or three steps, after which a run is over whose lock was never seen: on
another machine, or where the file system has none."""

Row = dict[str, float | int | None]
State = Literal["absent", "loading", "running", "stopped"]


class Follower:
    """A metrics.jsonl that another process appends to, and may replace.

    It is kept open: so what replaces it cannot have its inode.

    Attributes:
        rows: all that the present file has, complete lines only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._lines = 0
        self.rows: list[Row] = []

    def has_changed(self) -> bool:
        """Whether there is more than was read, or another file."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return False
        return self._is_other(status) or status.st_size > self._offset

    def read(self) -> tuple[list[Row], int | None]:
        """The rows that are new, and the number of earlier ones that still stand if the file was
        replaced since (`--resume` keeps some, `--overwrite` none); else None.

        Raises:
            UserError: a complete line that is no row.
        """
        try:
            status = os.stat(self._path)
            replaced = self._is_other(status)
            if replaced:
                self.close()
                self._file = self._path.open("rb")
        except FileNotFoundError:
            return [], None
        assert self._file is not None
        start = self._file.tell()
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._file.seek(start + len(whole))
        found = [self._row(line) for line in whole.splitlines()]
        if not replaced:
            self.rows += found
            return found, None
        before, self.rows = self.rows, found
        kept = 0
        while kept < min(len(before), len(found)) and before[kept] == found[kept]:
            kept += 1
        if not any(_seconds(row) for row in found[:kept]):
            kept = 0  # the evaluation before training may be the same of two runs
        return found[kept:], kept if before else None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._lines = None, 0

    @property
    def _offset(self) -> int:
        return 0 if self._file is None else self._file.tell()

    def _is_other(self, status: os.stat_result) -> bool:
        if self._file is None:
            return True
        mine = os.fstat(self._file.fileno())
        is_same = (mine.st_dev, mine.st_ino) == (status.st_dev, status.st_ino)
        return not is_same or status.st_size < self._offset

    def _row(self, line: bytes) -> Row:
        self._lines += 1
        try:
            row = json.loads(line)
            if isinstance(row["step"], int):
                return dict(row)
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{self._path}:{self._lines}: not a row of metrics")


def is_training(run: Path) -> bool:
    """Whether a process of this machine holds the lock of a run's folder, as far as the kernel
    says."""
    try:
        inode = str(os.stat(run / ".lock").st_ino)
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return False
    # "1: FLOCK  ADVISORY  WRITE 1234 fe:01:5678 0 EOF"; those who wait have an arrow.
    held = (line.split() for line in locks.splitlines() if "->" not in line)
    return any(fields[5].rpartition(":")[2] == inode for fields in held)


def watch_run(
    run: Path,
    console: Console | None = None,
    *,
    poll: float = _POLL,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Shows a run until it has finished, or Ctrl-C ends the watch; never the run.

    Args:
        run: its folder, which need not exist yet.
        console: where to write; standard output by default.
        poll: seconds between looks.
        sleep: waits that long.

    Raises:
        UserError: `run` is a file, or a file in it is damaged.
    """
    console = console or Console()
    if os.path.exists(run) and not os.path.isdir(run):
        raise UserError(f"{shown(run)}: wanted a run's folder, this is a file")
    watch = _Watch(run, console, lambda: sleep(poll))
    try:
        watch.until_finished()
    except KeyboardInterrupt:
        watch.say("no longer watched; the run itself was left alone")
    finally:
        watch.follower.close()


class _Watch:
    def __init__(self, run: Path, console: Console, wait: Callable[[], None]) -> None:
        self._run, self._console, self._wait = run, console, wait
        self.follower = Follower(run / METRICS_FILE)
        self._has_seen_lock = False
        self._unshown: list[Row] = []
        self._now = time.monotonic()  # as `ProgressView` is told

    def until_finished(self) -> None:
        said: State | None = None
        while True:
            state = self._state()
            if state == "running" or (state == "stopped" and self.follower.has_changed()):
                if self._show_process():
                    return
                said = None
            elif state != said:
                self._tell_state(state)
                said = state
            else:
                self._wait()

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _state(self) -> State:
        training = is_training(self._run)
        self._has_seen_lock |= training
        if not os.path.exists(self._run / "config.yaml"):
            return "loading" if training else "absent"
        return "running" if training or not self._is_quiet() else "stopped"

    def _is_quiet(self) -> bool:
        if self._has_seen_lock:
            return True
        try:
            age = time.time() - os.stat(self._run / METRICS_FILE).st_mtime
        except OSError:
            return True
        last = _seconds(self.follower.rows[-1]) if self.follower.rows else 0.0
        return age > max(_QUIET, 3 * last)

    def _tell_state(self, state: State) -> None:
        if state == "absent":
            self.say(f"{shown(self._run)}: waiting for a run to start there (Ctrl-C: no longer)")
        elif state == "loading":
            self.say(f"{shown(self._run)}: a process is loading what it needs")
        else:
            self.say(
                f"{shown(self._run)}: stopped after step {self._done}; waiting for it to be "
                f"resumed (Ctrl-C: no longer)"
            )

    @property
    def _done(self) -> int:
        rows = self.follower.rows
        return int(rows[-1]["step"] or 0) if rows else 0

    def _show_process(self) -> bool:
        """Shows what one process trains, until it ends or another takes its place. Returns whether
        the run has finished."""
        config = self._load()
        if config is None:
            self._wait()
            return False
        new, kept = self.follower.read()
        self._tell_replaced(kept)
        new = new if kept is not None else self._unshown + new
        self._unshown = []
        if not self._console.is_terminal and len(new) > _SHOWN_BEFORE:
            self.say(f"{len(new) - _SHOWN_BEFORE} earlier rows are not shown")
            new = new[-_SHOWN_BEFORE:]
        if not self.follower.rows and is_training(self._run):
            self.say(f"{shown(self._run)}: running, no step recorded yet")
        before = int(new[0]["step"] or 0) - 1 if new else self._done
        # Rates and the time left are those of the run, not of the reading.
        self._now = time.monotonic() - sum(map(_seconds, new))
        with ProgressView(config, max(before, 0), self._console, lambda: self._now) as view:
            self._update(view, new)
            if any(map(_seconds, new)) and not self._console.is_terminal:
                self.say(view.details())
            return self._follow(view, config)

    def _follow(self, view: ProgressView, config: TrainConfig) -> bool:
        while True:
            state = self._state()  # before the rows, so that those that came last are read
            new, kept = self.follower.read()
            if kept is not None:
                self._tell_replaced(kept)
                self._unshown = new
                return False  # its configuration may be another
            self._update(view, new)
            if not is_training(self._run) and self._done >= config.training.steps:
                self.say(f"{shown(self._run)}: finished: {self._done} steps")
                return True
            if state != "running":
                return False
            self._wait()

    def _tell_replaced(self, kept: int | None) -> None:
        if kept:
            step = self.follower.rows[kept - 1]["step"]
            self.say(f"{shown(self._run)}: resumed after step {step}")
        elif kept is not None:
            self.say(f"{shown(self._run)}: started anew")

    def _load(self) -> TrainConfig | None:
        """None while there is none, or it is being written."""
        try:
            return load_config(self._run / "config.yaml")
        except UserError:
            if is_training(self._run) or not os.path.exists(self._run / "config.yaml"):
                return None
            raise

    def _update(self, view: ProgressView, rows: list[Row]) -> None:
        now, later = time.monotonic(), sum(map(_seconds, rows))
        for row in rows:
            later -= _seconds(row)
            self._now = now - later
            view.update(_numbers(row))


def _seconds(row: Row) -> float:
    return float(row.get("time/total") or 0)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in row.items()}
