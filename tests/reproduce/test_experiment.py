"""The forgetting experiment: its configurations, its table and figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recap_fast.report.metrics import describe_machine
from recap_fast.reproduce.experiment import (
    COMPARED,
    METHODS,
    ExperimentError,
    ExperimentSettings,
    grid,
    run_config,
)
from recap_fast.reproduce.figures import draw_figures
from recap_fast.reproduce.results import collect, render_table, write_results

SETTINGS = ExperimentSettings(seeds=(0, 1), steps=8, evaluate_every=4)


def test_methods_differ_in_what_the_paper_says_and_in_nothing_else(tmp_path):
    configs = {name: run_config(SETTINGS, tmp_path, tmp_path, name, 1) for name in METHODS}
    assert configs["reasoning-only"].data.mixing == {"range": 1.0}
    assert configs["propmix"].data.mixing == "proportional"
    assert configs["coreset"].data.mixing == "coreset"
    assert [s.is_replay for s in configs["coreset"].data.sources] == [False, True, True]
    assert (configs["lwf"].loss.kl_coef, configs["lwf"].model.reference) == (0.01, "initial")
    assert configs["recap"].reweighting.parameters == {"window": 10}
    assert configs["uniform-2"].training.steps == 2 * SETTINGS.steps
    assert (configs["lwf-0.1"].loss.kl_coef, len(COMPARED)) == (0.1, 10)
    for name in COMPARED:
        config = configs[name]
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
                    "eval/range/accuracy": value, "eval/range/thinking_format": value,
                    "eval/locate/iou": value, "eval/locate/answer_format": value,
                    "eval/transcribe/loss": value, "eval/transcribe/token_accuracy": value,
                }  # fmt: skip
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    cells = grid(SETTINGS, folder / "base", folder)
    for number, cell in enumerate(cells):
        _record(cell, gain=0.1 + 0.2 * cell.seed + 0.001 * (number % len(COMPARED)))
    return folder, collect(cells)


def test_table_and_json_give_mean_and_spread_over_seeds(finished):
    folder, runs = finished
    table = write_results(runs, SETTINGS, folder)
    assert (folder / "results.md").read_text() == table
    lines = table.splitlines()
    assert len(lines) == 3 + len(COMPARED)
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
