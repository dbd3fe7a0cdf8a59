"""The forgetting experiment: its configurations, its grid of processes, its table and figures."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from recap_fast.config import save_config
from recap_fast.metrics import describe_machine
from recap_fast.reproduce import experiment
from recap_fast.reproduce.experiment import (
    METHODS,
    ExperimentError,
    ExperimentSettings,
    grid,
    run_config,
    run_grid,
)
from recap_fast.reproduce.figures import draw_figures
from recap_fast.reproduce.results import collect, render_table, write_results

SETTINGS = ExperimentSettings(seeds=(0, 1), steps=8, evaluate_every=4)
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
    (folder / "checkpoints" / "step-000004").mkdir(parents=True)
    (folder / "checkpoints" / "step-000004" / "trainer_state.json").write_text("{}")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
with (folder / "metrics.jsonl").open("a") as file:
    print(json.dumps({"step": 4}), file=file, flush=True)
    time.sleep(60 if "SLOW" in os.environ else 0)
    print(json.dumps({"step": 8, "eval/sum/accuracy": 1.0}), file=file)
"""


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(
        experiment, "_command", lambda *arguments: [sys.executable, "-c", FAKE_RUN, *arguments]
    )
    return grid(replace(SETTINGS, methods=("uniform", "recap")), tmp_path / "base", tmp_path)


def _starts(cell) -> list[str]:
    return (cell.folder / "started").read_text().splitlines()


def test_methods_differ_in_what_the_paper_says_and_in_nothing_else(tmp_path):
    configs = {name: run_config(SETTINGS, tmp_path, tmp_path, name, 1) for name in METHODS}
    assert configs["reasoning-only"].data.mixing == {"sum": 1.0}
    assert configs["propmix"].data.mixing == "proportional"
    assert configs["coreset"].data.mixing == "coreset"
    assert [s.is_replay for s in configs["coreset"].data.sources] == [False, True, True]
    assert (configs["lwf"].loss.kl_coef, configs["lwf"].model.reference) == (0.01, "initial")
    assert configs["recap"].reweighting.parameters == {"window": 10}
    for name, config in configs.items():
        assert config.reweighting.method == METHODS[name].reweighter
        same = config.model_dump(exclude={"run", "reweighting", "loss", "model", "data"})
        assert same == configs["uniform"].model_dump(
            exclude={"run", "reweighting", "loss", "model", "data"}
        )
        assert config.data.sources == configs["uniform"].data.sources
    names = [o.name for o in configs["recap"].objectives]
    assert names == ["accuracy", "thinking_format", "iou", "answer_format", "ntp"]


def test_an_unknown_method_is_named(tmp_path):
    with pytest.raises(ExperimentError, match="no method 'recup'; there are reasoning-only"):
        run_config(SETTINGS, tmp_path, tmp_path, "recup", 0)


def test_the_grid_runs_everything_once(fake_runs):
    run_grid(fake_runs, 2, SILENT)
    assert all(cell.is_finished for cell in fake_runs)
    run_grid(fake_runs, 2, SILENT)
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    assert [_starts(cell) for cell in fake_runs] == [[threads]] * 4


def test_a_stopped_grid_saves_and_goes_on(fake_runs, monkeypatch):
    monkeypatch.setenv("SLOW", "1")
    cells = fake_runs[:2]

    def interrupt():
        while not all(cell.step == 4 for cell in cells):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(ExperimentError, match="the same command goes on"):
        run_grid(cells, 2, SILENT)
    thread.join()
    assert not any(cell.is_finished for cell in cells)
    monkeypatch.delenv("SLOW")
    run_grid(cells, 2, SILENT)
    for cell in cells:
        assert cell.is_finished
        assert [line.split()[1:] for line in _starts(cell)] == [[], ["--resume"]]


