"""verl's real trainer methods and a real TransferQueue: rewards in, metrics and windows out."""

from __future__ import annotations

from tests.integrations.verl_config import ppo_config  # skips where there is no verl

# isort: split
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

import recap_fast.integrations.verl  # noqa: F401  puts our methods around the trainer's
from recap_fast.integrations import verl_advantages
from recap_fast.integrations.verl_trainer import STATE_FILE, last_of_session

NAMES = ("accuracy", "format")
WINDOW = "+algorithm.recap.parameters.window=1"


def forget() -> None:
    """As a process that has just started."""
    verl_advantages._reweighters.clear()
    verl_advantages.named.clear()


@pytest.fixture(autouse=True)
def _no_windows() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def queue() -> Iterator[None]:
    """One storage unit instead of verl's eight processes; ray counts processors, uses what is."""
    ray.init(num_cpus=8, include_dashboard=False, logging_level="ERROR")
    small = {"enable": True, "backend": {"SimpleStorage": {"num_data_storage_units": 1}}}
    tq.init(OmegaConf.merge(ppo_config().transfer_queue, small))
    yield
    tq.close()
    ray.shutdown()


def trainer(folder: Path, *overrides: str, colocated: bool = False) -> Any:
    """verl's trainer with its configuration, and nothing of its cluster."""
    made = object.__new__(PPOTrainerSync)
    made.config = ppo_config(
        "algorithm.adv_estimator=recap",
        "+algorithm.recap.objectives=[accuracy,format]",
        f"trainer.default_local_dir={folder}",
        *overrides,
    )
    saved = SimpleNamespace(save_checkpoint=lambda *_, **__: None, load_checkpoint=lambda **_: None)
    made.actor_rollout_wg = saved
    made.train_dataloader = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    made.checkpoint_callback = SimpleNamespace(on_save=lambda **_: None)
    made.use_critic, made.trainer_mode, made.global_steps = False, "sync", 0
    handles = None if colocated else ["a worker"]
    made.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=handles)
    return made


def put(step: int, rewards: dict[str, list[Any]], sessions: list[str], lengths: list[int]) -> Any:
    """A batch in the queue as verl's agent loops leave it; an absent reward has no key."""
    keys = [f"step{step}-{session}" for session in sessions]
    rows, tags = [], []
    for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
        info = {
            name: float(column[row]) for name, column in rewards.items() if column[row] is not None
        }
        rows.append(
            {
                "uid": key.split("_")[0],
                "prompts": torch.ones(3, dtype=torch.long),
                "responses": torch.ones(length, dtype=torch.long),
                "response_mask": torch.ones(length, dtype=torch.long),
                "rm_scores": torch.zeros(length),
                "rollout_log_probs": torch.zeros(length),
                "extra_fields": {"reward_extra_info": info, "turns": 1},
            }
        )
        tags.append({"seq_len": 3 + length})
    return tq.kv_batch_put(
        keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(rows), tags=tags
    )


