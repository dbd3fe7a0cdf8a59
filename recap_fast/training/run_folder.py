"""Decides whether a run may start in its folder, from which checkpoint it continues, and which is
evaluated."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path
from typing import IO

from recap_fast.config import ConfigError, TrainConfig, load_config
from recap_fast.model.lora import is_adapter
from recap_fast.paths import shown
from recap_fast.training.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints

logger = logging.getLogger(__name__)


_OWN_NAMES = (
    "config.yaml", "machine.json", "metrics.jsonl", "samples.jsonl", "report.html",
    "checkpoints", "export", "plots", "tensorboard", "wandb",
)  # fmt: skip
"""What --overwrite removes: all that a run writes but its processes' logs, which tell of every
start, and which this one's have open by then."""


class FinishedRunError(CheckpointError):
    """A run to be resumed that has no steps left: nothing is wrong with it.

    Attributes:
        step: how many steps are done.
    """

    def __init__(self, text: str, step: int) -> None:
        super().__init__(text)
        self.step = step


def prepare_folder(
    config: TrainConfig, run_dir: Path, resume: bool, overwrite: bool
) -> Path | None:
    """Returns the checkpoint to resume from, if any. Removes nothing.

    Raises:
        CheckpointError: nothing to resume.
        FinishedRunError: nothing left to do.
        ConfigError: a folder that holds another run or cannot be made, or both flags at once.
    """
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite removes it: give one of them")
    used = os.path.exists(run_dir / "config.yaml")  # pathlib raises for names that are too long
    if resume:
        if not used:
            raise CheckpointError(f"{shown(run_dir)}: no run to resume here (no config.yaml)")
        checkpoint = latest_checkpoint(run_dir / "checkpoints")
        _check_resumable(config, run_dir, int(checkpoint.name.removeprefix("step-")))
        return checkpoint
    if used and not overwrite:
        raise ConfigError(
            f"run: {run_dir} already holds a run: --resume continues it, --overwrite removes it, "
            f"--set run=FOLDER starts another"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        problem = getattr(error, "strerror", None) or error
        raise ConfigError(f"run: {shown(run_dir)} cannot be made a folder: {problem}") from None
    return None


def lock_folder(run_dir: Path) -> IO[bytes]:
    """Keeps other processes from training in a folder until the returned file is closed, or this
    process ends, however it ends.

    Raises:
        ConfigError: another process trains there.
    """
    file = (run_dir / ".lock").open("wb")  # stays: removing it would let two processes lock two
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"run: another process is training in {run_dir}") from None
    except OSError as error:  # some network file systems
        logger.warning("%s cannot be locked (%s): start no second run in it", run_dir, error)
    return file


def clear_folder(run_dir: Path) -> None:
    """Removes what an earlier run wrote. Called when everything else is known to work."""
    for name in _OWN_NAMES:
        path = run_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_resumable(config: TrainConfig, run_dir: Path, step: int) -> None:
    steps = config.training.steps
    if step > steps:
        raise FinishedRunError(
            f"{run_dir}: nothing to do: {step} steps are done, and training.steps is {steps}", step
        )
    if step == steps:
        raise FinishedRunError(
            f"{run_dir}: this run has finished: {step} of {steps} steps are done", step
        )
    before = load_config(run_dir / "config.yaml")
    if before.objectives != config.objectives:
        old, new = ([o.name for o in c.objectives] for c in (before, config))
        raise ConfigError(f"run: {run_dir} was trained on objectives {old}, not on {new}")
    for key, was in before.reweighting:
        now = getattr(config.reweighting, key)
        if now != was and key != "measure_gradients_every":  # which only looks
            raise ConfigError(
                f"reweighting.{key}: {run_dir} was trained with {was!r}, whose state does not fit "
                f"{now!r}"
            )
    if before.model.lora != config.model.lora:
        raise ConfigError(
            f"model.lora: {run_dir} was trained with {before.model.lora!r}, whose weights do not "
            f"fit {config.model.lora!r}"
        )
    old_settings, new_settings = (c.model_dump(mode="json") for c in (before, config))
    changed = [key for key, value in new_settings.items() if value != old_settings[key]]
    if changed:
        logger.warning("resuming with other settings under: %s", ", ".join(changed))


def find_evaluated(folder: Path) -> tuple[Path, Path]:
    """The configuration and the checkpoint that a folder given to `eval` stands for: a run's newest
    checkpoint, or the very checkpoint.

    Raises:
        CheckpointError: there is none in it, or no run around it.
    """
    is_model = (folder / "config.json").exists() or is_adapter(folder)
    run = folder
    if is_model:
        run = folder / ".." / ".."
    elif folder.resolve().name == "checkpoints":
        run = folder.parent if folder.name else folder / ".."
    config = run / "config.yaml"
    if not config.exists() and is_model:
        raise CheckpointError(
            f"{folder}: a model without a run around it; on a configuration's rows it is evaluated "
            f"by: recap-fast eval CONFIG --set model.path={folder}"
        )
    if not config.exists():
        raise CheckpointError(
            f"{folder}: neither a run (it would have a config.yaml) nor a checkpoint (config.json)"
        )
    return config, folder if is_model else _newest(run, config)


def _newest(run: Path, config: Path) -> Path:
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise CheckpointError(
            f"{run}: no checkpoint to evaluate yet; the model that this run started from is "
            f"evaluated by: recap-fast eval {config}"
        )
    others = f", the newest of {len(found)}" if len(found) > 1 else ""
    logger.info("evaluating %s%s", found[-1], others)
    return found[-1]
