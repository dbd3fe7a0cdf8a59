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


# What README's lines on TRL find in a user's program.
BEFORE_TRL = """
from datasets import Dataset
from trl import GRPOConfig
from tests.tiny import save_tiny_model

model = str(save_tiny_model(folder))
def accuracy(completions, **_): return [float("7" in text) for text in completions]
def brevity(completions, **_): return [1 / (1 + len(text)) for text in completions]
dataset = Dataset.from_dict({"prompt": ["3 + 4 = ", "5 + 2 = "]})
args = GRPOConfig(
    str(folder / "run"), max_steps=2, num_generations=4, per_device_train_batch_size=4,
    max_completion_length=8, use_cpu=True, bf16=False, logging_steps=1, report_to="none",
)
"""
AFTER_TRL = """
logged = [entry for entry in trainer.state.log_history if "weight/accuracy" in entry]
assert len(logged) == 2
assert "weight/brevity" in logged[0]
"""
# Who imports the class afterwards gets ours, and it runs.
AFTER_LIGER = """
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

loss, _ = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(
    torch.randn(2, 3, 8), torch.randn(17, 8, requires_grad=True),
    torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), torch.randn(2),
)
loss.backward()
assert LigerFusedLinearGRPOLoss is FusedLinearGRPOLoss
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first_import", "before", "after"),
    [
        ("import torch", "", ""),
        ("from recap_fast.integrations.trl ", BEFORE_TRL, AFTER_TRL),
        ("import liger_kernel.chunked_loss ", "", AFTER_LIGER),
    ],
)
def test_python_examples_run(tmp_path, first_import, before, after):
    (code,) = [block for block in blocks("python") if block.startswith(first_import)]
    start = f"import pathlib\nfolder = pathlib.Path({str(tmp_path)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", start + before + code + after],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_python_example_is_run():
    assert len(blocks("python")) == 3


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
