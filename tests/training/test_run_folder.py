"""What a folder given to `eval` stands for. tests/test_trainer.py has what a run does with its."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from recap_fast.config import ConfigError
from recap_fast.training.checkpoint import CheckpointError
from recap_fast.training.run_folder import FinishedRunError, find_evaluated, prepare_folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 2 and 10, and one that was never finished."""
    run = tmp_path / "run"
    for name in ("step-000002", "step-000010", ".step-000012.tmp"):
        (run / "checkpoints" / name / "trainer").mkdir(parents=True)
        (run / "checkpoints" / name / "config.json").write_text("{}")
        (run / "checkpoints" / name / "trainer" / "state.json").write_text("{}")
    (run / "config.yaml").write_text("")
    return run


def same(found: tuple[Path, Path], config: Path, checkpoint: Path) -> bool:
    return found[0].samefile(config) and found[1].samefile(checkpoint)


def test_the_newest_checkpoint_of_a_run(run_folder, monkeypatch, caplog):
    newest = run_folder / "checkpoints" / "step-000010"
    with caplog.at_level(logging.INFO):
        for place in (run_folder, run_folder / "checkpoints", run_folder / "checkpoints" / ".."):
            assert same(find_evaluated(place), run_folder / "config.yaml", newest)
        monkeypatch.chdir(run_folder)
        assert same(find_evaluated(Path()), run_folder / "config.yaml", newest)
        monkeypatch.chdir(run_folder / "checkpoints")
        assert same(find_evaluated(Path()), run_folder / "config.yaml", newest)
    assert caplog.messages == [m for m in caplog.messages if m.endswith("the newest of 2")]
    assert len(caplog.messages) == 5


def test_the_checkpoint_that_is_named(run_folder, monkeypatch):
    older = run_folder / "checkpoints" / "step-000002"
    assert same(find_evaluated(older), run_folder / "config.yaml", older)
    monkeypatch.chdir(older)
    assert same(find_evaluated(Path()), run_folder / "config.yaml", older)


def test_a_checkpoint_whose_trainer_state_was_removed_is_still_evaluated(run_folder):
    older = run_folder / "checkpoints" / "step-000002"
    (older / "trainer" / "state.json").unlink()
    assert same(find_evaluated(older), run_folder / "config.yaml", older)


def test_folders_that_cannot_be_evaluated(run_folder, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(CheckpointError, match="alone: neither a run .* nor a checkpoint"):
        find_evaluated(alone)
    (alone / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"eval CONFIG --set model.path=\S+alone"):
        find_evaluated(alone)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint to evaluate yet.*eval \S+config.yaml"
    ):
        find_evaluated(empty)


@pytest.mark.parametrize("name", ["x" * 5000, "/y" * 3000, "a\0b"])
def test_folders_that_no_system_takes(name):
    with pytest.raises(ConfigError, match="cannot be made a folder"):
        prepare_folder(None, Path(name), resume=False, overwrite=False)
    with pytest.raises(CheckpointError, match="no run to resume"):
        prepare_folder(None, Path(name), resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("steps", "words"),
    [(10, "has finished: 10 of 10 steps"), (2, "10 steps are done, and training.steps is 2")],
)
def test_runs_without_steps_left(run_folder, steps, words):
    config = SimpleNamespace(training=SimpleNamespace(steps=steps))
    with pytest.raises(FinishedRunError, match=words) as error:
        prepare_folder(config, run_folder, resume=True, overwrite=False)
    assert error.value.step == 10
