"""The soak, short: the same checks, and that they can fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from recap_fast.config import load_config
from recap_fast.report.metrics import read_metrics
from recap_fast.trainer import Trainer
from tests.tiny import save_tiny_model
from tools import soak

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "tools.soak", "--steps", "10", "--each", "1", "--seed", "2",
            "--out", str(out),
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(out.read_text())
    assert summary["kills"] == dict.fromkeys(sorted(soak.VICTIMS), 1)
    assert summary["starts of the trainer"] == 2
    assert summary["prompts trained on once"] > 10


def test_steps_that_went_another_way_are_told_apart(tmp_path: Path) -> None:
    rows: list[dict[str, float | None]] = [
        {"step": 1, "reward/a": 0.25, "loss/b": 1.5, "time/total": 3.0},
        {"step": 2, "reward/a": 0.5, "loss/b": 1.25},
        {"step": 3, "reward/a": None, "loss/b": 1.0},
        {"step": 4, "reward/a": 0.5},
        {"step": 5, "reward/a": 0.5, "loss/b": 1.0},
    ]
    others = [dict(row) for row in rows]
    others[0] |= {"loss/b": 1.500001, "time/total": 9.0}
    others[1]["reward/a"] = 0.5625
    others[3]["reward/a"] = None
    del others[4]["loss/b"]
    for name, found in (("one", rows), ("other", others)):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    assert soak.agreeing(tmp_path / "one", tmp_path / "other") == [1, 3]
    assert soak.compare(tmp_path / "one", tmp_path / "one", 5) == 5
    with pytest.raises(soak.Problem, match=r"unbroken run in the steps \[2, 4, 5\]"):
        soak.compare(tmp_path / "one", tmp_path / "other", 5)


def test_the_command_fails_where_anything_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "soak.json"
    monkeypatch.setattr(sys, "argv", ["soak", "--out", str(out)])

    def differing(*_: Any) -> dict[str, Any]:
        raise soak.Problem("losses are others")

    monkeypatch.setattr(soak, "soak", lambda *_: {"steps": 3})
    assert soak.main() == 0
    assert json.loads(out.read_text()) == {"steps": 3}
    out.unlink()
    monkeypatch.setattr(soak, "soak", differing)
    assert soak.main() == 1
    assert not out.exists()


def test_runs_agree_by_their_seed(tmp_path: Path) -> None:
    """In turns, with an engine in process in the place of the server."""
    model = save_tiny_model(tmp_path / "model")
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        folder = tmp_path / name
        folder.mkdir()
        config = load_config(
            soak.write_config(folder, model, steps=2, depth=0),
            [
                f"seed={seed}", "rollout.engine=transformers", "checkpoint.every=0",
                "rollout.server={timeout: 600.0, start_timeout: 900.0}",
            ],
        )  # fmt: skip
        trainer = Trainer(config)
        try:
            trainer.train()
        finally:
            trainer.close()
    one, same, other = (tmp_path / name / "run" for name in ("one", "same", "other"))
    assert soak.agreeing(one, same) == [1, 2]
    assert soak.agreeing(one, other) == []
    assert all(row["zero_std_fraction/vowels"] < 1 for row in read_metrics(one))


def write_run(folder: Path, model: Path, damage: str) -> None:
    """What a run of three steps leaves behind, with something wrong."""
    config = load_config(soak.write_config(folder, model, steps=3))
    run = Path(config.run)
    run.mkdir()
    lines, metrics = [], []
    for step, prompts in soak.expected(config).items():
        counts = Counter(prompts)
        if damage == "a prompt twice" and step == 2:
            counts[next(iter(counts))] *= 2
        if damage == "a prompt lost" and step == 2:
            counts.pop(next(iter(counts)))
        for (source, row), count in counts.items():
            lines += [json.dumps({"step": step, "source": source, "row": row})] * count
        if not (damage == "a step lost" and step == 3):
            metrics.append(json.dumps({"step": step}))
    (run / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (run / "metrics.jsonl").write_text("\n".join(metrics) + "\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("nothing", None),
        ("a prompt twice", "step 2: wanted"),
        ("a prompt lost", "step 2: wanted"),
        ("a step lost", r"metrics of the steps \[1, 2\]"),
    ],
)
def test_what_is_lost_is_seen(
    damage: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "model")
    monkeypatch.setattr(soak, "in_shared_memory", set)  # other programs use it too
    write_run(tmp_path, model, damage)
    problems = soak.check(load_config(tmp_path / "soak.yaml"), {}, set())
    if said is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert re.search(said, problems[0])


def test_a_keeper_answers_for_servers_that_are_gone(tmp_path: Path) -> None:
    program = tmp_path / soak.KEEPER
    program.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "sys.stdin.readline(); child.kill(); child.wait(); print('gone', flush=True)\n"
        "time.sleep(60)\n"
    )
    keeper = subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    under: dict[int, set[int]] = {}
    try:
        processes = [psutil.Process(keeper.pid), psutil.Process()]
        until = time.monotonic() + 30
        while not under.get(keeper.pid) and time.monotonic() < until:
            soak.note_servers(processes, under)
        (server,) = under[keeper.pid]
        keeper.stdin.write("\n")
        keeper.stdin.flush()
        assert keeper.stdout.readline() == "gone\n"
        soak.note_servers(processes, under)
        assert under == {keeper.pid: {server}}
    finally:
        keeper.kill()
        keeper.wait()


def test_what_is_left_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model")
    write_run(tmp_path, model, "nothing")
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setattr(soak, "PATIENCE", 0.5)
    monkeypatch.setattr(soak, "SHARED", shared)
    (shared / "psm_before").write_text("")
    before = soak.in_shared_memory()
    ended = [subprocess.Popen([sys.executable, "-c", ""]) for _ in range(3)]
    for one in ended:
        one.wait()
    server, trainer, foreign = (one.pid for one in ended)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    openmp = {n: f"__KMP_REGISTERED_LIB_{n}_0" for n in (server, trainer, foreign, process.pid)}
    loky = {n: f"sem.loky-{n}-kbk5h8a7" for n in (server, foreign, process.pid)}
    for name in ["psm_left", "sem.left", *openmp.values(), *loky.values()]:
        (shared / name).write_text("")
    seen = {server: "vllm", trainer: "recap-fast", process.pid: "sleeper"}
    try:
        problems = soak.check(load_config(tmp_path / "soak.yaml"), seen, before, {trainer})
        assert soak.of_nobody(before, {trainer}) == {openmp[trainer]}
    finally:
        process.kill()
        process.wait()
    assert problems == [
        f"process {process.pid} is left: sleeper",
        f"shared memory is left: {openmp[server]} of vllm",
        "shared memory is left: psm_left",
        "shared memory is left: sem.left",
        f"shared memory is left: {loky[server]} of vllm",
    ]
