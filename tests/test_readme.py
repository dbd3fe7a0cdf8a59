"""What README and examples promise is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recap_fast import cli
from recap_fast.config import TrainConfig, load_config
from recap_fast.report.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [body for name, body in fences if name == language]


def make_plan(*arguments: str) -> list[str]:
    """What make would run, also when this test is itself run by make."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-n", "train", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.splitlines()


def test_python_example_runs():
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_commands_exist_with_their_options(monkeypatch):
    """Each recap-fast line of README parses: command, arguments and options are real."""
    from typer.main import get_command

    lines = [
        line.split("#")[0].strip()
        for block in blocks("")
        for line in block.splitlines()
        if line.startswith(".venv/bin/recap-fast")
    ]
    assert len(lines) >= 5
    group = get_command(cli.app)
    for line in lines:
        name, *arguments = shlex.split(line)[1:]
        command = group.commands[name]
        if hasattr(command, "commands"):
            name, *arguments = arguments
            command = command.commands[name]
        command.make_context(name, arguments)


def test_make_targets_exist():
    targets = set(re.findall(r"^make (\w+)", README, re.M))
    assert {"train", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_yaml_example_is_valid(tmp_path):
    (text,) = blocks("yaml")
    settings = {"run": "runs/x", "model": {"path": "some/model"}} | yaml.safe_load(text)
    file = tmp_path / "readme.yaml"
    file.write_text(yaml.safe_dump(settings))
    names = [objective.name for objective in load_config(file).objectives]
    assert names == ["accuracy", "answer_format", "mine", "ntp"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load(path):
    assert isinstance(load_config(path), TrainConfig)


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 4
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("given", ["CONFIG=my.yaml", "ARGS=--resume", "ARGS=--set run=runs/mine"])
def test_make_train_overwrites_nothing_but_its_own_example(given):
    planned = "\n".join(make_plan(given))
    assert "recap-fast train" in planned
    assert "--overwrite" not in planned


@pytest.mark.timeout(600)
def test_what_make_train_runs(tmp_path):
    """The example itself, real model and real vLLM, cut down to two steps."""
    planned = make_plan()[-1]
    assert planned == ".venv/bin/recap-fast train examples/smollm2-cpu.yaml --overwrite "
    overrides = [
        f"run={tmp_path / 'run'}", "training.steps=2", "evaluation.every=0", "data.batch_size=3",
        "rollout.group_size=4", *(f"data.sources.{i}.held_out=4" for i in range(3)),
    ]  # fmt: skip
    command = [sys.executable, "-m", "recap_fast.cli", *shlex.split(planned)[1:]]
    for override in overrides:
        command += ["--set", override]
    inherited = ("LD_PRELOAD", "TRITON_INTERPRET")  # a user has neither
    environment = {k: v for k, v in os.environ.items() if k not in inherited}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"eval/sums/accuracy", "eval/worked_sums/loss"} <= rows[0].keys()
    assert sum(key.startswith("weight/") for key in rows[1]) >= 3
    # bfloat16 on either side: rounding only.
    assert 0 <= rows[1]["rollout/logprob_diff_mean"] < 0.2
    report = (tmp_path / "run" / "report.html").read_text()
    assert "data:image/png;base64," in report
    pytest.importorskip("vllm")
    assert "transformers, because vLLM cannot run" not in done.stderr
