"""Our policy losses against verl's own, through verl's registry."""

from __future__ import annotations

from tests.integrations.verl_config import CHOSEN, ppo_config  # skips where there is no verl

# isort: split
from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import AggregationType, Metric

import recap_fast.integrations.verl  # noqa: F401  registers the losses

B, T = 6, 11
TWINS = {"recap": "vanilla", "recap_gspo": "gspo", "recap_cispo": "cispo"}
MODES = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)  # fmt: skip
GLOBAL_BATCHES: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 12,
               "loss_scale_factor": 9},
}  # fmt: skip


def actor_config(*overrides: str) -> Any:
    config = ppo_config(*(f"actor_rollout_ref.actor.{line}" for line in overrides))
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def inputs(spread: float = 0.9) -> dict[str, Tensor]:
    """Ratios on both sides of every bound; a sequence without tokens; advantages by token."""
    old = -torch.rand(B, T) * 3
    mask = (torch.rand(B, T) < 0.8).long()
    mask[2] = 0
    return {
        "old_log_prob": old,
        "log_prob": old + spread * torch.randn(B, T),
        "advantages": torch.randn(B, T),
        "response_mask": mask,
    }


def run(name: str, given: dict[str, Any], config: Any, mode: str) -> tuple[Tensor, Tensor, Any]:
    """Loss, its gradient in the log-probs, metrics."""
    log_prob = given["log_prob"].clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        **given | {"log_prob": log_prob}, loss_agg_mode=mode, config=config
    )
    (3 * loss).backward()
    assert log_prob.grad is not None
    return loss.detach(), log_prob.grad, metrics


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch", GLOBAL_BATCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TWINS)
def test_value_gradient_and_metrics_are_verls(
    name: str, mode: str, batch: str, weighted: bool
) -> None:
    config = actor_config("clip_ratio_low=0.15", "clip_ratio_high=0.3", "clip_ratio_c=2.0")
    config.global_batch_info.update(GLOBAL_BATCHES[batch])
    given: dict[str, Any] = inputs()
    if weighted:
        given["rollout_is_weights"] = 2 * torch.rand(B, T)
    loss, gradient, metrics = run(name, given, config, mode)
    their_loss, their_gradient, their_metrics = run(TWINS[name], given, config, mode)
    torch.testing.assert_close(loss, their_loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-6)
    assert metrics == pytest.approx(their_metrics, rel=1e-5)
    assert metrics["actor/pg_clipfrac"] > 0  # the bounds were reached
    assert (metrics["actor/pg_clipfrac_lower"] > 0) == (name == "recap")
    assert gradient[2].abs().max() == 0


@pytest.mark.parametrize("name", TWINS)
def test_on_policy_and_far_off_it_too(name: str) -> None:
    config = actor_config()
    for spread in (0.0, 60.0):
        given = inputs(spread)
        if name == "recap_gspo" and spread:
            given["log_prob"] = given["log_prob"].clamp(max=5)  # below where verl clamps
        loss, gradient, _ = run(name, given, config, "token-mean")
        their_loss, their_gradient, _ = run(TWINS[name], given, config, "token-mean")
        torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TWINS)
def test_masked_tokens_may_hold_anything(name: str) -> None:
    given = inputs()
    clean = run(name, given, actor_config(), "token-mean")
    hole = given["response_mask"] == 0
    for key in ("old_log_prob", "log_prob", "advantages"):
        given[key] = given[key].masked_fill(hole, torch.nan)
    loss, gradient, metrics = run(name, given, actor_config(), "token-mean")
    assert loss == clean[0]
    assert gradient.equal(clean[1])
    assert metrics == clean[2]


def test_bounds_default_to_clip_ratio() -> None:
    config = actor_config("clip_ratio=0.05", "clip_ratio_low=null", "clip_ratio_high=null")
    given = inputs()
    assert run("recap", given, config, "token-mean")[0] == pytest.approx(
        run("vanilla", given, config, "token-mean")[0].item(), rel=1e-5
    )
    assert run("recap", given, config, "token-mean")[2] != run(
        "recap", given, actor_config(), "token-mean"
    )[2]  # fmt: skip


def test_what_is_not_supported_is_named() -> None:
    with pytest.raises(ValueError, match=r"clip_ratio_c >= 1 \+ clip_ratio_high = 1.5, got 1.4"):
        run("recap", inputs(), actor_config("clip_ratio_high=0.5", "clip_ratio_c=1.4"), MODES[0])
    with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
        run("recap", inputs(), actor_config(), "by-weekday")
    with pytest.raises(ValueError, match="ActorConfig, got None"):
        run("recap", inputs(), None, MODES[0])


def test_verls_config_and_metrics_take_it() -> None:
    config = omega_conf_to_dataclass(ppo_config(*CHOSEN).actor_rollout_ref.actor)
    assert config.policy_loss.loss_mode == "recap"
    _, _, metrics = run(config.policy_loss.loss_mode, inputs(), config, config.loss_agg_mode)
    collected = Metric.from_dict(metrics, aggregation=AggregationType.MEAN)
    assert collected["actor/ppo_kl"].aggregate() == pytest.approx(metrics["actor/ppo_kl"])
