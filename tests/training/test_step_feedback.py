from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recap_fast.config import TrainConfig
from recap_fast.training.distributed import ALONE
from recap_fast.training.step_feedback import step_feedback
from recap_fast.types import Prompt, RewardTable, Rollout, StepFeedback
from tests.tiny import tiny_config

NAN = float("nan")
METRICS = {"weight/length": 0.5, "weight/vowels": 1.0, "weight/ntp": 1.5, "loss/ntp": 3.0}


def configured(tmp_path: Path, *more: str) -> TrainConfig:
    return tiny_config(tmp_path, tmp_path / "model", *more)


def rollouts(groups: list[int]) -> list[Rollout]:
    prompts = [Prompt("sums", 10 + group, [1], "", None, {}) for group in range(max(groups) + 1)]
    return [Rollout(prompts[group], group, [2], [0.0], "stop", "") for group in groups]


def test_nothing_is_told_unless_the_mix_follows_it(tmp_path: Path) -> None:
    table = RewardTable(np.ones((2, 3), np.float32))
    told = step_feedback(configured(tmp_path), METRICS, rollouts([0, 0]), table, ALONE)
    assert told == StepFeedback()


def test_weights_for_adaptive_shares(tmp_path: Path) -> None:
    config = configured(tmp_path, "data.mixing=adaptive")
    told = step_feedback(config, METRICS, [], RewardTable(np.ones((0, 3), np.float32)), ALONE)
    assert told == StepFeedback({"length": 0.5, "vowels": 1.0, "ntp": 1.5})


def test_shares_follow_the_weights_before_balance(tmp_path: Path) -> None:
    config = configured(tmp_path, "data.mixing=adaptive")
    before = {f"unbalanced_{name}": 2 - value for name, value in METRICS.items()}
    table = RewardTable(np.ones((0, 3), np.float32))
    told = step_feedback(config, {**METRICS, **before}, [], table, ALONE)
    assert told == StepFeedback({"length": 1.5, "vowels": 1.0, "ntp": 0.5})


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ("[length]", [True, False, True, None, None]),
        ("[vowels]", [True, True, False, None, False]),
        ("[length, vowels]", [True, False, False, None, False]),
    ],
)
def test_a_group_is_solved_where_each_mean_reaches_the_threshold(
    tmp_path: Path, rewards: str, expected: list[bool | None]
) -> None:
    config = configured(tmp_path, f"data.review={{rewards: {rewards}, threshold: 0.7}}")
    values = np.array(
        [
            *10 * [[1, 1, NAN]],  # and 3 of 10 set to 0 below: 0.7 is not below 0.7
            [1, 1, NAN], [0, 1, NAN],
            [NAN, 0, NAN], [1, NAN, NAN],  # over those that have it
            [NAN, NAN, NAN], [NAN, NAN, NAN],
            [NAN, 0, NAN], [NAN, 1, NAN],  # length failed for both, and vowels say enough
        ],
        np.float32,
    )  # fmt: skip
    values[:3, :2] = 0
    groups = [*10 * [0], 1, 1, 2, 2, 3, 3, 4, 4]
    told = step_feedback(config, METRICS, rollouts(groups), RewardTable(values), ALONE)
    assert told.weights == {}
    assert list(told.groups) == [("sums", 10 + i, one) for i, one in enumerate(expected)]


def test_sources_without_such_a_reward_are_not_reviewed(tmp_path: Path) -> None:
    other = "{name: t, kind: rl, reasoning_gym: gcd, rewards: {other: 'tests.tiny_rewards:none'}}"
    config = configured(
        tmp_path, f"data.sources=[{other}, {{name: sums, kind: rl, reasoning_gym: chain_sum, "
        "rewards: {length: 'tests.tiny_rewards:length'}}]",
        "data.mixing=uniform", "data.review={rewards: [other]}",
    )  # fmt: skip
    table = RewardTable(np.ones((2, 2), np.float32))
    assert step_feedback(config, {}, rollouts([0, 1]), table, ALONE) == StepFeedback()
