"""The grid of runs in processes: nothing runs twice, what stopped goes on, failures are told."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
from rich.console import Console

from recap_fast.config import save_config
from recap_fast.reproduce import experiment, grid
from recap_fast.reproduce.grid import GridError, run_grid

SETTINGS = experiment.ExperimentSettings(
    methods=("uniform", "recap"), seeds=(0, 1), steps=8, evaluate_every=4
)
SILENT = Console(quiet=True)

# A run that records its steps without training: what the grid does is all that is tested here.
FAKE_RUN = """
import json, os, pathlib, signal, sys, time
config, *flags = sys.argv[1:]
folder = pathlib.Path(config).with_suffix("")
(folder / "config.yaml").write_text(pathlib.Path(config).read_text())
with (folder / "started").open("a") as file:
    print(os.environ["OMP_NUM_THREADS"], *flags, file=file)
if "BROKEN" in os.environ and os.environ["BROKEN"] in config:
    sys.exit("no luck")
def stop(*_):
    (folder / "checkpoints" / "step-000004" / "trainer").mkdir(parents=True)
    (folder / "checkpoints" / "step-000004" / "trainer" / "state.json").write_text("{}")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
with (folder / "metrics.jsonl").open("a") as file:
    print(json.dumps({"step": 4}), file=file, flush=True)
    time.sleep(60 if "SLOW" in os.environ else 0)
    print(json.dumps({"step": 8, "eval/range/accuracy": 1.0}), file=file)
"""


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # a user's own is kept
    monkeypatch.setattr(grid, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(
        grid, "_command", lambda *arguments: [sys.executable, "-c", FAKE_RUN, *arguments]
    )
    return experiment.grid(SETTINGS, tmp_path / "base", tmp_path)


def _starts(cell) -> list[str]:
    return (cell.folder / "started").read_text().splitlines()


def test_the_grid_runs_everything_once(fake_runs):
    run_grid(fake_runs, 2, SILENT)
    assert all(cell.is_finished for cell in fake_runs)
    run_grid(fake_runs, 2, SILENT)
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [_starts(cell) for cell in fake_runs] == [[threads]] * 4


def test_after_its_budget_a_grid_starts_nothing_and_finishes_what_it_has(fake_runs, monkeypatch):
    run_grid(fake_runs, 1, SILENT, budget=0)
    assert not any(cell.is_finished for cell in fake_runs)
    # The grid's start, its first run's, and long after; of the grid alone, not of other threads.
    readings = chain([0.0, 0.0], repeat(9.0))
    clock = SimpleNamespace(monotonic=lambda: next(readings), sleep=time.sleep)
    monkeypatch.setattr(grid, "time", clock)
    run_grid(fake_runs, 1, SILENT, budget=5)
    assert [cell.is_finished for cell in fake_runs] == [True, False, False, False]


@pytest.mark.slow
def test_a_stopped_grid_saves_and_goes_on(fake_runs, monkeypatch):
    monkeypatch.setenv("SLOW", "1")
    cells = fake_runs[:2]

    def interrupt():
        while not all(cell.step == 4 for cell in cells):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(GridError, match="the same command goes on"):
        run_grid(cells, 2, SILENT)
    thread.join()
    assert not any(cell.is_finished for cell in cells)
    monkeypatch.delenv("SLOW")
    run_grid(cells, 2, SILENT)
    for cell in cells:
        assert cell.is_finished
        assert [line.split()[1:] for line in _starts(cell)] == [[], ["--resume"]]


def test_an_interrupted_grid_leaves_no_run_behind(fake_runs, monkeypatch):
    monkeypatch.setenv("SLOW", "1")
    monkeypatch.setattr(grid, "_POLL_SECONDS", 30)  # it has no time to ask the run to stop
    cell = fake_runs[0]

    def interrupt_twice():
        while cell.step != 4:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_twice)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_grid([cell], 1, SILENT)
    thread.join()
    checkpoint = cell.folder / "checkpoints" / "step-000004" / "trainer" / "state.json"
    deadline = time.monotonic() + 30
    while not checkpoint.exists():
        assert time.monotonic() < deadline, "the run was not asked to save and stop"
        time.sleep(0.02)


def test_a_failed_run_does_not_keep_the_others_from_running_and_starts_anew(fake_runs, monkeypatch):
    monkeypatch.setenv("BROKEN", "recap/seed-0")
    with pytest.raises(GridError, match=r"(?s)recap, seed 0 failed with status 1 .*no luck"):
        run_grid(fake_runs, 1, SILENT)
    assert [cell.is_finished for cell in fake_runs] == [True, False, True, True]
    monkeypatch.delenv("BROKEN")
    run_grid(fake_runs, 1, SILENT)
    assert _starts(fake_runs[1])[1].split()[1:] == ["--overwrite"]


def test_a_folder_with_another_experiment_is_left_alone(fake_runs):
    other = fake_runs[0].config.model_copy(update={"seed": 7})
    fake_runs[0].folder.mkdir(parents=True)
    save_config(other, fake_runs[0].folder / "config.yaml")
    with pytest.raises(GridError, match="other settings than this grid's"):
        run_grid(fake_runs, 1, SILENT)
    # As another version wrote it.
    (fake_runs[0].folder / "config.yaml").write_text("run: x\nunknown: 1\n")
    with pytest.raises(GridError, match="other settings than this grid's"):
        run_grid(fake_runs, 1, SILENT)
