"""What verl's trainer does for the estimator "recap": delivers rewards, logs, keeps the windows.

Three methods of `PPOTrainer` get one of ours around them, which does nothing for other estimators.

Shapes: S sequences.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import transfer_queue as tq
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensordict.tensorclass import NonTensorData
from torch import Tensor
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from recap_fast.integrations.verl_advantages import (
    NAME,
    Delivery,
    Options,
    delivered,
    named,
    reweighter_of,
)

__all__: list[str] = []

logger = logging.getLogger(__name__)

STATE_FILE = "recap.safetensors"
"""In the folder of a checkpoint, beside verl's own data.pt."""

Method = Callable[..., Any]


def _around(method: str) -> Callable[[Method], Method]:
    """Puts a function (theirs, trainer, *arguments) around a method of PPOTrainer."""

    def decorate(ours: Method) -> Method:
        theirs = getattr(PPOTrainer, method)

        @functools.wraps(theirs)
        def both(trainer: Any, *arguments: Any, **keywords: Any) -> Any:
            if trainer.config.algorithm.adv_estimator != NAME:
                return theirs(trainer, *arguments, **keywords)
            return ours(theirs, trainer, *arguments, **keywords)

        setattr(PPOTrainer, method, both)
        return ours

    return decorate


@_around("_compute_advantage")
def _compute_advantage(theirs: Method, trainer: Any, batch: Any, metrics: dict[str, Any]) -> Any:
    names = Options.read(trainer.config.algorithm).objectives
    rows = _rows(trainer, batch, names)
    sources = last_of_session(batch.keys)
    counted = [
        own == source and not tag.get("is_padding", False)
        for own, (source, tag) in enumerate(zip(sources.tolist(), batch.tags, strict=True))
    ]
    rewards = {
        name: [row.get(name) if counts else None for row, counts in zip(rows, counted, strict=True)]
        for name in names
        if any(name in row for row in rows)
    }
    # Names that were not asked for stand in the estimator's error message.
    others: dict[str, list[Any]] = {name: [] for row in rows for name in row if name not in rewards}
    with delivered(Delivery(rewards | others, sources)) as delivery:
        batch = theirs(trainer, batch, metrics)
    metrics.update(delivery.metrics)
    return batch


def _rows(trainer: Any, batch: Any, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of each sequence of the batch, its rewards by name."""
    where = {"keys": batch.keys, "partition_id": batch.partition_id}
    if trainer.reward_loop_manager.reward_loop_worker_handles is None:
        # A colocated reward model's have a field each.
        fields = tq.kv_batch_get(**where, select_fields=list(names))
        columns = [[_plain(value) for value in fields[name]] for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    fields = tq.kv_batch_get(**where, select_fields=["extra_fields"])["extra_fields"]
    return [dict(_plain(value).get("reward_extra_info", {})) for value in fields]


def _plain(value: Any) -> Any:
    """A value without the wrapper that tensordict puts around what is no tensor."""
    return value.data if isinstance(value, NonTensorData) else value


def last_of_session(keys: list[str]) -> Tensor:
    """[S] int64: for each key "{uid}_{session}_{output}" the row of its session's last output."""
    last: dict[str, tuple[int, int]] = {}
    for row, key in enumerate(keys):
        session, output = key.rsplit("_", 1)
        last[session] = max(last.get(session, (-1, -1)), (int(output), row))
    return torch.tensor([last[key.rsplit("_", 1)[0]][1] for key in keys])


@_around("_save_checkpoint")
def _save_checkpoint(theirs: Method, trainer: Any) -> None:
    """Ours first: the checkpoint counts as complete when verl has written its part."""
    options = Options.read(trainer.config.algorithm)
    folder = _checkpoint_folder(trainer)
    os.makedirs(folder, exist_ok=True)
    save_file(
        reweighter_of(options).state_dict(),
        os.path.join(folder, STATE_FILE),
        metadata={"options": options.dumps()},
    )
    theirs(trainer)


@_around("_load_checkpoint")
def _load_checkpoint(theirs: Method, trainer: Any) -> None:
    """verl calls it before a fresh run too, where options are checked before the first rollout.

    Raises:
        ValueError: a checkpoint of other options, whose windows do not fit.
    """
    options = Options.read(trainer.config.algorithm)
    reweighter = reweighter_of(options)
    theirs(trainer)
    if trainer.global_steps == 0:
        return
    resumed = trainer.config.trainer
    by_path = resumed.resume_mode == "resume_path"
    folder = resumed.resume_from_path if by_path else _checkpoint_folder(trainer)
    path = os.path.join(folder, STATE_FILE)
    if not os.path.exists(path):
        logger.warning("adv_estimator=recap: %s is not there; its windows start anew", path)
        return
    with safe_open(path, framework="pt") as file:
        saved = file.metadata()["options"]
        if saved != options.dumps():
            raise ValueError(
                f"algorithm.recap: {path} was saved with {saved}, got {options.dumps()}"
            )
    reweighter.load_state_dict(load_file(path))
    named.add(saved)


def _checkpoint_folder(trainer: Any) -> str:
    return os.path.join(
        trainer.config.trainer.default_local_dir, f"global_step_{trainer.global_steps}"
    )
