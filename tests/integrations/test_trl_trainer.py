"""GRPO by TRL's real trainer, with its advantages ours: on a tiny model, on the CPU."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from recap_fast.integrations.trl_trainer import STATE, RecapGRPOTrainer, _distinct
from tests.integrations.trl_runs import (
    CONSTANT,
    SHIFTED,
    TABLE,
    expected_advantages,
    functions,
    make,
    means,
    scripted,
    settings,
)
from tests.processes import run_ranks
from tests.tiny import save_tiny_model

WINDOW_1 = {"reweighting_parameters": {"window": 1}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Training ends in gc.collect: half a second over all that is imported, unless set aside."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def trained(*arguments: Any, **keywords: Any) -> Any:
    """Made and trained at once, so that another's random numbers do not come between."""
    trainer = make(*arguments, **keywords)
    trainer.train()
    return trainer


def advantages(trainer: Any) -> list[float]:
    """Of the last generated batch, in its order."""
    return list(trainer._logs["advantages"])


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("table", [TABLE, CONSTANT], ids=["table", "constant"])
def test_each_function_is_normalised_by_itself(
    tmp_path: Path, model: Path, table: Any, scale: str
) -> None:
    args = settings(tmp_path, scale_rewards=scale, reward_weights=[2.0, 0.5])
    trainer = make(
        RecapGRPOTrainer, model, args, functions(table),
        reweighting="static", reweighting_parameters={"weights": [1.0, 3.0]},
    )  # fmt: skip
    trainer.train()
    # Static weights have mean 1: 0.5 and 1.5.
    expected = expected_advantages(table, 4, scale, factors=(2.0 * 0.5, 0.5 * 1.5))
    assert any(expected)
    assert advantages(trainer) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert advantages(trainer)[4] == (0 if table[4] == [None, None] else pytest.approx(expected[4]))
    share = 1 / 4 if table is CONSTANT else 0  # of two groups and two functions
    assert logged(trainer, "frac_reward_zero_std") == [share]


@pytest.mark.parametrize("table", [TABLE, CONSTANT], ids=["table", "constant"])
def test_uniform_is_normalize_then_sum_without_whitening(
    tmp_path: Path, model: Path, table: Any
) -> None:
    args = settings(tmp_path)
    ours = trained(RecapGRPOTrainer, model, args, functions(table), reweighting="uniform")
    args = settings(tmp_path, multi_objective_aggregation="normalize_then_sum")
    theirs = trained(GRPOTrainer, model, args, functions(table))
    assert list(ours._logs["completion"]) == list(theirs._logs["completion"])
    summed = torch.tensor(advantages(ours))
    scored = torch.tensor([row != [None, None] for row in table])
    spread = summed[scored].std() + 1e-4
    whitened = torch.where(scored, (summed - summed[scored].mean()) / spread, 0.0)
    assert not torch.allclose(summed, torch.tensor(advantages(theirs)), rtol=1e-2)
    torch.testing.assert_close(whitened, torch.tensor(advantages(theirs)), rtol=1e-6, atol=1e-6)


class Fed(GRPOTrainer):
    """TRL's own trainer, head and all, told the advantages."""

    given = torch.tensor(expected_advantages(TABLE, 4))

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        return output | {"advantages": self.given[: len(output["advantages"])]}


OPTIONS: dict[str, dict[str, Any]] = {
    **{
        kind: {"loss_type": kind}
        for kind in ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
    },
    "luspo, sequences": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "sequences": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "delta": {"delta": 1.05, "epsilon_high": 0.3},
    "reference": {"beta": 0.3},
    "reference, corrected": {"beta": 0.3, "use_bias_correction_kl": True},
    "reference, moving": {"beta": 0.3, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "half of the entropy": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.1},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 9.0},
    "off-policy mask": {"off_policy_mask_threshold": 1e-4},
    "truncated masked": {"mask_truncated_completions": True, "max_completion_length": 40},
    "head in float32": {"cast_lm_head_to_fp32": True},
    "temperature": {"temperature": 0.7},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"bf16": True},
    "one part": {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8},
    "four parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "generated for two steps": {"gradient_accumulation_steps": 1, "steps_per_generation": 2,
                                "num_iterations": 1},
    "padded": {"pad_to_multiple_of": 16},
    "adapters": {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])},
    "adapters, reference": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"]), "beta": 0.3},
    "adapters and the head, reference": {
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "beta": 0.3,
    },
}  # fmt: skip

