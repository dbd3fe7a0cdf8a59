"""Runs that sample from a real vLLM server: taking turns, one step off, killed and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from transformers.utils import is_torchvision_available

from recap_fast.config import save_config
from recap_fast.report.metrics import read_metrics
from recap_fast.rollout.server_command import KEY_VARIABLE
from recap_fast.rollout.server_process import free_port
from recap_fast.training.checkpoint import list_checkpoints
from tests.rollout.conftest import random_llama
from tests.rollout.test_vllm_vision import TEXT
from tests.tiny import save_tiny_vision_model, tiny_settings
from tests.tiny_tokenizer import tiny_tokenizer
from tests.training.test_vision_training import vision_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("model")
    random_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_config(
    folder: Path, model: Path, *, engine: str = "vllm_server", **asynchronous: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = tiny_settings(folder, model)
    settings["data"]["max_prompt_tokens"] = 160
    settings["data"]["max_supervised_tokens"] = 200
    settings["rollout"] |= {
        "engine": engine, "dtype": "float32", "cpu_kv_cache_gib": 0.05, "max_new_tokens": 16,
    }  # fmt: skip
    if engine == "vllm_server":
        settings["rollout"] |= {"async": asynchronous, "server": {"timeout": 60.0}}
    settings["loss"] = {"rollout_is_cap": 2.0}
    settings["training"]["steps"] = STEPS
    settings["logging"]["rollouts_per_step"] = 1000
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def start(file: Path, *arguments: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = [
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
    ]  # fmt: skip
    return subprocess.Popen(
        [
            sys.executable, *(launcher if processes > 1 else []),
            "-m", "recap_fast", "train", str(file), *arguments,
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def train(file: Path, *arguments: str, processes: int = 1) -> str:
    process = start(file, *arguments, processes=processes)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    return said


def prompts(run: Path) -> dict[int, list[str]]:
    """Of each step, those that were trained on."""
    found: dict[int, list[str]] = {}
    for line in (run / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        found.setdefault(sample["step"], []).append(sample["prompt"])
    return found


def _wait_for_port(port: int, serving: subprocess.Popen[Any]) -> None:
    """Runs give up after half a minute in which nobody listens, and importing vLLM may take that
    long on a busy machine."""
    for _ in range(300):
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert serving.poll() is None, "it has ended before it served"
        time.sleep(1)
    pytest.fail("the server does not listen after five minutes")


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[list[str]]:
    """What attaches a run to a server that outlives it, and has made its key itself."""
    port = free_port()
    file = write_config(tmp_path_factory.mktemp("served"), model)
    log = file.with_name("serve.log")
    with pytest.MonkeyPatch.context() as patch, log.open("w") as output:
        patch.delenv(KEY_VARIABLE, raising=False)
        serving = subprocess.Popen(
            [sys.executable, "-m", "recap_fast", "serve", str(file), "--port", str(port)],
            cwd=ROOT, stdout=output, stderr=output,
        )  # fmt: skip
        try:
            _wait_for_port(port, serving)
            printed = re.findall(rf"^export {KEY_VARIABLE}=(\S+)$", log.read_text(), re.M)
            patch.setenv(KEY_VARIABLE, *printed)  # as a user does with that line
            yield ["--set", f"rollout.server.urls=[http://127.0.0.1:{port}]"]
            assert serving.poll() is None, "it is there for the next run"
            started = descendants(serving)
        finally:
            serving.send_signal(signal.SIGINT)
            serving.wait(timeout=60)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


@pytest.fixture(scope="module")
def in_turns(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("in-turns")
    train(write_config(folder, model))
    return folder / "run"


def test_a_run_in_turns_trains_on_what_its_weights_have_sampled(in_turns: Path) -> None:
    rows = read_metrics(in_turns)[1:]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows[1:]:  # before the first the servers evaluate
        assert row["staleness/max"] == 0
        assert row["rollout/logprob_diff_mean"] < 1e-4
        assert row["rollout/reissued_requests"] == 0
        assert 0 < row["time/engine_busy"] <= row["time/total"] + 1
        assert row["time/engine_idle"] > 0  # while the trainer trains


@pytest.mark.timeout(1200)
@pytest.mark.variant
def test_two_processes_train_adapters_that_their_server_loads_by_name(
    tmp_path: Path, model: Path
) -> None:
    """Stopped in the middle: the server that a resumed run starts loads what it has learnt."""
    pytest.importorskip("peft")
    file = write_config(tmp_path, model)
    settings = yaml.safe_load(file.read_text())
    settings["model"]["lora"] = {"rank": 4, "alpha": 6}
    settings["optimizer"]["learning_rate"] = 1e-2
    settings["rollout"]["server"]["adapters"] = "named"
    file.write_text(yaml.safe_dump(settings))
    train(file, "--set", "training.steps=3", processes=2)
    said = train(file, "--resume", processes=2)
    assert "log-probs agree, but" not in said
    rows = read_metrics(tmp_path / "run")[1:]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows[1:]:
        assert row["staleness/max"] == 0
        assert row["rollout/logprob_diff_mean"] < 1e-4
        assert row["rollout/reissued_requests"] == 0
    left = [line for line in map(_line, psutil.process_iter()) if str(tmp_path) in line]
    assert not left, "no server and no worker outlives the run"


def test_a_run_in_turns_is_that_of_an_engine_in_process(
    tmp_path: Path, model: Path, in_turns: Path
) -> None:
    """The same tokens in every step, though another process samples them, and so the same losses:
    each step's tokens follow from all steps before."""
    train(write_config(tmp_path, model, engine="vllm"))
    here, served = tmp_path / "run", in_turns
    assert (here / "samples.jsonl").read_text() == (served / "samples.jsonl").read_text()
    ours, theirs = read_metrics(here), read_metrics(served)
    assert len(ours) == len(theirs) == STEPS + 1
    compared = 0
    for row, other in zip(ours, theirs, strict=True):
        apart = row.keys() ^ other.keys()
        servers = ("staleness/", "time/", "rollout/reissued", "rollout/sync_bytes")
        assert all(key.startswith(servers) for key in apart)
        for key in row.keys() & other.keys():
            if not key.startswith(("time/", "memory/")) and key != "tokens_per_second":
                wanted = other[key]
                if wanted is not None:
                    wanted = pytest.approx(wanted, rel=1e-5, abs=1e-5)
                assert row[key] == wanted, (row["step"], key)
                compared += 1
    assert compared > 20 * STEPS


