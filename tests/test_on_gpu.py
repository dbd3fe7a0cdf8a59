"""The one command for a GPU machine: rehearsed here, with a part that fails on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.on_gpu import checks
from benchmarks.on_gpu.part import Context
from benchmarks.on_gpu.summary import collect, describe
from benchmarks.on_gpu.train_step import datasheet_tflops

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
PARTS = ["machine", "gpu_tests", "checks", "kernels", "train_step", "vision_step", "optimizer",
         "memory", "trl_step", "integrations", "scaling", "rollout", "transfer",
         "digits"]  # fmt: skip


def rehearse(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark measures nothing where tests run in parallel, which this one may.
    shell = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        ["bash", str(SCRIPT), "--rehearse"],
        env=shell | {"OUT": str(out), "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def records(out: Path) -> dict[str, dict]:
    return {record["part"]: record for record in json.loads((out / "summary.json").read_text())}


@pytest.mark.slow
@pytest.mark.variant
@pytest.mark.timeout(920)  # as long as a busy machine takes
def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    done = rehearse(tmp_path, RECAP_FAST_FAIL_PART="checks")
    assert done.returncode == 1, done.stdout + done.stderr
    found = records(tmp_path)
    assert list(found) == PARTS
    assert found["checks"]["status"] == "failed"
    assert "made to fail" in found["checks"]["reason"]
    others = {part: record for part, record in found.items() if part != "checks"}
    for part, record in others.items():
        assert record["status"] in ("ok", "skipped"), (part, record)
        assert record["status"] == "ok" or record["reason"], part
    assert found["kernels"]["results"]["milliseconds"]
    assert found["train_step"]["results"]["completion_tokens_per_second"] > 0
    assert len(found["train_step"]["results"]["kernels"]) == 10
    assert found["vision_step"]["results"]["completion_tokens_per_second"] > 0
    assert found["vision_step"]["results"]["image_tokens"] == 36
    assert found["train_step"]["results"]["without_liger"] is None  # the same on a CPU
    swapped = found["integrations"]["results"]["milliseconds"]
    assert {name.split()[0] for name in swapped} >= {"trl_step", "trl_head", "liger_loss"}
    assert all(len(times) == 2 for times in swapped.values()), "theirs and ours"
    scaling = found["scaling"]["results"]
    assert scaling["measured_seconds"] > 0
    assert scaling["predicted_seconds"]["total"] > 0
    assert scaling["predicted_of_measured"] is None  # the prediction is not of a CPU
    kept = {n: f["state_bytes_a_parameter"] for n, f in found["optimizer"]["results"].items()}
    assert kept == pytest.approx({"float32": 8, "bfloat16": 4, "8bit": 2.03}, rel=0.01)
    lengths = [step["packed_tokens"] for step in found["memory"]["results"]["steps"]]
    assert len(lengths) == 20
    assert len(set(lengths)) > 5
    if found["transfer"]["status"] == "ok":
        assert found["transfer"]["results"]["shared_memory"]["sync_seconds"] > 0
    assert found["digits"]["results"]["finished_runs"] == 1
    assert found["digits"]["results"]["methods"]["recap"]["seeds"] == [0]
    assert "checks | failed" in (tmp_path / "summary.md").read_text()
    assert json.loads((tmp_path / "kernels.json").read_text())["benchmarks"]
    assert json.loads((tmp_path / "integrations.json").read_text())["benchmarks"]
    assert sum(1 for _ in tmp_path.iterdir()) == 5


def test_wheels_that_do_not_install_are_reported(tmp_path):
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    done = rehearse(tmp_path / "out", PARTS="machine", WHEELS=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    found = records(tmp_path / "out")
    assert found["wheels"]["status"] == "failed"
    assert "broken" in found["wheels"]["reason"]
    assert found["machine"]["status"] == "ok"


def test_success_ends_with_status_0(tmp_path):
    done = rehearse(tmp_path, PARTS="machine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert records(tmp_path)["machine"]["results"]["missing"] == []


def test_checks_without_a_gpu_say_what_they_could_not_try(tmp_path):
    assert checks.run(Context(tmp_path, rehearse=True)) == {
        "no host sync in a step, torch": "ok",
        "no host sync in a step, triton": "skipped: needs a CUDA device",
        "CUDA graph equals eager, torch": "skipped: needs a CUDA device",
        "CUDA graph equals eager, triton": "skipped: needs a CUDA device",
    }


def test_a_part_past_its_limit_is_reported(tmp_path):
    done = rehearse(tmp_path, PARTS="machine", LIMIT="0.2")
    assert done.returncode == 1
    assert "time limit" in records(tmp_path)["machine"]["reason"]


def test_unknown_arguments_are_refused():
    done = subprocess.run(["bash", str(SCRIPT), "--fast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--rehearse" in done.stderr


def test_a_summary_without_records(tmp_path):
    (tmp_path / "status.tsv").write_text("checks\t139\nrollout\t77\n")
    (tmp_path / "checks.log").write_text("one\ntwo\nSegmentation fault\n")
    (tmp_path / "rollout.json").write_text(
        json.dumps({"part": "rollout", "status": "skipped", "reason": "no vllm"})
    )
    crashed, skipped = collect(tmp_path)
    assert crashed["status"] == "failed"
    assert "139" in crashed["reason"]
    assert skipped["status"] == "skipped"
    text = describe([crashed, skipped])
    assert "| checks | failed: Segmentation fault |" in text
    assert "| rollout | skipped: no vllm |" in text


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_datasheet_figures(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert datasheet_tflops(torch.device("cuda")) == tflops


@pytest.mark.parametrize("impl", checks.IMPLEMENTATIONS)
def test_the_graph_check_compares_what_repeats_bitwise(impl, monkeypatch):
    """The half of the check that needs no GPU: from the same state, the same bits."""
    monkeypatch.setattr(checks, "TOKENS", 48)  # Triton's interpreter is slow
    monkeypatch.setattr(checks, "VOCAB", 150)
    case = checks._Captured(impl, torch.device("cpu"))
    start = case.reweighter.state_dict()
    first = [x.clone() for x in case.step()]
    assert not torch.equal(case.reweighter.state_dict()["counts"], start["counts"])
    case.reweighter.load_state_dict(start)
    assert all(torch.equal(a, b) for a, b in zip(first, case.step(), strict=True))
    assert len(set(first[0].tolist())) > 1, "weights that are all 1 would show nothing"