def test_a_failed_run_does_not_keep_the_others_from_running_and_starts_anew(fake_runs, monkeypatch):
    monkeypatch.setenv("BROKEN", "recap/seed-0")
    with pytest.raises(ExperimentError, match=r"(?s)recap, seed 0 failed with status 1 .*no luck"):
        run_grid(fake_runs, 1, SILENT)
    assert [cell.is_finished for cell in fake_runs] == [True, False, True, True]
    monkeypatch.delenv("BROKEN")
    run_grid(fake_runs, 1, SILENT)
    assert _starts(fake_runs[1])[1].split()[1:] == ["--overwrite"]


def test_a_folder_with_another_experiment_is_left_alone(fake_runs):
    other = fake_runs[0].config.model_copy(update={"seed": 7})
    fake_runs[0].folder.mkdir(parents=True)
    save_config(other, fake_runs[0].folder / "config.yaml")
    with pytest.raises(ExperimentError, match="other settings than this grid's"):
        run_grid(fake_runs, 1, SILENT)


def _record(cell, gain: float) -> None:
    """A finished run whose scores rise by `gain` from 0.5."""
    cell.folder.mkdir(parents=True)
    (cell.folder / "machine.json").write_text(json.dumps(describe_machine()))
    names = [o.name for o in cell.config.objectives]
    with (cell.folder / "metrics.jsonl").open("w") as file:
        for step in range(SETTINGS.steps + 1):
            row: dict[str, float] = {"step": step}
            if step:
                row |= {f"{kind}/{name}": 1.0 for kind in ("weight", "rate") for name in names}
                row |= {f"instability/{name}": 0.1 for name in names}
                row |= {f"reward/{name}": 0.4 + 0.01 * step for name in names[:4]}
                row["loss/ntp"] = 2.0 - 0.1 * step
            if step % SETTINGS.evaluate_every == 0:
                value = 0.5 + gain * step / SETTINGS.steps
                row |= {
                    "eval/sum/accuracy": value, "eval/sum/thinking_format": value,
                    "eval/locate/iou": value, "eval/locate/answer_format": value,
                    "eval/transcribe/loss": value, "eval/transcribe/token_accuracy": value,
                }  # fmt: skip
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    cells = grid(SETTINGS, folder / "base", folder)
    for number, cell in enumerate(cells):
        _record(cell, gain=0.1 + 0.2 * cell.seed + 0.001 * (number % len(METHODS)))
    return folder, collect(cells)


def test_table_and_json_give_mean_and_spread_over_seeds(finished):
    folder, runs = finished
    table = write_results(runs, SETTINGS, folder)
    assert (folder / "results.md").read_text() == table
    lines = table.splitlines()
    assert len(lines) == 3 + len(METHODS)
    # Gains 0.1 and 0.3: mean 0.2, unbiased deviation 0.2 / sqrt(2).
    assert lines[3].startswith("| Reasoning only | 0.700 ± 0.141 |")
    assert lines[3].endswith("| 2 |")
    content = json.loads((folder / "results.json").read_text())
    assert content["before"]["grounding"] == {"mean": 0.5, "std": 0.0}
    recap = content["methods"]["recap"]
    assert recap["seeds"] == [0, 1]
    assert recap["evaluations"]["ocr"]["steps"] == [0, 4, 8]
    assert np.allclose(recap["evaluations"]["ocr"]["values"][1], [0.5, 0.6525, 0.805])


def test_unfinished_runs_are_left_out(finished):
    folder, runs = finished
    cells = grid(replace(SETTINGS, seeds=(0, 1, 2)), folder / "base", folder)
    assert render_table(collect(cells)) == render_table(runs)


def test_every_figure_is_drawn(finished, tmp_path):
    plots = draw_figures(finished[1], tmp_path / "figures")
    assert [plot.name for plot in plots] == [
        f"figure-{number:02}" for number in (2, 4, 5, 7, 10, 11, 12)
    ]
    assert all(Path(plot.path).stat().st_size > 10_000 for plot in plots)


def test_figures_of_a_grid_without_recap(finished, tmp_path):
    uniform = [method for method in finished[1] if method.name == "uniform"]
    drawn = [plot.name for plot in draw_figures(uniform, tmp_path / "figures")]
    assert drawn == ["figure-02", "figure-07", "figure-10"]