OURS_ALONE = ("weight/", "rate/", "instability/", "frac_reward_zero_std", "step_time", "train_")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_theirs_does_what_it_does_in_their_trainer(
    tmp_path: Path, model: Path, name: str
) -> None:
    """Two steps on one batch, so that the second one's ratios are not 1."""
    options = {"num_iterations": 2, "max_steps": 2} | OPTIONS[name]
    keywords = {k: options.pop(k) for k in ("peft_config",) if k in options}
    args = settings(tmp_path, **options)
    rewards = functions(TABLE, TABLE)
    ours = trained(RecapGRPOTrainer, model, args, rewards, reweighting="uniform", **keywords)
    args = settings(tmp_path, **options)
    theirs = trained(Fed, model, args, functions(TABLE, TABLE), **keywords)
    assert list(ours._logs["completion"]) == list(theirs._logs["completion"])
    tolerance = 2e-2 if args.bf16 else 1e-3
    for found, wanted in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        keys = [key for key in wanted if not key.startswith(OURS_ALONE)]
        assert {key: found[key] for key in keys} == pytest.approx(
            {key: wanted[key] for key in keys}, rel=tolerance, abs=tolerance / 100
        )
    norms = logged(ours, "grad_norm")
    assert len(norms) == 2
    assert all(norm > 0 for norm in norms)


def test_the_weights_follow_the_mean_rewards_and_are_logged(tmp_path: Path, model: Path) -> None:
    doubled = [[a, None if b is None else 2 * b] for a, b in TABLE]
    args = settings(tmp_path, max_steps=2)
    trainer = make(RecapGRPOTrainer, model, args, functions(TABLE, doubled), **WINDOW_1)
    trainer.train()
    rates = [now / before for now, before in zip(means(doubled), means(TABLE), strict=True)]
    assert rates == pytest.approx([1.0, 2.0])
    for k, name in enumerate(("near", "far")):
        assert logged(trainer, f"rate/{name}") == pytest.approx([rates[k]])  # from the second step
        assert len(logged(trainer, f"instability/{name}")) == 1
        weights = logged(trainer, f"weight/{name}")
        assert weights == pytest.approx([1.0, trainer.reweighter.weights[k].item()])
    factors = trainer.reweighter.weights.tolist()
    assert factors[1] > factors[0] + 0.1
    assert sum(factors) == pytest.approx(2.0)
    expected = expected_advantages(doubled, 4, factors=factors)
    assert advantages(trainer) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_function_without_rewards_in_a_batch_keeps_its_window(
    tmp_path: Path, model: Path
) -> None:
    silent = [[None, b] for _, b in TABLE]
    trainer = make(
        RecapGRPOTrainer, model, settings(tmp_path, max_steps=2), functions(TABLE, silent),
        reweighting_parameters={"window": 1},
    )  # fmt: skip
    trainer.train()
    assert trainer.reweighter.state_dict()["counts"].tolist() == [1, 2]
    assert advantages(trainer) == pytest.approx(
        expected_advantages(silent, 4, factors=trainer.reweighter.weights.tolist()), abs=1e-5
    )


def test_infinite_rewards_are_named(tmp_path: Path, model: Path) -> None:
    infinite = [[a, -math.inf if a == 1.0 else b] for a, b in TABLE]
    trainer = make(RecapGRPOTrainer, model, settings(tmp_path), functions(infinite))
    with pytest.raises(ValueError, match="function 'far': wanted finite .* got 2 infinite ones"):
        trainer.train()


def test_evaluation_uses_the_weights_and_leaves_them(tmp_path: Path, model: Path) -> None:
    doubled = [[a, None if b is None else 2 * b] for a, b in TABLE]
    args = settings(
        tmp_path, max_steps=2, num_generations_eval=2, per_device_eval_batch_size=8,
        eval_strategy="no",
    )  # fmt: skip
    rewards = functions(TABLE, doubled, TABLE)
    trainer = make(RecapGRPOTrainer, model, args, rewards, **WINDOW_1)
    trainer.train()
    before = trainer.reweighter.state_dict()
    metrics = trainer.evaluate(trainer.train_dataset.select(range(4)))
    torch.testing.assert_close(trainer.reweighter.state_dict(), before, equal_nan=True)
    factors = before["weights"].tolist()
    assert factors[0] != factors[1]
    expected = expected_advantages(TABLE, 2, factors=factors)
    assert advantages(trainer) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert torch.tensor(metrics["eval_loss"]).isfinite()