@pytest.mark.parametrize(
    "asynchronous",
    [
        {"depth": 1},
        pytest.param(
            {"depth": 1, "on_update": "recompute", "max_staleness": 3}, marks=pytest.mark.variant
        ),
    ],
)
def test_a_run_ahead_trains_on_the_same_prompts(
    asynchronous: dict[str, Any],
    tmp_path: Path,
    model: Path,
    in_turns: Path,
    attached: list[str],
) -> None:
    train(write_config(tmp_path, model, **asynchronous), *attached)
    ahead, plain = prompts(tmp_path / "run"), prompts(in_turns)
    if "max_staleness" in asynchronous:
        assert sorted(sum(ahead.values(), [])) == sorted(sum(plain.values(), []))
    else:
        assert ahead == plain
    rows = read_metrics(tmp_path / "run")[1:]
    assert rows[0]["staleness/max"] == 0
    assert max(row["staleness/max"] for row in rows) >= 1
    assert max(row["staleness/max"] for row in rows) <= asynchronous.get("max_staleness", 1)


def train_in_two(file: Path, bound: int, *arguments: str) -> list[dict[str, Any]]:
    """What two processes that share a server report of each step. One of them leads: it gives the
    server the weights of both."""
    train(file, *arguments, processes=2)
    rows = read_metrics(file.parent / "run")[1:]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["grad_norm"] > 0 for row in rows if row["train/policy_tokens"])
    assert rows[0]["rollout/logprob_diff_mean"] < 1e-4, "the weights of both shards arrived"
    assert 1 <= max(row["staleness/max"] for row in rows) <= bound
    assert sum(row["rollout/reissued_requests"] for row in rows) == 0
    return rows


