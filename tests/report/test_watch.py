from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from recap_fast.config import save_config
from recap_fast.report.metrics import MetricsWriter
from recap_fast.report.watch import Follower, is_training, watch_run
from recap_fast.training.run_folder import clear_folder, lock_folder
from recap_fast.types import UserError
from tests.synthetic_run import make_config, make_run
from tests.tiny import save_tiny_model, tiny_config

ROOT = Path(__file__).resolve().parent.parent.parent


def row(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "time/total": 2.0, "reward/accuracy": step / 10, **values}


def line(step: int) -> str:
    return json.dumps(row(step)) + "\n"


class TestFollower:
    def test_lines_come_once_each(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        follower = Follower(path)
        assert follower.read() == ([], None)
        path.write_text(line(1) + line(2))
        assert follower.read() == ([row(1), row(2)], None)
        assert follower.read() == ([], None)
        with path.open("a") as file:
            file.write(line(3))
        assert follower.has_changed()
        assert follower.read() == ([row(3)], None)
        assert not follower.has_changed()
        assert [r["step"] for r in follower.rows] == [1, 2, 3]

    def test_a_torn_line_waits_for_its_rest(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(line(1) + line(2)[:9])
        follower = Follower(path)
        assert follower.read() == ([row(1)], None)
        assert follower.read() == ([], None)
        with path.open("a") as file:
            file.write(line(2)[9:])
        assert follower.read() == ([row(2)], None)

    @pytest.mark.parametrize("size", [1, 4])
    def test_what_a_replaced_file_keeps_is_not_new(self, tmp_path, size):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(map(line, (1, 2, 3))))
        follower = Follower(path)
        follower.read()
        # As `--resume` drops what is beyond its checkpoint, and goes on.
        other = path.with_suffix(".tmp")
        other.write_text(
            line(1) + "".join(json.dumps(row(k, x=1)) + "\n" for k in range(2, 2 + size))
        )
        os.replace(other, path)
        new, kept = follower.read()
        assert kept == 1
        assert [r["step"] for r in new] == [*range(2, 2 + size)]
        assert len(follower.rows) == 1 + size

    def test_a_new_file_is_told_from_the_old_though_it_is_as_long(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(line(1))
        follower = Follower(path)
        follower.read()
        path.unlink()  # and its inode may be given to the next at once
        path.write_text(json.dumps(row(1, y=1)) + "\n" + line(2))
        new, kept = follower.read()
        assert kept == 0
        assert len(new) == 2

    def test_the_same_evaluation_before_training_is_no_resumption(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 0, "eval/a": 1}\n' + line(1))
        follower = Follower(path)
        follower.read()
        path.unlink()
        path.write_text('{"step": 0, "eval/a": 1}\n')
        assert follower.read() == ([{"step": 0, "eval/a": 1}], 0)

    def test_a_damaged_line_is_named(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(line(1) + "{no\n")
        with pytest.raises(UserError, match=r"metrics.jsonl:2: not a row of metrics"):
            Follower(path).read()


def test_a_lock_is_seen_and_not_taken(tmp_path):
    assert not is_training(tmp_path)
    lock = lock_folder(tmp_path)
    assert is_training(tmp_path)
    lock.close()
    assert not is_training(tmp_path)
    lock_folder(tmp_path).close()


class Trainer:
    """What a trainer does to its folder, without training."""

    def __init__(self, run: Path, total: int, start: int = 0, overwrite: bool = False) -> None:
        run.mkdir(exist_ok=True, parents=True)
        self._run, self._config = run, make_config(run, total)
        self._start, self._overwrite = start, overwrite
        self._lock = lock_folder(run)

    def begin(self) -> None:
        if self._overwrite:
            clear_folder(self._run)
        save_config(self._config, self._run / "config.yaml")
        self._writer = MetricsWriter(self._run, self._config, self._start)

    def step(self, number: int) -> None:
        self._writer.write(
            row(number, **{"time/rollout": 1.0, "tokens_per_second": 100.0 * number})
        )

    def end(self) -> None:
        self._writer.close()
        self._lock.close()


def watched(run: Path, *actions, terminal: bool = False) -> str:
    """What is printed by a watch during which one action is done at each look; then Ctrl-C."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, height=40)
    left = list(actions)

    def act(_: float) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    watch_run(run, console, sleep=act)
    assert not left, f"the watch ended before {left}"
    return out.getvalue()


def test_a_run_from_before_its_start_to_its_end(tmp_path):
    run = tmp_path / "run"
    actors: list[Trainer] = []
    text = watched(
        run,
        lambda: None,
        lambda: actors.append(Trainer(run, 3)),
        lambda: actors[0].begin(),
        lambda: actors[0].step(1),
        lambda: actors[0].step(2),
        lambda: actors[0].step(3),
        lambda: actors[0].end(),
    )
    lines = text.splitlines()
    assert re.search(r"run: waiting for a run to start there", lines[0])
    assert re.search(r"run: a process is loading what it needs", lines[1])
    assert re.search(r"run: running, no step recorded yet", lines[2])
    assert [re.match(r"step (\d)/3 ", line)[1] for line in lines[3:6]] == ["1", "2", "3"]
    assert "accuracy 0.100" in lines[3]
    assert re.search(r"run: finished: 3 steps", lines[6])
    assert len(lines) == 7


def test_a_finished_run_ends_the_watch_at_once(tmp_path):
    run = make_run(tmp_path / "run", done=6, total=6)
    text = watched(run)
    assert "step 6/6" in text
    assert "mismatch 0.0" in text
    assert text.endswith("run: finished: 6 steps\n")
    assert "no longer watched" not in text


def test_many_earlier_steps_are_not_printed_again(tmp_path):
    text = watched(make_run(tmp_path / "run", done=25, total=25))
    assert "16 earlier rows are not shown" in text  # the evaluation before the first among them
    assert text.count("\nstep ") == 10


def test_a_killed_run_is_called_stopped_and_its_resumption_seen(tmp_path):
    run = tmp_path / "run"
    actors = [Trainer(run, 4)]
    actors[0].begin()
    actors[0].step(1)

    def resume() -> None:
        actors.append(Trainer(run, 4, start=2))
        actors[1].begin()

    text = watched(
        run,
        lambda: actors[0].step(2),
        lambda: actors[0].step(3),
        lambda: actors[0].end(),
        lambda: None,
        lambda: None,
        resume,
        lambda: actors[1].step(3),
        lambda: actors[1].step(4),
        lambda: actors[1].end(),
    )
    assert text.count("stopped after step 3; waiting for it to be resumed") == 1
    assert text.count("resumed after step 2") == 1
    shown = re.findall(r"^step (\d)/4", text, re.M)
    assert shown == ["1", "2", "3", "3", "4"]
    assert text.endswith("finished: 4 steps\n")


def test_a_run_that_is_overwritten_is_started_anew(tmp_path):
    run = make_run(tmp_path / "run", done=3, total=9)
    actors: list[Trainer] = []

    def overwrite() -> None:
        actors.append(Trainer(run, 2, overwrite=True))

    text = watched(
        run,
        lambda: None,
        overwrite,
        lambda: actors[0].begin(),
        lambda: actors[0].step(1),
        lambda: actors[0].step(2),
        lambda: actors[0].end(),
    )
    assert text.count("started anew") == 1
    assert re.findall(r"^step (\d/\d)", text, re.M) == ["1/9", "2/9", "3/9", "1/2", "2/2"]
    assert text.endswith("finished: 2 steps\n")


def test_time_left_is_that_of_the_run_not_of_the_reading(tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(run, 20)
    trainer.begin()
    for step in range(1, 11):
        trainer.step(step)
    text = watched(run)
    trainer.end()
    assert "step 10/20" in text
    assert "2.0 s  0:20 left" in text


def test_ctrl_c_ends_the_watch_alone(tmp_path):
    assert "no longer watched; the run itself was left alone" in watched(tmp_path / "none")


def test_on_a_terminal_it_is_the_trainers_own_view(tmp_path):
    run = make_run(tmp_path / "run", done=6, total=6)
    text = watched(run, terminal=True)
    for word in ("accuracy", "instability", "tokens/s", "6/6", "mismatch", "latest", "finished"):
        assert word in text


def test_what_is_no_folder_or_damaged_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="wanted a run's folder, this is a file"):
        watch_run(file)
    run = make_run(tmp_path / "run", done=2, total=2)
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write("{no\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:4: not a row of metrics"):
        watched(run)


def start(*words: object, **pipes: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RECAP_FAST_PRELOAD": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "recap_fast", *map(str, words)], env=environment, text=True, **pipes
    )


def until(check, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.variant
def test_real_runs_in_other_processes(tmp_path):
    """Killed, resumed and overwritten while one watch sees all of it; Ctrl-C ends that one."""
    config = tiny_config(tmp_path, save_tiny_model(tmp_path / "model"), "training.steps=4")
    run, seen = Path(config.run), tmp_path / "seen"
    long = ("--set", "training.steps=4000", "--set", "checkpoint.every=2")
    trainers = []

    def train(*words: str) -> None:
        trainers.append(start("train", tmp_path / "tiny.yaml", *words, stdout=subprocess.DEVNULL))

    def printed() -> str:
        return seen.read_text()

    with seen.open("w") as output:
        watch = start("watch", run, stdout=output)
        try:
            until(lambda: "waiting for a run to start" in printed())
            train(*long)
            until(lambda: "step    3/4000" in printed())
            trainers[0].kill()
            trainers[0].wait()
            until(lambda: "stopped after step" in printed())
            train(*long, "--resume")
            until(lambda: "resumed after step" in printed())
            trainers[1].kill()
            trainers[1].wait()
            until(lambda: printed().count("stopped after step") == 2)
            train("--overwrite", *long)
            until(lambda: "started anew" in printed())
            watch.send_signal(signal.SIGINT)
            assert watch.wait(30) == 0
            assert printed().endswith("no longer watched; the run itself was left alone\n")
            assert trainers[2].poll() is None
        finally:
            for process in (watch, *trainers):
                process.kill()
                process.wait()
    assert "\x1b" not in printed()
    assert "Traceback" not in printed()
