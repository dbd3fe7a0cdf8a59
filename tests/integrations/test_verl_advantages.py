"""The estimator "recap" in verl's registry and functions, and what verl's trainer does for it."""

from __future__ import annotations

from tests.integrations.verl_config import CHOSEN, ppo_config  # skips where there is no verl

# isort: split
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.import_utils import import_external_libs
from verl.utils.torch_functional import masked_whiten

import recap_fast.integrations.verl  # noqa: F401  registers the estimator
from recap_fast.integrations import verl_advantages
from recap_fast.integrations.verl_advantages import Delivery, Options, delivered
from recap_fast.reweighting.recap import RecapReweighter

GROUPS, MEMBERS, T = 5, 4, 7
S = GROUPS * MEMBERS
NAMES = ("accuracy", "format")


def forget() -> None:
    """As a process that has just started."""
    verl_advantages._reweighters.clear()
    verl_advantages.named.clear()


@pytest.fixture(autouse=True)
def _no_windows() -> Iterator[None]:
    forget()
    yield
    forget()


def algorithm(*overrides: str) -> Any:
    lines = ("algorithm.adv_estimator=recap", "+algorithm.recap.objectives=[accuracy,format]")
    return ppo_config(*lines, *overrides).algorithm


def batch(seed: int = 0) -> DataProto:
    """Shuffled groups, responses of several lengths."""
    random = np.random.default_rng(seed)
    order = random.permutation(S)
    uid = np.array([f"prompt-{row // MEMBERS}" for row in range(S)], dtype=object)[order]
    mask = torch.arange(T) < torch.from_numpy(random.integers(1, T + 1, size=(S, 1)))
    scores = torch.zeros(S, T)
    scores[torch.arange(S), mask.sum(-1) - 1] = torch.from_numpy(random.random(S)).float()
    return DataProto.from_dict(
        tensors={
            "token_level_rewards": scores,
            "response_mask": mask.long(),
            "prompts": torch.zeros(S, 3, dtype=torch.long),
            "attention_mask": torch.cat([torch.ones(S, 3), mask], dim=1).long(),
        },
        non_tensors={
            "uid": uid,
            "accuracy": random.integers(0, 2, S).astype(float),
            "format": random.random(S),
        },
    )


def advantages(data: DataProto, config: Any, estimator: str = "recap") -> Tensor:
    data = DataProto(batch=data.batch.clone(), non_tensor_batch=dict(data.non_tensor_batch))
    done = ray_trainer.compute_advantage(data, adv_estimator=estimator, config=config)
    assert done.batch["returns"].equal(done.batch["advantages"])
    result: Tensor = done.batch["advantages"]
    return result


def of_one(data: DataProto, name: str, **options: Any) -> Tensor:
    """verl's GRPO advantages of one objective."""
    rewards = torch.zeros(S, T)
    rewards[:, 0] = torch.from_numpy(data.non_tensor_batch[name]).float()
    result: Tensor = compute_grpo_outcome_advantage(
        rewards, data.batch["response_mask"], data.non_tensor_batch["uid"], **options
    )[0]
    return result


@pytest.mark.parametrize("by_std", [True, False])
def test_uniform_weights_give_the_sum_of_verls_grpo(by_std: bool) -> None:
    config = algorithm(
        "+algorithm.recap.method=uniform",
        "+algorithm.recap.weights=[1,0.25]",
        f"algorithm.norm_adv_by_std_in_grpo={by_std}",
    )
    data = batch()
    parts = [of_one(data, name, norm_adv_by_std_in_grpo=by_std) for name in NAMES]
    torch.testing.assert_close(advantages(data, config), parts[0] + 0.25 * parts[1])


def test_whitened_they_are_verls_gdpo() -> None:
    data = batch()
    ours = advantages(data, algorithm("+algorithm.recap.method=uniform"))
    config = ppo_config(
        "algorithm.adv_estimator=gdpo", "+algorithm.gdpo_reward_keys=[accuracy,format]"
    ).algorithm
    theirs = advantages(data, config, "gdpo")
    mask = data.batch["response_mask"]
    torch.testing.assert_close(masked_whiten(ours, mask) * mask, theirs, rtol=1e-4, atol=1e-5)


def test_recap_weighs_by_the_means_of_the_batches() -> None:
    config = algorithm(
        "+algorithm.recap.parameters.window=2", "+algorithm.recap.parameters.temperature=0.3"
    )
    reweighter = RecapReweighter(2, window=2, temperature=0.3, signals="reward")
    for seed in range(6):
        data = batch(seed)
        means = [float(data.non_tensor_batch[name].mean()) for name in NAMES]
        lambdas = reweighter.update(torch.tensor(means))
        wanted = sum(w * of_one(data, name) for w, name in zip(lambdas, NAMES, strict=True))
        torch.testing.assert_close(advantages(data, config), wanted, rtol=1e-4, atol=1e-5)
    assert abs(lambdas[0] - lambdas[1]) > 0.05  # the windows were full, and the weights moved


