from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from recap_fast import cli
from recap_fast.config import save_config
from tests.simulate.traces import COSTS, make_config, write_trace


def run(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["recap-fast", "simulate", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    return stopped.value.code or 0, printed.out, printed.err


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save_config(make_config(tmp_path / "mine", rows=32), tmp_path / "mine.yaml")
    write_trace(tmp_path / "trace")
    return "mine.yaml"


def test_table_figure_and_json(config, tmp_path, monkeypatch, capsys):
    status, text, _ = run(monkeypatch, capsys, config, "--trace", "trace")
    assert status == 0
    for word in ("one step off", "in turns", "2 ahead, <= 3", "* recommended",
                 "512 GPUs: ", "a decode step takes 20.00 ms and 1.000 ms"):  # fmt: skip
        assert word in text
    assert Image.open(tmp_path / "runs/simulate/timeline.png").size[0] > 1000
    content = json.loads((tmp_path / "runs/simulate/simulation.json").read_text())
    assert content["costs"]["decode_step"] == pytest.approx(COSTS.decode_step, rel=1e-3)
    assert [choice["gpus"] for choice in content["choices"]] == [8, 8, 8, 64, 64, 64, 512, 512, 512]
    assert content["supported"] is True
    assert sum(choice["recommended"] for choice in content["choices"]) == 3
    for choice in content["choices"]:
        assert choice["step_seconds"] > 0
        assert sum(choice["staleness"].values()) == pytest.approx(1)


def test_the_table_fits_80_columns(config, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    _, text, _ = run(monkeypatch, capsys, config, "--trace", "trace")
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "A step by set-up" in line)
    end = next(i for i, line in enumerate(lines) if line.startswith("split, idle: "))
    assert end - start >= 12
    assert all(len(line) <= 80 for line in lines[start : end + 1])
    assert "\u2026" not in text  # nothing is cut
    assert sum(" * " in line for line in lines[start:end]) == 3


def test_a_trace_that_does_not_fit_recommends_nothing(config, tmp_path, monkeypatch, capsys):
    write_trace(tmp_path / "noisy", noise=0.8)
    status, text, _ = run(monkeypatch, capsys, config, "--trace", "noisy")
    assert status == 0
    assert "nothing is recommended: the trace does not support it." in text
    assert "* recommended" not in text
    assert "times as fast as in turns" not in text
    content = json.loads((tmp_path / "runs/simulate/simulation.json").read_text())
    assert content["supported"] is False
    assert not any(choice["recommended"] for choice in content["choices"])


def test_the_same_command_writes_the_same_file(config, tmp_path, monkeypatch, capsys):
    written = []
    for folder in ("a", "b"):
        run(monkeypatch, capsys, config, "--trace", "trace", "--gpus", 8, "--output", folder)
        written.append((tmp_path / folder / "simulation.json").read_text())
    assert written[0] == written[1]


def test_a_split_is_kept_and_keys_are_replaced(config, tmp_path, monkeypatch, capsys):
    words = (config, "--trace", "trace", "--split", "6:2", "--set", "data.batch_size=64")
    status, _, _ = run(monkeypatch, capsys, *words)
    assert status == 0
    choices = json.loads((tmp_path / "runs/simulate/simulation.json").read_text())["choices"]
    assert [(c["trainer_gpus"], c["engine_gpus"]) for c in choices] == [(8, 8), (6, 2), (6, 2)]


def test_a_check_decides_the_exit_status(config, tmp_path, monkeypatch, capsys):
    words = (config, "--trace", "trace", "--gpus", 8, "--check")
    same = write_trace(tmp_path / "same", rows=16)
    status, text, _ = run(monkeypatch, capsys, *words, same)
    assert status == 0
    assert "within 10%" in text
    other = write_trace(tmp_path / "other", noise=0.0, costs=COSTS.__class__(0.1, 0.01, 1, 0.01))
    status, text, _ = run(monkeypatch, capsys, *words, other)
    assert status == 1
    assert "not within 10%" in text
    content = json.loads((tmp_path / "runs/simulate/simulation.json").read_text())
    assert content["check"]["passes"] is False
    assert content["check"]["seconds"]["step"]["predicted"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trace", "nowhere"], "nowhere: not a run's folder"),
        (["--trace", "trace", "--gpus", "8", "--split", "1:2"], "makes 3 GPUs, and --gpus says 8"),
        (["--trace", "trace", "--gpus", "1"], "--gpus 1: a trainer"),
        (["--trace", "trace", "--check", "short"], "too few steps to compare with"),
        (["--trace", "short"], "too few steps to replay"),
        (["--trace", "cut", "--set", "rollout.max_new_tokens=900"], "900 is wanted"),
    ],
)
def test_bad_input_is_one_message_and_status_2(
    config, tmp_path, monkeypatch, capsys, words, message
):
    write_trace(tmp_path / "short", steps=4)
    write_trace(tmp_path / "cut", vary=False)
    status, text, error = run(monkeypatch, capsys, config, *words)
    assert status == 2
    assert message in " ".join(error.split())
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert not text
    assert not (tmp_path / "runs").exists()


def test_it_needs_no_torch(config):
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from recap_fast.cli import main\n"
        f"sys.argv = ['recap-fast', 'simulate', {config!r}, '--trace', 'trace', '--gpus', '4']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 GPUs: " in done.stdout
