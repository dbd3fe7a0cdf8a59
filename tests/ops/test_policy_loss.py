from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from recap_fast.kernels.policy_loss import policy_loss_kernel
from recap_fast.ops import (
    PolicyLossConfig,
    chunked,
    fused_linear_policy_loss,
    group_advantages,
    policy_loss,
)
from recap_fast.ops.arguments import LossArguments
from recap_fast.ops.launch import recording
from tests.no_sync import ForbidHostSync
from tests.ops.batches import Batch, batches, distance, outputs, random_batch

SUMS = ("loss", "objective_losses")
both = pytest.mark.parametrize("impl", ["torch", "triton"])


def _assert_as_exact_as_eager(batch: Batch, dtype: torch.dtype, tiny: float, impl: str) -> None:
    truth = batch.run("reference", torch.float64, rounded=dtype)
    eager = batch.run("reference", dtype)
    if impl == "torch":
        with ForbidHostSync():
            ours = batch.run(impl, dtype)
    else:
        # The interpreter reads its operands on the host, so launches are only recorded there.
        with ForbidHostSync(), recording(lambda _: None):
            batch.run(impl, dtype)
        ours = batch.run(impl, dtype)
    assert ours.keys() == eager.keys()
    for name, exact in truth.items():
        assert ours[name].dtype == eager[name].dtype, name
        # A ratio within rounding of a bound may fall on either side.
        if name in ("clip_fraction", "importance_bounded"):
            continue
        # A gradient of zeros must not pass: its rounding is relative to its size, nearly.
        scale = distance(exact, torch.zeros_like(exact)) + (0.02 if name.startswith("d_") else 1)
        bound = 1.5 * distance(eager[name], exact) + tiny * scale
        assert distance(ours[name], exact) <= bound, name


@settings(max_examples=40, deadline=None)
@given(batches())
def test_agrees_with_the_oracle_in_float64(batch: Batch) -> None:
    expected = batch.run("reference", torch.float64)
    ours = batch.run("torch", torch.float64)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-9, msg=name)


