from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from recap_fast.config import ConfigError
from recap_fast.report.metrics import (
    MetricsWriter,
    ProgressView,
    _append,
    read_metrics,
    read_samples,
)
from recap_fast.types import RewardTable, UserError
from tests.synthetic_run import make_config, make_rollouts, make_run


def write_steps(run: Path, first: int, last: int, start_step: int) -> None:
    writer = MetricsWriter(run, make_config(run, 10), start_step)
    for step in range(first, last + 1):
        writer.write({"step": step, "grad_norm": step / 2})
        writer.write_rollouts(step, *make_rollouts(step))
    writer.close()


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, make_config(tmp_path, 3))
    writer.write({"step": 1, "lr": 1e-5, "failed/accuracy/timeout": 2, "reward/x": np.float32(0.5)})
    assert read_metrics(tmp_path) == [  # at once: a crash loses no row
        {"step": 1, "lr": 1e-5, "failed/accuracy/timeout": 2, "reward/x": 0.5}
    ]
    writer.close()


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, make_config(tmp_path, 3))
    writer.write({"step": 1, "a": math.nan, "b": math.inf, "c": np.float32(-np.inf)})
    writer.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": None}


def test_a_row_without_a_step_is_refused(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, make_config(tmp_path, 3))
    with pytest.raises(ValueError, match="needs the key 'step'"):
        writer.write({"lr": 1.0})
    writer.close()


def test_resuming_drops_later_rows(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 5, start_step=0)
    write_steps(tmp_path, 4, 6, start_step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]
    steps = [sample["step"] for sample in read_samples(tmp_path)]
    assert steps == sorted(steps)
    assert steps.count(4) == 4


def test_starting_anew_drops_every_row(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 2, start_step=0)
    write_steps(tmp_path, 0, 0, start_step=0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]


def test_a_torn_last_line_is_ignored_and_removed_on_resume(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 3, start_step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "grad_n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]
    write_steps(tmp_path, 4, 4, start_step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("line", ["{torn", "[1, 2]", '{"lr": 1}', '{"step": "one"}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_rollouts_are_spread_over_sources_and_groups(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 1, start_step=0)
    samples = read_samples(tmp_path)
    assert [(s["source"], s["group"]) for s in samples] == [
        ("chain_sum", 0),
        ("basic_arithmetic", 2),
        ("chain_sum", 1),
        ("basic_arithmetic", 3),
    ]
    first = samples[0]
    assert first["rewards"] == {"accuracy": 0.0, "format": 1.0}  # ntp is absent
    assert first["answer"] == "1"
    assert first["completion"] == "1 & 0 make <answer>1</answer> (0)"
    assert first["tokens"] == 2


def test_number_of_rollouts_written(tmp_path: Path) -> None:
    for count, written in ((0, 0), (3, 3), (100, 8)):
        run = tmp_path / str(count)
        writer = MetricsWriter(run, make_config(run, 3, rollouts_per_step=count))
        writer.write_rollouts(1, *make_rollouts(1))
        writer.write_rollouts(2, [], RewardTable(np.zeros((0, 3), dtype=np.float32)))
        writer.close()
        assert len(read_samples(run)) == written


def test_tensorboard_holds_the_same_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tmp_path, 3, tensorboard=True)
    writer = MetricsWriter(tmp_path, config)
    for step in (1, 2, 3):
        writer.write({"step": step, "reward/accuracy": step / 8, "bad": math.nan})
    writer.close()
    resumed = MetricsWriter(tmp_path, config, start_step=2)
    resumed.write({"step": 3, "reward/accuracy": 0.75})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("reward/accuracy")]
    assert points == [(1, 0.125), (2, 0.25), (3, 0.75)]
    assert events.Tags()["scalars"] == ["reward/accuracy"]


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 1, start_step=0)
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_missing_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.wandb is 'p', but wandb is not installed"):
        MetricsWriter(tmp_path, make_config(tmp_path, 3, wandb="p"))


def test_wandb_gets_the_rows_and_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged, started = [], []

    def init(**arguments: object) -> SimpleNamespace:
        started.append(arguments)
        return SimpleNamespace(
            log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = make_config(tmp_path, 3, wandb="project")
    for start in (0, 1):
        writer = MetricsWriter(tmp_path, config, start)
        writer.write({"step": start + 1, "lr": 0.5, "bad": math.nan})
        writer.close()
    assert logged == [(1, {"lr": 0.5}), "end", (2, {"lr": 0.5}), "end"]
    assert started[0]["project"] == "project"
    assert started[0]["id"] == started[1]["id"]


def test_the_machine_is_recorded(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 1, start_step=0)
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["versions"]["torch"].startswith("2.")
    assert machine["cpu_cores"] >= 1
    assert "compute_dtype" not in machine
    MetricsWriter(tmp_path, make_config(tmp_path, 3), compute_dtype="float32").close()
    assert json.loads((tmp_path / "machine.json").read_text())["compute_dtype"] == "float32"


def shown(tmp_path: Path, terminal: bool) -> str:
    run = make_run(tmp_path / "run", done=6, total=6)
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=110, height=40)
    with ProgressView(make_config(run, 6), console=console) as view:
        for row in read_metrics(run):
            view.update({k: math.nan if v is None else v for k, v in row.items()})
    return out.getvalue()


def test_one_line_a_step_without_a_terminal(tmp_path: Path) -> None:
    lines = shown(tmp_path, terminal=False).splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 6
    assert steps[2].startswith("step 3/6  accuracy ")
    assert "(λ 1.00)" in steps[2]
    assert "ntp loss 2." in steps[2]
    assert "tokens/s" in steps[2]
    assert "left" in steps[2]
    assert "left" not in steps[5]
    evaluations = [line for line in lines if line.startswith("evaluation at step ")]
    assert len(evaluations) == 2
    assert "chain_sum/accuracy 0." in evaluations[0]
    assert "\x1b" not in "".join(lines)


def test_live_table_on_a_terminal(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    for word in ("accuracy", "instability", "tokens/s", "6/6", "mismatch", "evaluation", "latest"):
        assert word in text


def test_view_survives_missing_values(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=110)
    with ProgressView(make_config(tmp_path, 2), console=console) as view:
        view.update({"step": 1, "time/total": 1.0, "reward/accuracy": math.nan})
    assert "accuracy – (λ –)" in out.getvalue()


def test_a_full_disk_is_named_with_its_file() -> None:
    class Full(io.StringIO):
        name = "metrics.jsonl"

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: metrics\.jsonl"):
        _append(Full(), ["{}"])
