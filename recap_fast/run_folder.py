"""Decides whether a run may start in its folder, or from which checkpoint it continues."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from recap_fast.checkpoint import CheckpointError, latest_checkpoint, load_state
from recap_fast.config import ConfigError, TrainConfig, load_config

logger = logging.getLogger(__name__)


def prepare_folder(
    config: TrainConfig, run_dir: Path, resume: bool, overwrite: bool
) -> Path | None:
    """Returns the checkpoint to resume from, if any; makes sure that no run is overwritten.

    Raises:
        CheckpointError: nothing to resume, or nothing left to do.
        ConfigError: a folder that holds another run.
    """
    used = (run_dir / "config.yaml").exists()
    if resume:
        if not used:
            raise CheckpointError(f"{run_dir}: no run to resume here (no config.yaml)")
        checkpoint = latest_checkpoint(run_dir / "checkpoints")
        _check_resumable(config, run_dir, load_state(checkpoint).step)
        return checkpoint
    if used and not overwrite:
        raise ConfigError(
            f"run: {run_dir} already holds a run: --resume continues it, --overwrite removes it, "
            f"--set run=FOLDER starts another"
        )
    if used:
        shutil.rmtree(run_dir)
    return None


def _check_resumable(config: TrainConfig, run_dir: Path, step: int) -> None:
    if step >= config.training.steps:
        raise CheckpointError(
            f"{run_dir}: this run has finished: {step} of {config.training.steps} steps are done. "
            f"Ask for more with --set training.steps=N"
        )
    before = load_config(run_dir / "config.yaml")
    if before.objectives != config.objectives:
        old, new = ([o.name for o in c.objectives] for c in (before, config))
        raise ConfigError(f"run: {run_dir} was trained on objectives {old}, not on {new}")
    changed = [
        key
        for key, value in config.model_dump(mode="json").items()
        if value != before.model_dump(mode="json")[key]
    ]
    if changed:
        logger.warning("resuming with other settings under: %s", ", ".join(changed))