def saved_run(folder: Path, model: Path, tables: list[Any], **options: Any) -> Any:
    args = settings(
        folder, max_steps=4, save_strategy="steps", save_steps=2, **options
    )  # fmt: skip
    return make(RecapGRPOTrainer, model, args, functions(*tables), **WINDOW_1)


def scaled(factor: float) -> Any:
    return [[a, None if b is None else factor * b] for a, b in TABLE]


def test_a_resumed_run_continues_with_the_weights(tmp_path: Path, model: Path) -> None:
    tables = [scaled(factor) for factor in (1, 2, 5, 4)]
    whole = saved_run(tmp_path, model, tables)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert json.loads((checkpoint / STATE).read_text())["objectives"] == ["near", "far"]
    resumed = saved_run(tmp_path, model, tables[2:])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    wanted = whole.reweighter.state_dict()
    assert wanted["weights"][0] != wanted["weights"][1]
    torch.testing.assert_close(resumed.reweighter.state_dict(), wanted, rtol=0, atol=0)
    assert logged(resumed, "weight/far")[2:] == logged(whole, "weight/far")[2:]
    assert advantages(resumed) == advantages(whole)


def test_a_checkpoint_of_another_trainer_is_told_apart(tmp_path: Path, model: Path) -> None:
    saved_run(tmp_path, model, [TABLE] * 4).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    others = [scripted("near", []), scripted("elsewhere", [])]
    args = settings(tmp_path, max_steps=4)
    with pytest.raises(ValueError, match=r"wanted the objectives .*'elsewhere'.*, got .*'far'"):
        make(RecapGRPOTrainer, model, args, others, **WINDOW_1).train(str(checkpoint))
    with pytest.raises(ValueError, match="wanted the method 'uniform', got 'recap'"):
        make(RecapGRPOTrainer, model, args, functions(), reweighting="uniform").train(
            str(checkpoint)
        )
    with pytest.raises(ValueError, match=r"'values' must be \[2, 6\]"):
        make(
            RecapGRPOTrainer, model, args, functions(), reweighting_parameters={"window": 3}
        ).train(str(checkpoint))
    (checkpoint / STATE).write_text('{"method": "rec', encoding="utf-8")
    with pytest.raises(ValueError, match=f"{STATE}: wanted JSON, got Unterminated string"):
        saved_run(tmp_path, model, [TABLE] * 2).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / STATE).unlink()
    with pytest.warns(UserWarning, match=f"wanted {STATE}, got none .*start anew"):
        saved_run(tmp_path, model, [TABLE] * 2).train(resume_from_checkpoint=str(checkpoint))


def test_what_contradicts_is_refused_at_construction(tmp_path: Path, model: Path) -> None:
    def refused(match: str, options: dict[str, Any], **keywords: Any) -> None:
        with pytest.raises(ValueError, match=match):
            make(RecapGRPOTrainer, model, settings(tmp_path, **options), functions(), **keywords)

    refused(
        "multi_objective_aggregation left at its default, got 'normalize_then_sum'",
        {"multi_objective_aggregation": "normalize_then_sum"},
    )
    refused(r"scale_rewards: wanted one of .*'batch'.*, got 'std'", {"scale_rewards": "std"})
    refused("unknown reweighting method 'recapp'", {}, reweighting="recapp")
    refused("no parameter 'windows'", {}, reweighting_parameters={"windows": 1})
    refused("'signals' is the trainer's own", {}, reweighting_parameters={"signals": "loss"})


def test_repeated_names_are_numbered() -> None:
    assert _distinct(["a", "b", "a", "a_2", "a"]) == ["a", "b", "a_2", "a_2_2", "a_3"]


@pytest.mark.slow
def test_processes_share_the_weights_of_all_rewards(tmp_path: Path, model: Path) -> None:
    """A rank's own rewards would give each another weight."""
    script = Path(__file__).with_name("trl_ranks.py")
    reports = run_ranks(script, 2, tmp_path, str(model), str(tmp_path))
    first, second = reports
    assert first["processes"] == 2
    for name in ("weights", "rates", "resumed"):
        assert first[name] == second[name]
    assert first["rates"] == pytest.approx(
        [now / before for now, before in zip(means(SHIFTED), means(TABLE), strict=True)]
    )
    assert first["weights"][1] > first["weights"][0] + 0.1
    expected = expected_advantages(SHIFTED, 4, factors=first["weights"])
    assert first["advantages"] + second["advantages"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert first["resumed"] == first["weights"]
