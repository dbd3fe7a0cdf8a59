"""The oracle against numbers worked out from the formulas, and against finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from recap_fast.ops import PolicyLossConfig, fused_linear_policy_loss
from tests.ops.batches import random_batch

# Two tokens to choose from; hidden is the logit of token 1, so that p(1) = 3/4 in every row.
P = 0.75
LOGP = math.log(P)
IMPLEMENTATIONS = ("reference", "torch")


def _loss(impl: str, advantages: list, sequence_ids: list, config: Any, **arguments: Any) -> Any:
    n = len(sequence_ids)
    hidden = torch.full((n, 1), math.log(3), dtype=torch.float64, requires_grad=True)
    for name in (
        "old_logprobs", "ref_logprobs", "rollout_logprobs", "importance_weights", "denominators",
    ):  # fmt: skip
        if name in arguments:
            arguments[name] = torch.tensor(arguments[name], dtype=torch.float64)
    for name in ("targets", "token_objectives"):
        if name in arguments:
            arguments[name] = torch.tensor(arguments[name])
    arguments.setdefault("targets", torch.ones(n, dtype=torch.int64))
    if "objective_weights" in arguments:
        arguments["objective_weights"] = torch.tensor(arguments["objective_weights"])
    output = fused_linear_policy_loss(
        hidden,
        torch.tensor([[0.0], [1.0]], dtype=torch.float64),
        sequence_ids=torch.tensor(sequence_ids),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        config=config,
        impl=impl,
        **arguments,
    )
    (gradient,) = torch.autograd.grad(output.loss, hidden)
    # d logp / d hidden = 1 - p(1) = 1/4: the gradient with respect to each log-prob
    return output, (gradient[:, 0] / (1 - P)).tolist()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_on_policy_token_mean(impl: str) -> None:
    # Objective 0 applies to 3 tokens, objective 1 only to the 2 of sequence 0.
    advantages = [[2.0, -1.0], [0.0, float("nan")]]
    output, slopes = _loss(
        impl, advantages, [0, 0, 1], PolicyLossConfig(), objective_weights=[3.0, 1.0]
    )
    assert output.objective_losses.tolist() == pytest.approx([-4 / 3, 1.0])
    assert output.loss.item() == pytest.approx((3 * -4 / 3 + 1) / 2)
    assert slopes == pytest.approx([-(3 * 2 / 3 - 1 / 2) / 2] * 2 + [0.0])
    assert output.logprobs.tolist() == pytest.approx([LOGP] * 3)
    entropy = -P * math.log(P) - (1 - P) * math.log(1 - P)
    assert output.entropy.tolist() == pytest.approx([entropy] * 3)
    assert output.kl is None
    assert output.advantages.tolist() == [[2.0, -1.0], [0.0, 0.0]]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("aggregation", "length", "first", "second"),
    [("token", None, 1 / 4, 1 / 4), ("sequence", None, 1 / 6, 1 / 2), ("constant", 10, 0.05, 0.05)],
)
def test_aggregations(
    impl: str, aggregation: Any, length: int | None, first: float, second: float
) -> None:
    # The fifth token is ignored: it counts neither for lengths nor for denominators.
    config = PolicyLossConfig(aggregation=aggregation, max_completion_length=length)
    output, slopes = _loss(
        impl, [[1.0], [1.0]], [0, 0, 0, 1, 1], config, targets=[1, 1, 1, 1, -100]
    )
    assert slopes == pytest.approx([-first] * 3 + [-second, 0.0])
    assert output.logprobs[4] == 0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("advantage", "ratio", "slope", "value", "clipped"),
    [
        (1.0, 1.1, -1.1, -1.1, 0.0),
        (1.0, 1.5, 0.0, -1.3, 1.0),
        (1.0, 0.5, -0.5, -0.5, 0.0),
        (-1.0, 1.5, 1.5, 1.5, 0.0),
        (-1.0, 0.5, 0.0, 0.8, 1.0),
        (-1.0, 4.0, 0.0, 2.0, 0.0),  # bounded by clip_delta
        (0.0, 4.0, 0.0, 0.0, 0.0),
    ],
)
def test_clip(
    impl: str, advantage: float, ratio: float, slope: float, value: float, clipped: float
) -> None:
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.3, clip_delta=2.0)
    old = [LOGP - math.log(ratio)]
    output, slopes = _loss(impl, [[advantage]], [0], config, old_logprobs=old)
    assert output.loss.item() == pytest.approx(value)
    assert slopes == pytest.approx([slope])
    assert output.clip_fraction.tolist() == [clipped]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_cispo(impl: str) -> None:
    config = PolicyLossConfig(loss_type="cispo", clip_high=0.5)
    old = [LOGP - math.log(4.0), LOGP - math.log(0.5)]
    output, slopes = _loss(impl, [[2.0]], [0, 0], config, old_logprobs=old)
    assert slopes == pytest.approx([-1.5 * 2 / 2, -0.5 * 2 / 2])
    assert output.loss.item() == pytest.approx(-(1.5 + 0.5) * 2 * LOGP / 2)
    assert output.clip_fraction.tolist() == [0.5]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sequence_ratio_is_the_geometric_mean_of_policy_tokens(impl: str) -> None:
    config = PolicyLossConfig(ratio_level="sequence", clip_low=1.0, clip_high=9.0)
    old = [LOGP - math.log(4.0), LOGP, LOGP - math.log(100.0)]
    arguments = {"old_logprobs": old, "token_objectives": [-1, -1, 0]}
    output, slopes = _loss(impl, [[1.0]], [0, 0, 0], config, **arguments)
    # ratio sqrt(4) = 2 for both policy tokens; the supervised one stays out of the mean
    assert output.loss.item() == pytest.approx(-(2 + 2 + LOGP) / 3)
    assert slopes == pytest.approx([-2 / 3, -2 / 3, -1 / 3])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [
        ("k1", -0.5, -0.5),
        ("k2", 0.125, -0.5),
        ("k3", math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
    ],
)
def test_kl(impl: str, kind: Any, value: float, slope: float) -> None:
    config = PolicyLossConfig(kl_coef=0.1, kl_estimator=kind)
    ref = [LOGP + 0.5, LOGP + 0.5, LOGP + 9]
    arguments = {"ref_logprobs": ref, "token_objectives": [-1, -1, 0]}
    output, slopes = _loss(impl, [[0.0]], [0, 0, 0], config, **arguments)
    assert output.kl.tolist() == pytest.approx([value, value, 0.0])
    assert output.loss.item() == pytest.approx(0.1 * value - LOGP / 3)
    assert slopes == pytest.approx([0.05 * slope, 0.05 * slope, -1 / 3])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(
    ("kind", "descends"),
    [("k1", "policy || reference"), ("k2", "policy || reference"), ("k3", "reference || policy")],
)
def test_which_divergence_an_estimator_descends(
    impl: str, scale: float, kind: Any, descends: str
) -> None:
    """The expectation of its gradient over what the policy samples, token by token."""
    generator = torch.Generator().manual_seed(1)
    v, h = 7, 5
    state = torch.randn(1, h, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(v, h, generator=generator, dtype=torch.float64)
    reference = torch.randn(v, generator=generator, dtype=torch.float64) * scale
    reference = reference.log_softmax(-1)
    output = fused_linear_policy_loss(
        state.expand(v, h),
        head,
        torch.arange(v),  # every token once, each a sequence of its own ...
        sequence_ids=torch.arange(v),
        advantages=torch.zeros(v, 1, dtype=torch.float64),
        ref_logprobs=reference,
        kl_denominator=1.0,
        config=PolicyLossConfig(kl_coef=1.0, kl_estimator=kind),
        impl=impl,
    )
    policy = output.logprobs.exp()
    slopes = []
    for token in range(v):  # ... so that the policy's probabilities can weigh their gradients
        one = fused_linear_policy_loss(
            state,
            head,
            torch.tensor([token]),
            sequence_ids=torch.zeros(1, dtype=torch.int64),
            advantages=torch.zeros(1, 1, dtype=torch.float64),
            ref_logprobs=reference[token : token + 1],
            config=PolicyLossConfig(kl_coef=1.0, kl_estimator=kind),
            impl=impl,
        )
        slopes.append(torch.autograd.grad(one.loss, state)[0][0])
    expected = (policy[:, None] * torch.stack(slopes)).sum(0)

    logp = torch.log_softmax(state @ head.T, -1)[0]
    p, q = logp, reference
    if descends == "reference || policy":
        p, q = q, p
    (true,) = torch.autograd.grad((p.exp() * (p - q)).sum(), state)
    torch.testing.assert_close(expected, true[0])
    if kind == "k1":  # and what it reports is the divergence
        torch.testing.assert_close((policy * output.kl).sum(), (p.exp() * (p - q)).sum().detach())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_entropy_bonus(impl: str) -> None:
    config = PolicyLossConfig(entropy_coef=0.2)
    output, slopes = _loss(impl, [[0.0]], [0, 0], config)
    assert output.loss.item() == pytest.approx(-0.2 * output.entropy[0].item())
    # dH/dz = -p (log p + H), divided by 1 - p as for log-probs, times the bonus, per token
    slope = 0.2 * P * (LOGP + output.entropy[0].item()) / (1 - P) / 2
    assert slopes == pytest.approx([slope, slope])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_truncated_rollout_weight(impl: str) -> None:
    config = PolicyLossConfig(rollout_is_cap=2.0)
    rollout = [LOGP - math.log(5.0), LOGP - math.log(0.5)]
    for old in ({}, {"old_logprobs": [LOGP, LOGP]}):
        output, slopes = _loss(impl, [[1.0]], [0, 0], config, rollout_logprobs=rollout, **old)
        assert slopes == pytest.approx([-2.0 / 2, -0.5 / 2])
        assert output.loss.item() == pytest.approx(-2.5 / 2)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("mode", "weights"), [("truncate", [0.5, 0.8, 2.0]), ("mask", [0.0, 0.8, 0.0])]
)
def test_bounded_rollout_weights(impl: str, mode: Any, weights: list[float]) -> None:
    config = PolicyLossConfig(rollout_is_cap=2.0, rollout_is_min=0.5, rollout_is_mode=mode)
    rollout = [LOGP - math.log(ratio) for ratio in (0.1, 0.8, 5.0)]
    for old in ({}, {"old_logprobs": [LOGP] * 3}):
        output, slopes = _loss(impl, [[1.0]], [0, 0, 0], config, rollout_logprobs=rollout, **old)
        assert slopes == pytest.approx([-weight / 3 for weight in weights])
        assert output.loss.item() == pytest.approx(-sum(weights) / 3)
        assert output.importance_weights.tolist() == pytest.approx(weights)
        assert output.importance_bounded.tolist() == [True, False, True]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_given_weights_leave_kl_and_supervised_tokens_alone(impl: str) -> None:
    config = PolicyLossConfig(kl_coef=0.1, kl_estimator="k2")
    arguments = {
        "importance_weights": [3.0, 0.0, 7.0],
        "ref_logprobs": [LOGP + 0.5] * 3,
        "token_objectives": [-1, -1, 0],
    }
    output, slopes = _loss(impl, [[2.0]], [0, 0, 0], config, **arguments)
    assert output.loss.item() == pytest.approx(-(3 * 2 + LOGP) / 3 + 0.1 * 0.125)
    assert slopes == pytest.approx([-3 * 2 / 3 - 0.025, -0.025, -1 / 3])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_log_ratios_are_clamped(impl: str) -> None:
    wide = PolicyLossConfig(clip_low=1.0, clip_high=1e12)
    output, slopes = _loss(impl, [[1.0]], [0], wide, old_logprobs=[LOGP - 50.0])
    assert output.loss.item() == pytest.approx(-math.exp(20))
    assert slopes == [0.0]
    k3 = PolicyLossConfig(kl_coef=1.0)
    output, slopes = _loss(impl, [[0.0]], [0], k3, ref_logprobs=[LOGP + 500.0])
    assert output.kl.tolist() == pytest.approx([math.exp(20) - 21])
    assert slopes == [0.0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_given_denominators_are_used_and_never_below_one(impl: str) -> None:
    config = PolicyLossConfig(entropy_coef=0.2)
    arguments = {"denominators": [8.0, 0.25], "kl_denominator": 0.0}
    output, _ = _loss(impl, [[1.0, 1.0]], [0, 0], config, **arguments)
    assert output.objective_losses.tolist() == pytest.approx([-2 / 8, -2.0])
    expected = (-2 / 8 - 2) / 2 - 0.2 * 2 * output.entropy[0].item()
    assert output.loss.item() == pytest.approx(expected)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss_type", ["clip", "cispo"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("kl_estimator", ["k2", "k3"])  # k1's value is not what it descends
def test_gradient_agrees_with_finite_differences(
    impl: str, loss_type: Any, ratio_level: Any, kl_estimator: Any
) -> None:
    # cispo's ratio is a constant to its gradient, which finite differences cannot know: checked
    # on-policy, where it is 1. Likewise the rollout weight, which only depends on old log-probs.
    batch = random_batch(
        3,
        n=9,
        h=3,
        v=5,
        s=3,
        bias=True,
        old=loss_type == "clip",
        rollout=loss_type == "clip",
        ref=True,
        loss_type=loss_type,
        ratio_level=ratio_level,
        kl_coef=0.3,
        kl_estimator=kl_estimator,
        entropy_coef=0.1,
        temperature=0.8,
        logit_softcap=4.0,
    )
    names = ("hidden", "weight", "bias")
    leaves = [batch.tensors[name].clone().requires_grad_() for name in names]

    def loss(*operands: torch.Tensor) -> torch.Tensor:
        arguments = batch.tensors | dict(zip(names, operands, strict=True))
        return fused_linear_policy_loss(**arguments, config=batch.config, impl=impl).loss

    assert torch.autograd.gradcheck(loss, leaves)
