"""Runs that replace groups without a signal, or leave cut completions out of the loss."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recap_fast.config import TrainConfig
from recap_fast.report.metrics import read_metrics
from recap_fast.trainer import Trainer
from tests.tiny import save_tiny_model, tiny_config

EVEN = "data.sources.0.rewards={even: 'tests.tiny_rewards:even_only'}"
QUIET = ("evaluation.before=false", "evaluation.after=false", "logging.rollouts_per_step=1000")
DYNAMIC = "rollout.dynamic_sampling={max_refills: 3}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def configured(folder: Path, model: Path, *overrides: str) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    return tiny_config(folder, model, *QUIET, *overrides)


def train(config: TrainConfig, **options: Any) -> Trainer:
    trainer = Trainer(config, **options)
    trainer.train()
    trainer.close()
    return trainer


def samples_of(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.run) / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(config: TrainConfig) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for row in read_metrics(Path(config.run))
    ]


def test_groups_without_a_signal_are_replaced_and_counted(tmp_path: Path, model: Path) -> None:
    settings = ("data.batch_size=8", "reweighting.balance=gradient")
    config = configured(tmp_path, model, EVEN, DYNAMIC, *settings)
    balance = train(config).balance
    assert balance is not None
    assert (balance.means > 0).all(), "each kept group has a gradient to be measured"
    samples = samples_of(config)
    dropped = 0
    for row in read_metrics(Path(config.run)):
        mine = [sample for sample in samples if sample["step"] == row["step"]]
        groups: dict[int, list[float]] = {}
        for sample in mine:
            groups.setdefault(sample["group"], []).append(sample["rewards"]["even"])
        flat = sum(np.ptp(rewards) == 0 for rewards in groups.values())
        assert row["groups/sampled"] == len(groups) == 4 + row["groups/dropped"]
        assert row["groups/dropped"] + row["groups/without_signal"] == flat
        # What was dropped is part of what the policy can do.
        mean = np.mean([reward for rewards in groups.values() for reward in rewards])
        assert row["reward/even"] == pytest.approx(mean, rel=1e-6)
        assert row["zero_std_fraction/even"] == pytest.approx(flat / len(groups))
        trained = [len(groups[group]) for group in groups if np.ptp(groups[group]) > 0]
        assert len(trained) == 4 - row["groups/without_signal"]
        lengths = [s["tokens"] for s in mine if np.ptp(groups[s["group"]]) > 0]
        assert row["train/policy_tokens"] == sum(lengths)
        dropped += row["groups/dropped"]
        prompts = [(sample["source"], sample["row"]) for sample in mine]
        assert len(set(prompts)) == len(groups), "each group has a prompt of its own"
    assert dropped > 3
    assert sum(row["groups/refilled"] for row in read_metrics(Path(config.run))) > 3


def test_several_updates_share_the_groups_evenly(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(
        tmp_path, model, EVEN, DYNAMIC, "data.batch_size=8", "training.updates_per_rollout=2",
        "training.steps=2",
    )  # fmt: skip
    trainer = Trainer(config)
    learn, sizes = trainer._learn, []

    def record(updates: Any, *rest: Any) -> Any:
        sizes.append([int((~u.advantages[:, 0].isnan()).sum()) for u in updates])
        return learn(updates, *rest)

    monkeypatch.setattr(trainer, "_learn", record)
    trainer.train()
    trainer.close()
    assert sizes == [[8, 8], [8, 8]]


def test_without_the_setting_nothing_changes(tmp_path: Path, model: Path) -> None:
    config = configured(tmp_path, model, EVEN, "training.steps=1")
    train(config)
    (row,) = read_metrics(Path(config.run))
    assert not [key for key in row if key.startswith(("groups/", "importance/"))]


def test_a_step_interrupted_in_a_refill_gives_all_its_rows_back(
    tmp_path: Path, model: Path
) -> None:
    """To a run that is resumed, whose metrics are those of an unbroken one."""
    settings = (EVEN, DYNAMIC, "training.steps=3", "data.batch_size=8")
    config = configured(tmp_path / "broken", model, *settings)
    trainer = Trainer(config)
    start, rounds = trainer.scorer.start, []

    def interrupt(*args: Any) -> Any:
        if trainer.step == 1:
            rounds.append(trainer.step)
        if len(rounds) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return start(*args)

    trainer.scorer.start = interrupt  # type: ignore[method-assign]
    assert trainer.train() is False
    trainer.close()
    assert trainer.step == 1
    assert len(rounds) == 2
    train(config, resume=True)
    unbroken = configured(tmp_path / "unbroken", model, *settings)
    train(unbroken)
    assert without_times(config) == without_times(unbroken)
    assert samples_of(config) == samples_of(unbroken)


def test_refills_are_bounded(tmp_path: Path, model: Path) -> None:
    constant = "data.sources.0.rewards={constant: 'tests.tiny_rewards:constant'}"
    config = configured(
        tmp_path, model, constant, "training.steps=1", "rollout.dynamic_sampling={max_refills: 2}"
    )
    train(config)
    (row,) = read_metrics(Path(config.run))
    counts = [row[f"groups/{name}"] for name in ("sampled", "dropped", "refilled")]
    assert counts == [6, 4, 0]
    assert row["groups/without_signal"] == 2
    assert row["loss/constant"] is not None, "the last ones stay, and count"


def test_cut_completions_stay_out_of_the_loss(tmp_path: Path, model: Path) -> None:
    """With DAPO's penalty as an objective of its own, whose signal then is of completed ones."""
    config = configured(
        tmp_path, model, "rollout.overlong_filtering=true", "rollout.max_new_tokens=60",
        "rollout.group_size=8", "training.steps=2", "training.max_tokens=4096",
        "data.sources.0.rewards={vowels: 'tests.tiny_rewards:vowels', brief: overlong}",
        "model.reference=initial", "loss.kl_coef=0.1",
    )  # fmt: skip
    train(config)
    for row in read_metrics(Path(config.run)):
        mine = [sample for sample in samples_of(config) if sample["step"] == row["step"]]
        stopped = [sample["tokens"] for sample in mine if sample["finish_reason"] == "stop"]
        assert 0 < len(stopped) < len(mine)
        # With a KL term every rollout that takes part is trained, whatever its advantage.
        assert row["train/policy_tokens"] == sum(stopped)
        rewards = [sample["rewards"]["brief"] for sample in mine]
        assert min(rewards) == -1
        assert row["reward/brief"] == pytest.approx(np.mean(rewards), rel=1e-6)
        share = 1 - len(stopped) / len(mine)
        assert row["rollout/truncated_fraction"] == pytest.approx(share)


def test_a_step_whose_completions_are_all_cut_trains_nothing(tmp_path: Path, model: Path) -> None:
    config = configured(
        tmp_path, model, "rollout.overlong_filtering=true", "rollout.max_new_tokens=1",
        "data.mixing={sums: 1}", "training.steps=1",
    )  # fmt: skip
    train(config)
    (row,) = read_metrics(Path(config.run))
    assert row["rollout/truncated_fraction"] == 1
    assert row["grad_norm"] is None
    assert row["reward/vowels"] is not None


def test_the_overlong_penalty_is_an_objective_like_any_other(tmp_path: Path, model: Path) -> None:
    config = configured(
        tmp_path, model, "rollout.max_new_tokens=60", "training.steps=3",
        "data.sources.0.rewards={vowels: 'tests.tiny_rewards:vowels', brief: overlong}",
    )  # fmt: skip
    train(config)
    rows = read_metrics(Path(config.run))
    assert all(-1 <= row["reward/brief"] < 0 for row in rows)
    assert all(row["loss/brief"] is not None for row in rows)
    assert len({row["weight/brief"] for row in rows}) > 1, "RECAP moves its weight"
