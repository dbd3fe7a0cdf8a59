"""The command under torchrun: messages, a stop, a process that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from recap_fast.config import TrainConfig, save_config
from recap_fast.report.metrics import read_metrics
from recap_fast.trainer import Trainer
from recap_fast.training.checkpoint import list_checkpoints
from tests.processes import ROOT
from tests.tiny import save_tiny_model, tiny_config

ENDLESS = ("training.steps=100000", "evaluation.before=false", "checkpoint.every=3")
UNEVALUATED = ("evaluation.before=false", "evaluation.after=false")
BOUND = 150
"""Seconds in which all must have ended; torchrun itself gives them 30 after a signal."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def command(
    config: TrainConfig,
    *options: str,
    program: Sequence[str] = ("-m", "recap_fast"),
    processes: int = 2,
) -> list[str]:
    file = Path(config.run).parent / "launched.yaml"
    save_config(config, file)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [
        sys.executable, *(launcher if processes > 1 else []), *program, "train", str(file),
        *options,
    ]  # fmt: skip


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def finished(
    config: TrainConfig,
    *options: str,
    program: Sequence[str] = ("-m", "recap_fast"),
    processes: int = 2,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, *options, program=program, processes=processes),
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@contextmanager
def started(config: TrainConfig, processes: int = 2) -> Iterator[psutil.Process]:
    """torchrun, or the command itself, in a process group of its own, once a few steps are done; at
    the end nothing of it is left."""
    log = Path(config.run).parent / "output.txt"
    with log.open("w") as output:
        process = psutil.Popen(
            command(config, processes=processes), env=ENVIRONMENT, stdout=output,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        for _ in range(900):
            if len(read_metrics(Path(config.run))) >= 4:
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        else:
            pytest.fail(f"no step in three minutes\n{log.read_text()}")
        everybody = [process, *process.children(recursive=True)]
        yield process
        _, alive = psutil.wait_procs(everybody, BOUND)
        assert not alive, alive
    finally:
        if process.poll() is None:
            for child in process.children(recursive=True):
                child.kill()
            process.kill()


def ranks(process: psutil.Process) -> dict[int, psutil.Process]:
    """The training processes by rank; not those that they have started themselves."""
    return {int(child.environ()["RANK"]): child for child in process.children()}


def output_of(config: TrainConfig) -> str:
    return (Path(config.run).parent / "output.txt").read_text()


@pytest.mark.slow
def test_a_stop_saves_and_resuming_goes_on(tmp_path: Path, model: Path) -> None:
    config = tiny_config(tmp_path, model, *ENDLESS, "checkpoint.every=0")
    with started(config) as process:
        process.send_signal(signal.SIGTERM)
        process.wait(BOUND)
    (saved,) = list_checkpoints(Path(config.run) / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    assert [row["step"] for row in read_metrics(Path(config.run))] == list(range(1, step + 1))
    done = finished(config, "--resume", "--set", f"training.steps={step + 2}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"finished {step + 2} steps" in done.stdout
    again = finished(config, "--resume", "--set", f"training.steps={step + 2}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("this run has finished") == 1


@pytest.mark.slow
@pytest.mark.variant
def test_a_launcher_that_is_killed_leaves_nobody_behind(tmp_path: Path, model: Path) -> None:
    """And its processes save, but for a rare run on a busy machine in which one of them is gone
    before the others have heard of it: seen once, cause unknown."""
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        config = tiny_config(folder, model, *ENDLESS, "checkpoint.every=0")
        with started(config) as process:
            process.kill()
        if saved := list_checkpoints(Path(config.run) / "checkpoints"):
            break
    step = int(saved[0].name.removeprefix("step-"))
    assert [row["step"] for row in read_metrics(Path(config.run))] == list(range(1, step + 1))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.variant), 1])
def test_a_killed_process_ends_all_and_resuming_goes_on(
    tmp_path: Path, model: Path, rank: int
) -> None:
    config = tiny_config(tmp_path, model, *ENDLESS)
    with started(config) as process:
        ranks(process)[rank].kill()
        assert process.wait(BOUND) != 0
    assert f"rank {1 - rank}: lost another process while" in output_of(config)
    last = int(list_checkpoints(Path(config.run) / "checkpoints")[-1].name.removeprefix("step-"))
    done = finished(config, "--resume", "--set", f"training.steps={last + 2}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in read_metrics(Path(config.run))] == list(range(1, last + 3))


@pytest.mark.slow
def test_a_process_that_hangs_ends_all(tmp_path: Path, model: Path) -> None:
    config = tiny_config(tmp_path, model, *ENDLESS, "distributed.timeout=20")
    with started(config) as process:
        ranks(process)[1].suspend()
        assert process.wait(BOUND) != 0
    assert "rank 0: lost another process while" in output_of(config)
    assert "distributed.timeout" in output_of(config)


def faulty(fault: str, rank: int, step: int) -> tuple[str, ...]:
    return str(Path(__file__).with_name("faulty_rank.py")), fault, str(rank), str(step)


def log_of(config: TrainConfig, rank: int) -> str:
    return (Path(config.run) / "logs" / f"rank-{rank}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "expected"),
    [
        ("raise", 1, "rank 1: failed while updating in step 2: KeyError: 'lm_head'"),
        pytest.param(
            "memory",
            0,
            "rank 0: out of memory while updating in step 2: ",
            marks=pytest.mark.variant,
        ),
    ],
)
def test_a_process_that_fails_in_a_step_ends_all(
    tmp_path: Path, model: Path, fault: str, rank: int, expected: str
) -> None:
    config = tiny_config(tmp_path, model, *ENDLESS)
    begun = time.monotonic()
    done = finished(config, "--overwrite", program=faulty(fault, rank, 2))
    assert time.monotonic() - begun < BOUND
    assert done.returncode == 1
    assert expected in log_of(config, rank)
    assert expected in " ".join((done.stdout + done.stderr).split())
    other = f"rank {1 - rank}: lost another process while updating in step 2: "
    assert other in log_of(config, 1 - rank)


@pytest.mark.slow
@pytest.mark.variant
def test_nan_gradients_in_one_process_skip_the_step_in_all(tmp_path: Path, model: Path) -> None:
    config = tiny_config(tmp_path, model, "training.steps=2")
    done = finished(config, program=faulty("nan", 1, 1))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_metrics(Path(config.run))
    assert [row["skipped_updates"] for row in rows if row["step"]] == [1, 0]
    moved = load_file(list_checkpoints(Path(config.run) / "checkpoints")[0] / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in moved.values())


def said_by(done: subprocess.CompletedProcess[str]) -> str:
    """All that processes have printed, without spaces: rich wraps lines, also within words."""
    return "".join((done.stdout + done.stderr).split())


def count(text: str, said: str) -> int:
    return said.count("".join(text.split()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("distributed.replicas=3", "replicas is 3, which does not divide the 2 processes"),
        ("data.max_prompt_tokens=2000", "sequences may have 2008 tokens"),
        pytest.param(
            "rollout.engine=vllm rollout.sleep=true",
            "vllm sleeps on CUDA only",
            marks=pytest.mark.variant,
        ),
    ],
    ids=["processes", "model", "engine"],
)
def test_what_is_wrong_is_said_once(
    tmp_path: Path, model: Path, setting: str, message: str
) -> None:
    done = finished(tiny_config(tmp_path, model, *setting.split()))
    assert done.returncode != 0
    said = said_by(done)
    assert said.count("error:") == 1, done.stderr
    assert count(message, said) == 1, done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
@pytest.mark.variant
def test_a_resume_with_another_optimizer_state_is_refused_once(tmp_path: Path, model: Path) -> None:
    config = tiny_config(tmp_path, model, *UNEVALUATED, "training.steps=1")
    trainer = Trainer(config)
    trainer.train()
    trainer.close()
    other = ("training.steps=2", "optimizer.state=bfloat16")
    done = finished(tiny_config(tmp_path, model, *UNEVALUATED, *other), "--resume")
    assert done.returncode != 0
    said = said_by(done)
    assert count("AdamW moments are not those of optimizer.state = bfloat16", said) == 1
    assert said.count("error:") == 1, done.stderr
    assert said.count("Traceback") == 1, "torchrun's own"
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
@pytest.mark.variant
def test_a_run_that_can_never_save_goes_on_and_says_so_once_a_save(
    tmp_path: Path, model: Path
) -> None:
    """Two processes, of which one cannot write; each failed save is said once, with its rank."""
    config = tiny_config(tmp_path, model, *UNEVALUATED, "training.steps=3", "checkpoint.every=1")
    done = finished(config, program=faulty("full", 1, 1))
    assert done.returncode != 0
    assert "exitcode  : 2" in done.stderr
    assert [row["step"] for row in read_metrics(Path(config.run))] == [1, 2, 3], done.stderr
    assert list((Path(config.run) / "checkpoints").iterdir()) == []
    said = said_by(done)
    why = "cannot be written: rank 1: [Errno 27] File too large; "
    none = "there is no whole checkpoint, so nothing of what was learnt is kept"
    assert count(f"step-000001: {why} it will be tried again", said) == 1
    assert count(f"step-000003: {why} {none}", said) == 1, done.stderr
    assert said.count("error:") == 1
    # In turn, so that no line is left out: what rank 0 has shown is in both logs, once.
    for rank in range(2):
        failed = [line for line in log_of(config, rank).splitlines() if "cannot be written" in line]
        assert len(failed) == count("cannot be written", said) - 1, "the last one ends the run"


@pytest.mark.slow
@pytest.mark.variant
def test_the_newest_checkpoint_is_named_where_the_last_fails(tmp_path: Path, model: Path) -> None:
    config = tiny_config(tmp_path, model, *UNEVALUATED, "training.steps=4", "checkpoint.every=2")
    done = finished(config, program=faulty("full", 0, 3), processes=1)
    assert done.returncode == 2, done.stderr
    said = said_by(done)
    folder = Path(config.run) / "checkpoints"
    why = "cannot be written: [Errno 27] File too large"
    left = f"the newest whole checkpoint is {folder}/step-000002, from which --resume goes on"
    assert count(f"{folder}/step-000004: {why}; {left}", said) == 1, done.stderr
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    again = finished(config, "--resume", processes=1)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in read_metrics(Path(config.run))] == [1, 2, 3, 4]