@both
@settings(max_examples=8, deadline=None)
@given(batches(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_error_is_bounded_by_that_of_eager(impl: str, batch: Batch, dtype: torch.dtype) -> None:
    # A weight near a bound may fall on either side: a masked one must be known beforehand.
    assume(batch.config.rollout_is_mode == "truncate" or "old_logprobs" in batch.tensors)
    # On a handful of numbers rounding is a lottery, so a rounding error is allowed on top.
    coarse = torch.bfloat16 in (dtype, getattr(torch, batch.config.logits_dtype))
    tiny = 4e-3 if coarse else 5e-4 if dtype == torch.float16 else 2e-6
    _assert_as_exact_as_eager(batch, dtype, tiny, impl)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("off_policy", [False, True])
@both
def test_error_is_bounded_by_that_of_eager_on_many_tokens(
    impl: str, dtype: torch.dtype, off_policy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", 64 * 1500)
    extra = {"old": True, "ref": True, "kl_coef": 0.1, "entropy_coef": 0.05} if off_policy else {}
    batch = random_batch(n=256, h=64, v=1500, s=16, bias=True, **extra)
    _assert_as_exact_as_eager(batch, dtype, 1e-7, impl)


@pytest.mark.thinned(3)
@both
@pytest.mark.parametrize("frozen", ["weight", "hidden", "bias"])
def test_frozen_operands(impl: str, frozen: str) -> None:
    batch = random_batch(bias=True, entropy_coef=0.1)
    full = batch.run(impl, torch.float32)
    ours = batch.run(impl, torch.float32, **{frozen: batch.tensors[frozen].float()})
    assert f"d_{frozen}" not in ours
    for name, value in ours.items():
        torch.testing.assert_close(value, full[name])


def test_tied_head() -> None:
    batch = random_batch(v=37, h=8)
    tokens = torch.randint(0, 37, (40,))
    gradients = []
    for impl in ("reference", "torch", "triton"):
        tensors = batch.tensors
        if impl == "triton":
            tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        embedding = tensors["weight"].clone().requires_grad_()
        hidden = torch.nn.functional.embedding(tokens, embedding).tanh()
        arguments = tensors | {"hidden": hidden, "weight": embedding}
        fused_linear_policy_loss(**arguments, config=batch.config, impl=impl).loss.backward()
        gradients.append(embedding.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2].double(), gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.thinned(3)
@both
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_master_weights_meet_hidden_in_its_dtype(impl: str, hidden_dtype: torch.dtype) -> None:
    other = torch.float32 if hidden_dtype == torch.bfloat16 else torch.bfloat16
    batch = random_batch(n=64, bias=True)
    hidden = batch.tensors["hidden"].to(hidden_dtype).requires_grad_()
    weight = batch.tensors["weight"].to(other).requires_grad_()
    bias = batch.tensors["bias"].to(other).requires_grad_()
    mixed = batch.run(impl, torch.float32, hidden=hidden, weight=weight, bias=bias)
    assert mixed["d_hidden"].dtype == hidden_dtype
    assert mixed["d_weight"].dtype == mixed["d_bias"].dtype == other
    same = {
        "hidden": hidden.detach().requires_grad_(),
        "weight": weight.detach().to(hidden_dtype).requires_grad_(),
        "bias": bias.detach().to(hidden_dtype).requires_grad_(),
    }
    pure = batch.run(impl, torch.float32, **same)
    assert torch.equal(mixed["d_hidden"], pure["d_hidden"])
    torch.testing.assert_close(mixed["d_weight"].bfloat16(), pure["d_weight"].bfloat16())


@pytest.mark.thinned(3)
@both
@pytest.mark.parametrize("loss_type", ["clip", "cispo"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_on_policy_equals_old_being_the_log_probs(
    impl: str, loss_type: Any, ratio_level: Any
) -> None:
    batch = random_batch(loss_type=loss_type, ratio_level=ratio_level, rollout=True)
    on_policy = batch.run(impl, torch.float32)
    old = batch.run(impl, torch.float32, old_logprobs=on_policy["logprobs"])
    for name, value in on_policy.items():
        torch.testing.assert_close(old[name], value)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_micro_batches_with_global_denominators_sum_to_the_batch(
    aggregation: Any, ratio_level: Any
) -> None:
    batch = random_batch(
        n=60,
        s=6,
        k=2,
        old=True,
        ref=True,
        kl_coef=0.2,
        entropy_coef=0.1,
        aggregation=aggregation,
        ratio_level=ratio_level,
    )
    t = batch.tensors
    whole = batch.run("torch", torch.float64)
    valid = t["targets"] != -100
    policy = valid & (t["token_objectives"] == -1)
    sequence = t["sequence_ids"].long().clamp(min=0)
    applies = torch.stack(
        [
            policy & ~t["advantages"][sequence, k].isnan() | valid & (t["token_objectives"] == k)
            for k in range(2)
        ]
    )

    def count(tokens: torch.Tensor) -> int:
        if aggregation == "token":
            return int(tokens.sum())
        return len(sequence[tokens].unique())

    options = {
        "denominators": torch.tensor([count(a) for a in applies]),
        "kl_denominator": torch.tensor(count(policy)),
    }
    parts = []
    for low, high in ((0, 2), (2, 6)):
        rows = (sequence >= low) & (sequence < high) & valid
        cut = {
            name: value[rows]
            for name, value in t.items()
            if name not in ("weight", "advantages", "objective_weights")
        }
        keep = {name: t[name] for name in ("weight", "advantages", "objective_weights")}
        parts.append(Batch(cut | keep, batch.config).run("torch", torch.float64, **options))
    for name in ("loss", "objective_losses", "d_weight"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])


@both
def test_rewards_become_group_advantages(impl: str) -> None:
    batch = random_batch(rewards=True, s=9)
    expected = group_advantages(batch.tensors["rewards"].float(), batch.tensors["group_ids"])
    got = batch.run(impl, torch.float32)
    assert torch.equal(got["advantages"], expected)
    absent = batch.tensors["rewards"].isnan()
    tensors = dict(batch.tensors)
    del tensors["rewards"], tensors["group_ids"]
    tensors["advantages"] = expected.double().masked_fill(absent, float("nan"))
    again = Batch(tensors, batch.config).run(impl, torch.float32)
    torch.testing.assert_close(again["d_hidden"], got["d_hidden"])


@pytest.mark.thinned(3)
@both
@pytest.mark.parametrize("loss_type", ["clip", "cispo"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("old", [False, True])
def test_importance_weights_are_those_of_the_rollout(
    impl: str, loss_type: Any, ratio_level: Any, old: bool
) -> None:
    """The weight that rollout_is_cap makes of log-probs, given instead."""
    batch = random_batch(
        rollout=True, old=old, ref=True, kl_coef=0.1, entropy_coef=0.1, spread=0.1,
        loss_type=loss_type, ratio_level=ratio_level,
    )  # fmt: skip
    expected = batch.run(impl, torch.float32)
    rollout = batch.tensors.pop("rollout_logprobs")
    before = batch.tensors["old_logprobs"] if old else expected["logprobs"].double()
    batch.tensors["importance_weights"] = (before - rollout).exp().clamp(max=1.1)
    batch.config = replace(batch.config, rollout_is_cap=None)
    got = batch.run(impl, torch.float32)
    for name in ("importance_weights", "importance_bounded"):  # of the log-probs alone
        assert name not in got
        assert expected.pop(name) is not None
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


def _far_from_bounds(**options: Any) -> Batch:
    """Tokens whose rollout weights are 1/e^2, 1/e, 1, e and e^2, and bounds well between those."""
    batch = random_batch(
        n=45, rollout=True, spread=0.0, rollout_is_cap=4.0, rollout_is_min=0.25, **options
    )
    batch.tensors["rollout_logprobs"] -= torch.arange(45).double() % 5 - 2
    return batch


@pytest.mark.thinned(4)
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("old", [False, True])
def test_rollout_weights_outside_the_bounds(impl: str, mode: Any, old: bool) -> None:
    batch = _far_from_bounds(rollout_is_mode=mode, old=old)
    got = batch.run(impl, torch.float32)
    exact = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).exp().repeat(9)
    policy = (batch.tensors["targets"] != -100) & (batch.tensors["token_objectives"] == -1)
    outside = torch.tensor([True, False, False, False, True]).repeat(9)
    bounded = torch.where(outside, 0.0, exact) if mode == "mask" else exact.clamp(0.25, 4.0)
    torch.testing.assert_close(
        got["importance_weights"], torch.where(policy, bounded, 0.0), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(got["importance_bounded"], outside & policy)
    if mode == "mask":
        alone = policy & outside
        assert torch.equal(got["d_hidden"][alone], torch.zeros(int(alone.sum()), 8))


@pytest.mark.thinned(5)
@both
@pytest.mark.parametrize("loss_type", ["clip", "cispo"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("old", [False, True])
def test_bounded_rollout_weights_agree_with_the_oracle(
    impl: str, loss_type: Any, ratio_level: Any, mode: Any, old: bool
) -> None:
    batch = _far_from_bounds(
        rollout_is_mode=mode, old=old, ref=True, kl_coef=0.1, entropy_coef=0.1,
        loss_type=loss_type, ratio_level=ratio_level,
    )  # fmt: skip
    expected = batch.run("reference", torch.float64)
    got = batch.run(impl, torch.float32)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name].to(value.dtype), value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_nan_rollout_logprobs_show_in_the_loss(impl: str, mode: Any) -> None:
    batch = _far_from_bounds(rollout_is_mode=mode, supervised=False)
    batch.tensors["advantages"].nan_to_num_(1.0)
    batch.tensors["rollout_logprobs"][batch.tensors["targets"] != -100] = torch.nan
    assert batch.run(impl, torch.float32)["loss"].isnan()


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_a_weight_on_the_bound_is_within_it(impl: str) -> None:
    batch = random_batch(rollout=True, old=True, rollout_is_cap=1.0, rollout_is_mode="mask")
    batch.tensors["rollout_logprobs"] = batch.tensors["old_logprobs"]
    got = batch.run(impl, torch.float32)
    assert not got["importance_bounded"].any()
    assert set(got["importance_weights"].tolist()) == {0.0, 1.0}  # 0 off policy tokens


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_importance_weights_of_zero_and_nan(impl: str) -> None:
    batch = random_batch(importance=True, supervised=False)
    batch.tensors["advantages"].fill_(1.0)
    batch.tensors["importance_weights"].fill_(0.0)
    batch.tensors["targets"][3], batch.tensors["sequence_ids"][3] = 5, 0
    got = batch.run(impl, torch.float32)
    assert torch.equal(got["loss"], torch.tensor(0.0))
    assert torch.equal(got["d_hidden"], torch.zeros(40, 8))
    batch.tensors["importance_weights"][3] = torch.nan
    assert batch.run(impl, torch.float32)["loss"].isnan()


@pytest.mark.parametrize("case", ["empty", "all ignored", "all absent"])
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_batches_without_a_signal_give_zero(case: str, impl: str) -> None:
    batch = random_batch(n=0 if case == "empty" else 20, bias=True, supervised=False)
    if case == "all ignored":
        batch.tensors["targets"].fill_(-100)
    if case == "all absent":
        batch.tensors["advantages"].fill_(float("nan"))
    got = batch.run(impl, torch.float32)
    assert got["loss"] == 0
    for name in ("d_hidden", "d_weight", "d_bias", "objective_losses"):
        assert torch.equal(got[name], torch.zeros_like(got[name])), name


@pytest.mark.thinned(3)
@both
@pytest.mark.parametrize("by", ["rollout_logprobs", "importance_weights"])
def test_ignored_tokens_may_carry_anything(impl: str, by: str) -> None:
    weighed = {"rollout": True} if by == "rollout_logprobs" else {"importance": True}
    batch = random_batch(old=True, ref=True, kl_coef=0.1, **weighed)
    expected = batch.run(impl, torch.float32)
    ignored = batch.tensors["targets"] == -100
    for name in ("old_logprobs", "ref_logprobs", by):
        batch.tensors[name][ignored | (batch.tensors["token_objectives"] >= 0)] = float("nan")
    got = batch.run(impl, torch.float32)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
    rows = torch.zeros(int(ignored.sum()), 8)
    assert torch.equal(got["d_hidden"][ignored], rows)


@both
def test_extreme_logits_give_no_nan(impl: str) -> None:
    batch = random_batch(n=30, old=True, ref=True, kl_coef=0.1, entropy_coef=0.1, bias=True)
    batch.tensors["hidden"] *= 3e3
    batch.tensors["bias"][3:6] = -float("inf")
    targets = batch.tensors["targets"]
    targets[(targets >= 3) & (targets < 6)] = 0
    for dtype in (torch.float32, torch.bfloat16):
        got = batch.run(impl, dtype)
        for name, value in got.items():
            assert not value.isnan().any(), name


@both
@pytest.mark.parametrize("loss_type", ["clip", "cispo"])
def test_a_forbidden_target_does_not_poison_the_batch(impl: str, loss_type: Any) -> None:
    batch = random_batch(n=12, supervised=False, bias=True, loss_type=loss_type, s=1)
    batch.tensors["sequence_ids"].fill_(0)
    batch.tensors["targets"].fill_(2)
    batch.tensors["targets"][0] = 3
    batch.tensors["bias"][3] = -float("inf")
    batch.tensors["advantages"].fill_(0.0)
    got = batch.run(impl, torch.float32)
    assert got["logprobs"][0] == -float("inf")
    assert got["loss"] == 0
    assert torch.equal(got["d_hidden"], torch.zeros(12, 8))


@both
def test_only_loss_is_differentiable_and_no_grad_callers_get_plain_tensors(impl: str) -> None:
    batch = random_batch(ref=True)
    arguments = batch.tensors | {"hidden": batch.tensors["hidden"].float().requires_grad_()}
    arguments = {
        k: v.float() if v.is_floating_point() and k != "hidden" else v for k, v in arguments.items()
    }
    output = fused_linear_policy_loss(**arguments, impl=impl)
    assert output.loss.requires_grad
    others = [output.objective_losses, output.logprobs, output.entropy, output.kl]
    assert not any(value.requires_grad for value in others)
    with torch.no_grad():
        quiet = fused_linear_policy_loss(**arguments, impl=impl)
    assert not quiet.loss.requires_grad
    for name, value in outputs(quiet).items():
        torch.testing.assert_close(value, outputs(output)[name])


@both
def test_grad_output_repeated_backward_and_double_backward(impl: str) -> None:
    batch = random_batch()
    hidden = batch.tensors["hidden"].float().requires_grad_()
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in batch.tensors.items()} | {
        "hidden": hidden
    }
    loss = fused_linear_policy_loss(**arguments, impl=impl).loss
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    with ForbidHostSync():
        (tripled,) = torch.autograd.grad(3 * loss, hidden)
    torch.testing.assert_close(again, first)
    torch.testing.assert_close(tripled, 3 * first)
    loss = fused_linear_policy_loss(**arguments, impl=impl).loss
    with pytest.raises(RuntimeError, match="fused_linear_policy_loss has no double backward"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@both
def test_results_repeat_bit_for_bit(impl: str) -> None:
    batch = random_batch(rewards=True)
    first, second = (batch.run(impl, torch.float32) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": None}, "exactly one of rewards and advantages, got neither"),
        ({"rewards": torch.zeros(5, 3)}, "exactly one of rewards and advantages, got both"),
        (
            {"advantages": None, "rewards": torch.zeros(5, 3)},
            r"rewards: wanted group_ids \[S\] beside them, got None",
        ),
        ({"advantages": torch.zeros(5)}, r"advantages: wanted shape \[S, K\], got \[5\]"),
        ({"advantages": torch.zeros(5, 0)}, r"at least one sequence and objective, got \[5, 0\]"),
        ({"group_ids": torch.zeros(4).long()}, r"group_ids: wanted shape \[S=5\], got \[4\]"),
        ({"sequence_ids": torch.zeros(40)}, "sequence_ids: wanted dtype int64, int32, got float32"),
        ({"sequence_ids": torch.zeros(39).int()}, r"sequence_ids: wanted shape \[N=40\]"),
        ({"objective_weights": torch.zeros(2)}, r"objective_weights: wanted shape \[K=3\]"),
        ({"denominators": torch.zeros(3, 1)}, r"denominators: wanted shape \[K=3\], got \[3, 1\]"),
        ({"kl_denominator": torch.zeros(3)}, r"kl_denominator: wanted shape \[\], got \[3\]"),
        ({"kl_denominator": "3"}, "kl_denominator: wanted a number .*got str"),
        ({"token_objectives": torch.zeros(40)}, "token_objectives: wanted dtype .*got float32"),
        ({"old_logprobs": torch.zeros(40).half()}, "old_logprobs: wanted dtype .*got float16"),
        ({"ref_logprobs": torch.zeros(2, 20)}, r"ref_logprobs: wanted shape \[N=40\]"),
        ({"hidden": torch.zeros(2, 20, 8)}, r"hidden: wanted shape \[N, H\], got \[2, 20, 8\]"),
        ({"config": PolicyLossConfig(kl_coef=0.1)}, "kl_coef=0.1: wanted ref_logprobs"),
        ({"config": PolicyLossConfig(rollout_is_cap=2.0)}, "rollout_is_cap=2.0: wanted rollout_"),
        (
            {
                "config": PolicyLossConfig(rollout_is_cap=2.0),
                "rollout_logprobs": torch.zeros(40),
                "importance_weights": torch.ones(40),
            },
            "importance_weights: wanted None beside rollout_is_cap=2.0",
        ),
        ({"importance_weights": torch.ones(5)}, r"importance_weights: wanted shape \[N=40\]"),
        ({"impl": "fast"}, "impl: wanted one of .*got 'fast'"),
    ],
)
def test_refuses_bad_arguments(change: dict[str, Any], message: str) -> None:
    batch = random_batch()
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in batch.tensors.items()}
    with pytest.raises(ValueError, match=message):
        fused_linear_policy_loss(**(arguments | change))


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="compute in float32, and the operands are float64"):
        random_batch().run("triton", torch.float64)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="run on CUDA, and the tensors are on cpu"):
        random_batch().run("triton", torch.float32)
    random_batch().run("auto", torch.float32)


@both
@pytest.mark.parametrize("loss_type", ["clip", "cispo"])
def test_extreme_ratios(impl: str, loss_type: Any) -> None:
    batch = random_batch(
        n=40, supervised=False, old=True, ref=True, rollout=True, kl_coef=0.1, loss_type=loss_type
    )
    far = torch.tensor([0.0, 19.0, 21.0, -19.0, -21.0, 90.0, -90.0, 1e4]).double()
    far = far.repeat(5)
    for name, sign in (("old_logprobs", 1), ("ref_logprobs", -1), ("rollout_logprobs", 1)):
        batch.tensors[name] += sign * far.roll(sign)
    expected = batch.run("reference", torch.float64)
    got = batch.run(impl, torch.float32)
    for name, value in expected.items():
        assert got[name].isfinite().all(), name
        size = distance(value, torch.zeros_like(value))  # gradients reach exp(20)
        assert distance(got[name], value) <= 1e-4 * size + 1e-7, name


@pytest.mark.slow
@pytest.mark.variant
@both
def test_groups_of_128_and_of_one_with_32_objectives(impl: str) -> None:
    batch = random_batch(n=30, s=140, k=32, rewards=True)
    groups = torch.cat([torch.full((128,), 7), torch.arange(100, 112)])
    batch.tensors["group_ids"] = groups[torch.randperm(140)]
    batch.tensors["sequence_ids"] = torch.randint(0, 140, (30,), dtype=torch.int32)
    expected = batch.run("reference", torch.float64)
    got = batch.run(impl, torch.float32)
    for name, value in expected.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-6, msg=name)


def test_many_rewards_become_advantages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(rewards=True, s=9)
    in_kernel = batch.run("triton", torch.float32)
    monkeypatch.setattr(policy_loss, "MAX_REWARDS_IN_KERNEL", 0)
    before = batch.run("triton", torch.float32)
    for name, value in in_kernel.items():
        assert torch.equal(before[name], value), name


def test_equal_rewards_give_no_gradient_at_all() -> None:
    # 0.1 has no exact mean in float32: a wrong rounding would be divided by a std of 1e-8.
    batch = random_batch(n=30, s=6, rewards=True, supervised=False)
    batch.tensors["rewards"].fill_(0.1)
    got = batch.run("triton", torch.float32)
    assert torch.equal(got["advantages"], torch.zeros(6, 3))
    assert torch.equal(got["d_hidden"], torch.zeros(30, 8))


def test_what_varies_from_step_to_step_is_no_constant_of_the_kernel() -> None:
    parameters = inspect.signature(policy_loss_kernel.fn).parameters
    fixed = {name for name, p in parameters.items() if "constexpr" in str(p.annotation)}
    varying = {
        "size", "num_sequences", "num_objectives", "inverse_temperature", "lower", "upper",
        "unclipped_bound", "rollout_min", "rollout_cap", "kl_coef", "entropy_coef", "softcap",
    }  # fmt: skip
    assert varying <= set(parameters) - fixed
    assert all(name.isupper() for name in fixed)


def test_kernels_have_no_atomics() -> None:
    for path in (Path(__file__).parents[2] / "kernels").glob("*.py"):
        assert "atomic" not in path.read_text(), path


@pytest.mark.thinned(5)
@both
@pytest.mark.parametrize(
    "name",
    ["objective_weights", "advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs"],
)
def test_what_the_loss_compares_with_may_require_a_gradient(impl: str, name: str) -> None:
    batch = random_batch(old=True, ref=True, rollout=True, kl_coef=0.1)
    expected = batch.run(impl, torch.float32)
    learnt = batch.tensors[name].float().requires_grad_()
    got = batch.run(impl, torch.float32, **{name: learnt})
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)
    assert learnt.grad is None


@pytest.mark.thinned(2)
@pytest.mark.parametrize("target", [-1, 37, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_outside_the_vocabulary_harms_its_own_row_only(
    target: int, dtype: torch.dtype
) -> None:
    batch = random_batch(n=12, supervised=False)
    expected = batch.run("triton", dtype)
    row = int((batch.tensors["targets"] != -100).nonzero()[3])
    batch.tensors["targets"][row] = target
    got = batch.run("triton", dtype)
    assert got["logprobs"][row].isnan()
    assert got["loss"].isnan()
    others = torch.arange(12) != row
    assert torch.equal(got["logprobs"][others], expected["logprobs"][others])
    assert torch.equal(got["d_hidden"][others], expected["d_hidden"][others])


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_nan_shows_in_the_loss(impl: str) -> None:
    batch = random_batch(supervised=False)
    row = int((batch.tensors["targets"] != -100).nonzero()[0])
    batch.tensors["hidden"][row] = float("nan")
    batch.tensors["advantages"].nan_to_num_(1.0)
    assert batch.run(impl, torch.float32)["loss"].isnan()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("old", [False, True])
def test_k1_reports_its_own_value_and_descends_as_k2(impl: str, old: bool) -> None:
    dtype = torch.float32 if impl == "triton" else torch.float64
    options = {"ref": True, "old": old, "kl_coef": 0.3, "spread": 1.0, "bias": True}
    k1, k2 = (random_batch(kl_estimator=kind, **options) for kind in ("k1", "k2"))
    got, expected = k1.run(impl, dtype), k2.run(impl, dtype)
    for name in ("d_hidden", "d_weight", "d_bias", "objective_losses"):
        torch.testing.assert_close(got[name], expected[name], msg=name)
    policy = (k1.tensors["targets"] != -100) & (k1.tensors["token_objectives"] == -1)
    difference = k1.tensors["ref_logprobs"].float().to(dtype) - got["logprobs"]
    torch.testing.assert_close(got["kl"], torch.where(policy, -difference, 0.0))
    assert not torch.allclose(got["loss"], expected["loss"])


@pytest.mark.thinned(4)
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("wrong", [-2, -100, 3, 100])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_an_objective_that_does_not_exist_is_refused(
    impl: str, wrong: int, dtype: torch.dtype
) -> None:
    batch = random_batch()
    objectives = batch.tensors["token_objectives"].to(dtype)
    objectives[batch.tensors["targets"] == -100] = wrong  # padding may carry anything
    batch.run(impl, torch.float32, token_objectives=objectives)
    objectives[int((batch.tensors["targets"] != -100).nonzero()[2])] = wrong
    message = rf"token_objectives: wanted -1, or an objective in \[0, 3\), got {wrong}$"
    with pytest.raises(ValueError, match=message):
        batch.run(impl, torch.float32, token_objectives=objectives)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("weights", [None, torch.zeros(3), torch.tensor([2, 1, 0])])
def test_where_looking_would_wait_such_an_objective_makes_the_loss_nan(
    impl: str, weights: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossArguments, "check_values", lambda self: None)  # as on a GPU
    batch = random_batch()
    counted = batch.tensors["targets"] != -100
    objectives = torch.full((40,), 7)  # not a single token of an objective that there is
    for some in (objectives, torch.where(torch.arange(40) == int(counted.nonzero()[2]), 7, -1)):
        got = batch.run(impl, torch.float32, token_objectives=some, objective_weights=weights)
        assert got["loss"].isnan()
    assert got["d_hidden"].isnan().any()  # a trainer that looks at gradients only sees it too
