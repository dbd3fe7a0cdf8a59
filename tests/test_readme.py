"""What README and examples promise; its commands are run in test_documented_commands.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recap_fast.config import TrainConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [body for name, body in fences if name == language]


def make_plan(*arguments: str) -> list[str]:
    """What make would run, also when this test is itself run by make."""
    inherited = ("MAKE", "MFLAGS", "ARGS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(inherited)}
    command = ["make", "--no-print-directory", "-n", "train", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.splitlines()


def test_python_example_runs():
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


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


def test_make_train_starts_its_example_anew():
    planned = make_plan()[-1]
    assert planned == ".venv/bin/recap-fast train examples/smollm2-cpu.yaml --overwrite "