def test_the_estimator_is_registered_and_reports() -> None:
    data = batch()
    estimator = get_adv_estimator_fn("recap")
    given = {
        "token_level_rewards": data.batch["token_level_rewards"],
        "response_mask": data.batch["response_mask"],
        "index": data.non_tensor_batch["uid"],
        "config": algorithm("+algorithm.recap.parameters.window=1"),
    }
    direct, returns = estimator(**given, non_tensor_batch=data.non_tensor_batch)
    assert direct.equal(returns)
    with delivered(Delivery(data.non_tensor_batch)) as delivery:
        estimator(**given)
    assert set(delivery.metrics) == {
        f"recap/{kind}/{name}"
        for kind in ("weight", "rate", "instability", "reward")
        for name in NAMES
    }
    assert delivery.metrics["recap/rate/format"] == 1.0  # the same batch twice
    with delivered(Delivery(data.non_tensor_batch)) as delivery:
        estimator(**given | {"config": algorithm()})
    assert "recap/rate/format" not in delivery.metrics  # ten steps too early


def test_absent_rewards_and_lone_members_count_for_nothing() -> None:
    data = batch()
    config = algorithm("+algorithm.recap.method=uniform")
    rewards = data.non_tensor_batch["format"].astype(object)
    alone = int(np.flatnonzero(data.non_tensor_batch["uid"] == "prompt-1")[0])
    for row in range(S):
        if data.non_tensor_batch["uid"][row] == "prompt-1" and row != alone:
            rewards[row] = None
    data.non_tensor_batch["format"] = rewards
    rows = data.non_tensor_batch["uid"] == "prompt-1"
    ours, accuracy = advantages(data, config), of_one(data, "accuracy")
    torch.testing.assert_close(ours[rows], accuracy[rows])
    assert (ours[~rows] - accuracy[~rows]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["~algorithm.recap"], "wanted the names of the rewards"),
        (["+algorithm.recap.objektives=[a]"], "algorithm.recap.objektives: wanted one of"),
        (["algorithm.recap.objectives=accuracy"], "wanted a list of different names"),
        (["algorithm.recap.objectives=[a,b,a]"], "wanted a list of different names"),
        (["+algorithm.recap.weights=[1]"], "a finite number for each of"),
        (["+algorithm.recap.weights=2"], "a finite number for each of"),
        (["+algorithm.recap.weights=[1,a]"], "a finite number for each of"),
        (["+algorithm.recap.weights=[1,.inf]"], "a finite number for each of"),
        (["+algorithm.recap.parameters.device=cuda"], "parameters.device is not supported"),
        (["algorithm.use_kl_in_reward=True"], "use_kl_in_reward=True is not supported"),
        (["+algorithm.recap.method=recapp"], "did you mean 'recap'"),
        (["+algorithm.recap.parameters.widow=3"], "did you mean 'window'"),
        (["algorithm.recap.objectives=[accuracy,fromat]"], "no sequence has a reward 'fromat'"),
    ],
)
def test_wrong_options_are_named(overrides: list[str], message: str) -> None:
    if overrides[0].startswith("~"):
        config = ppo_config("algorithm.adv_estimator=recap").algorithm
    else:
        config = algorithm(*overrides)
    with pytest.raises(ValueError, match=message):
        advantages(batch(), config)


@pytest.mark.parametrize("wrong", ["good", [1.0], float("inf")])
def test_rewards_that_are_no_numbers_are_named(wrong: Any) -> None:
    data = batch()
    column = data.non_tensor_batch["format"].astype(object)
    column[3] = wrong
    rewards = dict(data.non_tensor_batch) | {"format": column}
    with (
        delivered(Delivery(rewards)),
        pytest.raises(ValueError, match=r"reward 'format': wanted a finite number.*got \["),
    ):
        advantages(data, algorithm())
    with (
        delivered(Delivery(rewards | {"format": np.ones(1)})),
        pytest.raises(ValueError, match=f"each of {S} sequences, got"),
    ):
        advantages(data, algorithm())


def test_other_estimators_are_left_alone() -> None:
    data = batch()
    config = ppo_config("algorithm.adv_estimator=grpo").algorithm
    theirs = compute_grpo_outcome_advantage(
        data.batch["token_level_rewards"].clone(),
        data.batch["response_mask"],
        data.non_tensor_batch["uid"],
    )[0]
    torch.testing.assert_close(advantages(data, config, "grpo"), theirs)


def test_verl_accepts_what_a_user_types() -> None:
    config = ppo_config(*CHOSEN, "+algorithm.recap.parameters.window=4")
    import_external_libs(config.actor_rollout_ref.model.external_lib)  # as HFModelConfig does
    validate_config(config, need_reference_policy(config), need_critic(config))
    options = Options.read(config.algorithm)
    assert options.objectives == NAMES
    assert options.parameters == {"window": 4}
    assert not need_critic(config)