def test_two_processes_train_on_the_prompts_of_one(
    tmp_path: Path, model: Path, in_turns: Path, attached: list[str]
) -> None:
    train_in_two(write_config(tmp_path, model, depth=1), 1, *attached)
    assert prompts(tmp_path / "run") == prompts(in_turns)


@pytest.mark.variant
def test_two_processes_replace_groups_ahead(
    tmp_path: Path, model: Path, attached: list[str]
) -> None:
    """Rollouts of an odd sum are all rewarded alike, and such groups are replaced."""
    rows = train_in_two(
        write_config(tmp_path, model, depth=1, max_staleness=2), 2, *attached,
        "--set", "rollout.dynamic_sampling={max_refills: 2}",
        "--set", "data.sources.0.rewards={even: 'tests.tiny_rewards:even_only'}",
    )  # fmt: skip
    assert sum(row["groups/dropped"] for row in rows) > 0
    for row in rows:
        assert row["groups/sampled"] == row["rollout/completions"] / 4
        assert row["groups/sampled"] == 2 + row["groups/dropped"]
    found = prompts(tmp_path / "run")
    assert len(sum(found.values(), [])) == sum(row["rollout/completions"] for row in rows)


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone meanwhile
        return ""


def descendants(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.variant)]
)
def test_a_run_that_is_ended_resumes_and_leaves_nothing_behind(
    number: signal.Signals, tmp_path: Path, model: Path, in_turns: Path, attached: list[str]
) -> None:
    """It resumes at a server that has the weights of another run."""
    file = write_config(tmp_path, model, depth=1)
    run = tmp_path / "run"
    process = start(file)
    until = time.monotonic() + 400
    while not list_checkpoints(run / "checkpoints"):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    started = descendants(process)
    assert len(started) >= 3
    os.kill(process.pid, number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == (-number if number == signal.SIGKILL else 0), said
    gone, alive = psutil.wait_procs(started, timeout=60)
    assert not alive, [p.cmdline() for p in alive]
    train(file, "--resume", *attached)
    assert prompts(run) == prompts(in_turns)
    assert [row["step"] for row in read_metrics(run)][-STEPS:] == list(range(1, STEPS + 1))


def test_a_run_attaches_to_a_server(
    tmp_path: Path, model: Path, in_turns: Path, attached: list[str]
) -> None:
    file = write_config(tmp_path, model)
    train(file, *attached)
    assert prompts(tmp_path / "run") == prompts(in_turns)
    without = subprocess.run(
        [sys.executable, "-m", "recap_fast", "train", str(file), "--overwrite", *attached],
        cwd=ROOT, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != KEY_VARIABLE},
    )  # fmt: skip
    assert without.returncode == 2
    assert KEY_VARIABLE in without.stderr + without.stdout


def test_a_run_with_images_trains_its_tower_through_a_server(tmp_path: Path) -> None:
    """Were the tower not synced log-probs would differ. Images that were seen before an update:
    tests/rollout/test_server_vision.py."""
    if not is_torchvision_available():
        pytest.skip("vllm takes images with torchvision alone")
    folder = save_tiny_vision_model(tmp_path / "model", **TEXT)
    config = vision_config(
        tmp_path, folder, "rollout.engine=vllm_server", "rollout.dtype=float32",
        "rollout.cpu_kv_cache_gib=0.05", "data.max_prompt_tokens=120", "checkpoint.every=0",
        "training.steps=3", "optimizer.learning_rate=0.01", "optimizer.warmup_fraction=0",
        "evaluation.before=false", "evaluation.after=false",
    )  # fmt: skip
    save_config(config, tmp_path / "config.yaml")
    train(tmp_path / "config.yaml")
    steps = [row for row in read_metrics(tmp_path / "run") if "grad_norm" in row]
    assert len(steps) == 3
    assert all(row["rollout/logprob_diff_max"] < 1e-4 for row in steps)