def advantages(made: Any, batch: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Of each sequence, by token; and the metrics."""
    metrics: dict[str, Any] = {}
    where = {"keys": batch.keys, "partition_id": "train"}
    mask = tq.kv_batch_get(**where, select_fields=["response_mask"])["response_mask"]
    old = [torch.zeros(len(row)) for row in mask.unbind()]  # what a step does before
    nested = torch.nested.as_nested_tensor(old, layout=torch.jagged)
    tq.kv_batch_put(**where, fields=TensorDict({"old_log_probs": nested}, batch_size=len(old)))
    made._compute_advantage(batch, metrics)
    fields = tq.kv_batch_get(**where, select_fields=["advantages"])
    return [row.float() for row in fields["advantages"].unbind()], metrics


def grpo(rewards: list[float], groups: list[str]) -> Tensor:
    """verl's GRPO advantage of each sequence."""
    table, mask = torch.tensor(rewards).unsqueeze(1), torch.ones(len(rewards), 1)
    result: Tensor = compute_grpo_outcome_advantage(table, mask, np.array(groups))[0][:, 0]
    return result


TWO_GROUPS = ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
GROUPS = [key[0] for key in TWO_GROUPS]


def test_rewards_of_agent_loops_become_weighted_advantages(queue: None, tmp_path: Path) -> None:
    made = trainer(tmp_path, "+algorithm.recap.weights=[1,2]", WINDOW)
    for step in range(3):
        accuracy, form = [1.0, 0.0, 0.0, 0.2 * step], [0.1, 0.4, 0.3, 0.9]
        batch = put(step, {"accuracy": accuracy, "format": form}, TWO_GROUPS, [2, 5, 1, 4])
        rows, metrics = advantages(made, batch)
        weights = [metrics[f"recap/weight/{name}"] for name in NAMES]
        wanted = weights[0] * grpo(accuracy, GROUPS) + 2 * weights[1] * grpo(form, GROUPS)
        for row, length, value in zip(rows, [2, 5, 1, 4], wanted, strict=True):
            torch.testing.assert_close(row, value.expand(length), rtol=1e-4, atol=1e-5)
    assert metrics["recap/reward/accuracy"] == pytest.approx(0.35)
    assert metrics["recap/rate/accuracy"] == pytest.approx(0.35 / 0.3)
    assert weights[0] > weights[1]  # it rises, the format does not


def test_a_session_counts_once_and_padding_not_at_all(queue: None, tmp_path: Path) -> None:
    """Outputs of one session share its last one's advantage; verl's own padding is left out."""
    made = trainer(tmp_path, "+algorithm.recap.method=uniform")
    sessions = ["a_0_1", "a_0_0", "a_1_0", "b_0_0", "b_1_0"]
    accuracy, form = [1.0, 1.0, 0.0, 0.5, 0.7], [0.2, 0.2, 0.6, 0.1, 0.3]
    batch = put(7, {"accuracy": accuracy, "format": form}, sessions, [3, 2, 2, 2, 2])
    batch = upsample_batch_to_divisible_size(batch, 4, eos_token_id=2)
    assert len(batch.keys) == 8
    rows, metrics = advantages(made, batch)
    once = [0, 2, 3, 4]
    groups = [sessions[row][0] for row in once]
    parts = [grpo([column[row] for row in once], groups) for column in (accuracy, form)]
    wanted = parts[0] + parts[1]
    for row, value in zip([0, 1, 2, 3, 4], wanted[[0, 0, 1, 2, 3]], strict=True):
        torch.testing.assert_close(rows[row], value.expand(len(rows[row])), rtol=1e-4, atol=1e-5)
    assert all(row.abs().max() == 0 for row in rows[5:])
    assert metrics["recap/reward/accuracy"] == pytest.approx(np.mean([1.0, 0.0, 0.5, 0.7]))


def test_rewards_may_be_absent_but_not_unheard_of(queue: None, tmp_path: Path) -> None:
    made = trainer(tmp_path, "+algorithm.recap.method=uniform")
    accuracy, form = [1.0, 0.0, 0.3, 0.1], [0.1, 0.4, None, None]
    batch = put(9, {"accuracy": accuracy, "formatting": form}, TWO_GROUPS, [1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"reward 'format'.*got \['accuracy', 'formatting'\]"):
        advantages(made, batch)
    batch = put(8, {"accuracy": accuracy, "format": form}, TWO_GROUPS, [1, 1, 1, 1])
    rows, metrics = advantages(made, batch)
    present = grpo([0.1, 0.4, 0.0, 0.0], GROUPS)
    torch.testing.assert_close(
        torch.cat(rows), grpo(accuracy, GROUPS) + present, rtol=1e-4, atol=1e-5
    )
    assert metrics["recap/reward/format"] == pytest.approx(0.25)
    without = {"accuracy": accuracy}  # a batch without one of the kinds of task
    rows, metrics = advantages(made, put(10, without, TWO_GROUPS, [1, 1, 1, 1]))
    torch.testing.assert_close(torch.cat(rows), grpo(accuracy, GROUPS), rtol=1e-4, atol=1e-5)
    assert "recap/reward/format" not in metrics
    made.global_steps = 1
    made._save_checkpoint()
    forget()
    made._load_checkpoint()  # so may the first batch of a resumed run be
    rows, _ = advantages(made, put(11, without, TWO_GROUPS, [1, 1, 1, 1]))
    torch.testing.assert_close(torch.cat(rows), grpo(accuracy, GROUPS), rtol=1e-4, atol=1e-5)


def test_rewards_of_a_colocated_model_have_fields_of_their_own(queue: None, tmp_path: Path) -> None:
    made = trainer(tmp_path, "+algorithm.recap.method=uniform", colocated=True)
    accuracy, form = [1.0, 0.0, 0.3, 0.1], [0.1, 0.4, 0.2, 0.9]
    batch = put(12, {}, TWO_GROUPS, [1, 1, 1, 1])
    fields = {"accuracy": np.array(accuracy), "format": np.array(form)}
    tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=tu.get_tensordict(fields))
    rows, _ = advantages(made, batch)
    wanted = grpo(accuracy, GROUPS) + grpo(form, GROUPS)
    torch.testing.assert_close(torch.cat(rows), wanted, rtol=1e-4, atol=1e-5)


def test_other_estimators_do_not_meet_us(queue: None, tmp_path: Path) -> None:
    made = trainer(tmp_path, "algorithm.adv_estimator=grpo")
    batch = put(13, {"accuracy": [1.0] * 4}, TWO_GROUPS, [1, 1, 1, 1])
    rows, metrics = advantages(made, batch)
    assert torch.cat(rows).abs().max() == 0  # rm_scores are
    assert not [name for name in metrics if name.startswith("recap/")]


def feed(made: Any, means: list[list[float]]) -> Tensor:
    options = verl_advantages.Options.read(made.config.algorithm)
    reweighter = verl_advantages.reweighter_of(options)
    for values in means:
        weights = reweighter.update(torch.tensor(values))
    return weights


def test_windows_survive_a_restart(tmp_path: Path) -> None:
    made = trainer(tmp_path, WINDOW)
    made._load_checkpoint()
    assert made.global_steps == 0
    feed(made, [[0.2, 0.5], [0.4, 0.5]])
    made.global_steps = 2
    made._save_checkpoint()
    uninterrupted = feed(made, [[0.5, 0.9]])
    assert (tmp_path / "global_step_2" / STATE_FILE).exists()
    for way in ((), ("trainer.resume_mode=resume_path",
                     f"trainer.resume_from_path={tmp_path}/global_step_2")):  # fmt: skip
        forget()
        resumed = trainer(tmp_path, WINDOW, *way)
        resumed._load_checkpoint()
        assert resumed.global_steps == 2
        assert feed(resumed, [[0.5, 0.9]]).equal(uninterrupted)
    forget()
    assert not feed(trainer(tmp_path, WINDOW), [[0.5, 0.9]]).equal(uninterrupted)


def test_checkpoints_that_do_not_fit_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path)
    made.global_steps = 1
    made._save_checkpoint()
    other = trainer(tmp_path, "algorithm.recap.objectives=[format,accuracy]")
    with pytest.raises(ValueError, match=r"was saved with .*\"accuracy\", \"format\""):
        other._load_checkpoint()
    (tmp_path / "global_step_1" / STATE_FILE).unlink()
    made._load_checkpoint()
    assert "its windows start anew" in caplog.text


def test_wrong_options_stop_a_run_before_its_first_rollout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'window'"):
        trainer(tmp_path, "+algorithm.recap.parameters.widnow=2")._load_checkpoint()


def test_sessions_are_told_by_their_keys() -> None:
    keys = ["u_0_0", "u_0_10", "u_0_9", "u_1_0", "pad_v_0_0"]
    assert last_of_session(keys).tolist() == [1, 1, 1, 3, 4]
