from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from recap_fast.config import LoraConfig
from recap_fast.model.lora import add_adapters
from recap_fast.model.policy import Policy
from recap_fast.ops import fused_linear_policy_loss, group_advantages, logprobs, policy_loss
from recap_fast.ops.launch import recording
from recap_fast.reweighting.balance import GradientBalance
from recap_fast.reweighting.recap import make_reweighter
from recap_fast.rollout.protocol import iter_weights
from recap_fast.training import optimization
from recap_fast.training.optimization import PolicyOptimizer, combine_stats, learning_rate
from recap_fast.training.packing import PackedUpdate, pack_update
from recap_fast.training.step_metrics import device_metrics
from recap_fast.types import SupervisedRow
from tests.no_sync import ForbidHostSync
from tests.tiny import (
    image_tokens,
    packed_vision_model,
    tiny_config,
    tiny_image,
    tiny_llama,
    tiny_policy,
)
from tests.training.test_packing import make_rows


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path, tmp_path)


def make_update(config, max_tokens: int = 1000, seed: int = 3, **loss) -> PackedUpdate:
    rollouts, advantages, rows = make_rows(seed, 2, 4, 2)
    return pack_update(
        rollouts, advantages, rows, [2, 2],
        config=replace(config.loss, **loss), max_tokens=max_tokens,
    )  # fmt: skip


def parameters(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_host_sync_from_upload_to_the_end_of_the_step(config, dtype):
    policy = tiny_policy(dtype=dtype)
    optimizer = PolicyOptimizer(policy, tiny_policy(seed=1), config)
    update = make_update(config, max_tokens=60, kl_coef=0.1)
    assert len(update.batches) > 1
    before = parameters(policy)
    weights = torch.ones(3)
    with ForbidHostSync():
        stats = optimizer.step(update.to(policy.device), weights, 1e-3)
    assert stats.grad_norm.item() > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters(policy), strict=True))


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Lets "auto" choose on a CPU what it chooses on CUDA."""
    for module in (policy_loss, logprobs):
        monkeypatch.setattr(module, "resolve_impl", lambda *_: "triton")


@pytest.mark.usefixtures("as_on_cuda")
def test_no_host_sync_around_the_kernels(config):
    policy = tiny_policy()
    optimizer = PolicyOptimizer(policy, tiny_policy(seed=1), config)
    update = make_update(config, max_tokens=60, kl_coef=0.1)
    launches = []
    # The interpreter would read its operands on the host: launches are recorded, not run.
    with ForbidHostSync(), recording(launches.append):
        optimizer.step(update.to(policy.device), torch.ones(3), 1e-3)
    names = {launch.kernel.__name__ for launch in launches}
    assert names == {"policy_loss_kernel", "logprobs_kernel"}


def test_kernels_make_the_same_step(config, request):
    # With its usual eps AdamW's first step is lr times a sign: roundings of tiny gradients show.
    optimizer = config.optimizer.model_copy(update={"eps": 1.0})
    config = config.model_copy(update={"optimizer": optimizer})
    results = []
    for kernels in (False, True):
        if kernels:
            request.getfixturevalue("as_on_cuda")
        policy = tiny_policy()
        optimizer = PolicyOptimizer(policy, tiny_policy(seed=1), config)
        update = make_update(config, max_tokens=60, kl_coef=0.1)
        stats = optimizer.step(update, torch.tensor([0.5, 1.5, 1.0]), 1.0)
        results.append([stats.objective_losses, stats.kl, stats.grad_norm, *parameters(policy)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_no_host_sync_on_cuda(config):
    policy = tiny_policy(dtype=torch.bfloat16)
    policy.model.cuda()
    policy = Policy(policy.model, torch.bfloat16)
    optimizer = PolicyOptimizer(policy, None, config)
    weights = torch.ones(3, device="cuda")
    optimizer.step(make_update(config).to(policy.device), weights, 1e-3)  # lazy initialisation
    update = make_update(config, seed=4).to(policy.device)
    torch.cuda.synchronize()
    with ForbidHostSync("cuda"):
        stats = optimizer.step(update, weights, 1e-3)
    assert stats.grad_norm.item() > 0


def test_accumulation_equals_one_batch(config):
    results = []
    for max_tokens in (60, 1000):
        policy = tiny_policy()
        optimizer = PolicyOptimizer(policy, None, config)
        stats = optimizer.step(make_update(config, max_tokens), torch.tensor([0.5, 1.5, 1.0]), 1e-2)
        results.append((stats, parameters(policy)))
    (many, many_parameters), (one, one_parameters) = results
    # An entry whose gradient is near AdamW's eps moves by a part of the learning rate that its
    # rounding decides.
    for name in ("objective_losses", "entropy", "grad_norm", "logprob_diff_mean",
                 "logprob_diff_max", "gradient_norms"):  # fmt: skip
        torch.testing.assert_close(getattr(many, name), getattr(one, name), rtol=1e-4, atol=1e-6)
    for a, b in zip(many_parameters, one_parameters, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
        assert ((a - b).abs() > 1e-4).sum() <= 0.01 * a.numel()


@pytest.mark.parametrize("max_tokens", [60, 10_000])
def test_balance_tells_rewards_that_cancel_apart(config, max_tokens):
    """Rewards of 0 and 1, weighed alike: a rollout that earns one of them alone has no gradient
    where as many of its group do. A pass of few rollouts has little else."""
    optimizer, balance = PolicyOptimizer(tiny_policy(), None, config), GradientBalance(3)
    rng = np.random.default_rng(0)
    for step in range(4):
        rollouts, _, rows = make_rows(step, 8, 8, 2)
        rewards = np.full((64, 3), np.nan, np.float32)
        rewards[:, :2] = rng.random((64, 2)) < 0.5
        groups = torch.tensor([rollout.group for rollout in rollouts])
        advantages = group_advantages(torch.from_numpy(rewards), groups)
        advantages[:, 2] = torch.nan
        update = pack_update(
            rollouts, advantages.numpy(), rows, [2, 2], config=config.loss, max_tokens=max_tokens
        )
        stats = optimizer.step(update, balance.weigh(torch.ones(3)), 0.0)
        assert (stats.gradient_norms > 0).all()
        balance.observe(stats.gradient_norms)
    plain = optimizer.step(update, torch.ones(3), 0.0).gradient_norms
    told = ~plain.isnan()  # by the tie of equal weights some may not be
    torch.testing.assert_close(plain[told], stats.gradient_norms[told], rtol=0.1, atol=0)


def test_clipping_and_step_equal_plain_torch(config):
    """One step equals the reference loss, clip_grad_norm_ and an AdamW without fusion."""
    policy, plain = tiny_policy(), tiny_policy()
    update = make_update(config)
    weights = torch.tensor([0.5, 1.5, 1.0])
    stats = PolicyOptimizer(policy, None, config).step(update, weights, 1e-3)

    batch = update.batches[0]
    loss = fused_linear_policy_loss(
        plain.hidden(batch), plain.head.weight, batch.targets, sequence_ids=batch.sequence_ids,
        advantages=update.advantages, objective_weights=weights,
        token_objectives=batch.token_objectives, denominators=update.denominators,
        config=config.loss, impl="reference",
    ).loss  # fmt: skip
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), config.optimizer.max_grad_norm)
    torch.optim.AdamW(plain.model.parameters(), lr=1e-3, weight_decay=0.0, fused=False).step()
    torch.testing.assert_close(stats.grad_norm, norm, rtol=1e-4, atol=1e-6)
    for ours, expected in zip(parameters(policy), parameters(plain), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("max_tokens", [1000, 60])
def test_the_gradient_of_each_objective_is_measured_alone(config, max_tokens):
    """One backward pass an objective through the reference, and the step after it is as ever."""
    update = make_update(config, max_tokens)
    plain = tiny_policy()
    expected = []
    for k in range(3):
        plain.model.zero_grad()
        for batch in update.batches:
            fused_linear_policy_loss(
                plain.hidden(batch), plain.head.weight, batch.targets,
                sequence_ids=batch.sequence_ids, advantages=update.advantages,
                objective_weights=3 * torch.eye(3)[k], token_objectives=batch.token_objectives,
                denominators=update.denominators, config=config.loss, impl="reference",
            ).loss.backward()  # fmt: skip
        expected.append(torch.nn.utils.get_total_norm([p.grad for p in plain.model.parameters()]))
    measured, other = (PolicyOptimizer(tiny_policy(), None, config) for _ in range(2))
    update_on = update.to(measured.policy.device)
    with ForbidHostSync():
        norms = measured.measure_gradients(update_on)
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-4, atol=1e-6)
    for optimizer in (measured, other):
        optimizer.step(update, torch.ones(3), 1e-3)
    for a, b in zip(parameters(measured.policy), parameters(other.policy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_head_gradient_goes_into_its_buffer(config, monkeypatch, tied, dtype):
    """Summed over passes, it is what autograd sums when the loss hands it over."""
    update = make_update(config, max_tokens=60)
    assert len(update.batches) > 1
    weights = torch.tensor([0.5, 1.5, 1.0])

    def through_autograd(*args, weight_grad, **kwargs):
        return fused_linear_policy_loss(*args, **kwargs)

    gradients = []
    for loss in (fused_linear_policy_loss, through_autograd):
        monkeypatch.setattr(optimization, "fused_linear_policy_loss", loss)
        policy = tiny_policy(tied=tied, dtype=dtype)
        optimizer = PolicyOptimizer(policy, None, config)
        monkeypatch.setattr(optimizer, "_apply", lambda lr, stats: None)
        optimizer.step(update, weights, 1e-3)
        gradients.append({n: p.grad for n, p in policy.model.named_parameters()})
    assert ("lm_head.weight" in gradients[0]) is not tied
    # One float32 sum over all passes here, a bfloat16 product for each pass there.
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for name, ours in gradients[0].items():
        assert (ours - gradients[1][name]).norm() <= tolerance * gradients[1][name].norm(), name


def test_a_frozen_head_gets_no_gradient(config):
    policy = tiny_policy(tied=False)
    policy.head.weight.requires_grad_(False)
    before = policy.head.weight.clone()
    PolicyOptimizer(policy, None, config).step(make_update(config), torch.ones(3), 1e-3)
    assert policy.head.weight.grad is None
    assert torch.equal(policy.head.weight, before)


def test_adapters_have_the_gradients_of_the_weights_that_they_stand_for(config, monkeypatch):
    """With W = W0 + s B A: dA = s B^T dW and dB = s dW A^T, where dW is what a plain model of the
    merged weights has after the same passes."""
    adapted, plain = tiny_policy(tied=False), tiny_policy(tied=False)
    add_adapters(adapted.model, LoraConfig(rank=4, alpha=6), "base")
    adapters = {n: p for n, p in adapted.model.named_parameters() if ".lora_" in n}
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    plain.model.load_state_dict(dict(iter_weights(adapted.model)))
    update = make_update(config, max_tokens=60)
    assert len(update.batches) > 1
    for policy in (adapted, plain):
        optimizer = PolicyOptimizer(policy, None, config)
        monkeypatch.setattr(optimizer, "_apply", lambda lr, stats: None)
        optimizer.step(update, torch.tensor([0.5, 1.5, 1.0]), 1e-3)
    for layer in {name.partition(".lora_")[0] for name in adapters}:
        gradient = plain.model.get_parameter(f"{layer}.weight").grad
        a, b = (adapters[f"{layer}.lora_{side}.default.weight"] for side in "AB")
        torch.testing.assert_close(a.grad, 6 / 4 * b.T @ gradient, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(b.grad, 6 / 4 * gradient @ a.T, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for n, p in adapted.model.named_parameters() if ".lora_" not in n)


def test_gradients_keep_their_buffers(config):
    """From the first step on, whatever the batches; a gradient that was not finite leaves none."""
    policy = tiny_policy()
    optimizer = PolicyOptimizer(policy, None, config)
    places = []
    for seed, weight in ((3, 1.0), (4, math.nan), (5, 1.0)):
        optimizer.step(make_update(config, seed=seed), torch.tensor([weight, 1.0, 1.0]), 1e-3)
        assert all(p.grad.count_nonzero() == 0 for p in optimizer.parameters)
        places.append([p.grad.data_ptr() for p in optimizer.parameters])
    assert places[0] == places[1] == places[2]


def test_trained_tower_rests_while_there_are_no_images(config):
    """Momentum must not move it on, in a run that was resumed meanwhile or was not."""
    model = packed_vision_model("qwen2_5_vl")
    policy = Policy(model, torch.float32)
    tower = list(policy.vision.tower.parameters())
    optimizer = PolicyOptimizer(policy, None, config)
    rng = np.random.default_rng(0)
    row = [5, *image_tokens(image := tiny_image(rng, 2, 2)), 7, 8, 9]
    with_image = [SupervisedRow("replay", 0, row, len(row) - 2, (image,))]
    without = [SupervisedRow("replay", 1, [5, 7, 8, 9], 2)]
    steps = []
    for rows in (with_image, without, with_image):
        update = pack_update(
            [], np.empty((0, 3), np.float32), rows, [2],
            config=config.loss, max_tokens=1000, vision=policy.vision,
        )  # fmt: skip
        before = [p.detach().clone() for p in tower]
        optimizer.step(update, torch.ones(3), 1e-2)
        moved = [not torch.equal(a, b) for a, b in zip(before, tower, strict=True)]
        steps.append((any(moved), optimizer.optimizer.state[tower[0]]["step"].item()))
    assert steps == [(True, 1), (False, 1), (True, 2)]


def test_large_gradients_are_clipped(config):
    policy = tiny_policy()
    update = make_update(config)
    update = replace(update, advantages=update.advantages * 1e4)
    optimizer = PolicyOptimizer(policy, None, config)
    stats = optimizer.step(update, torch.ones(3), 1e-3)
    assert stats.grad_norm.item() > 100
    # exp_avg after one step is (1 - beta1) times the clipped gradient.
    state = [value for key, value in optimizer.named_state() if key.startswith("exp_avg/")]
    total = math.sqrt(sum((value / 0.1).square().sum().item() for value in state))
    assert total == pytest.approx(config.optimizer.max_grad_norm, rel=1e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_gradient_that_is_not_finite_changes_nothing(config, poison):
    policy = tiny_policy()
    optimizer = PolicyOptimizer(policy, None, config)
    optimizer.step(make_update(config), torch.ones(3), 1e-3)
    before = parameters(policy)
    state = {key: value.clone() for key, value in optimizer.named_state()}
    stats = optimizer.step(make_update(config, seed=4), torch.tensor([poison, 1.0, 1.0]), 1e-3)
    assert stats.skipped.item() == 1
    for a, b in zip(before, parameters(policy), strict=True):
        assert torch.equal(a, b)
    for key, value in optimizer.named_state():
        assert torch.equal(value, state[key]), key
    stats = optimizer.step(make_update(config, seed=5), torch.ones(3), 1e-3)
    assert stats.skipped.item() == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters(policy), strict=True))


def test_update_without_gradient_leaves_weights_alone(config):
    rollouts, advantages, _ = make_rows(3, 2, 4, 0)
    update = pack_update(
        rollouts, np.zeros_like(advantages), [], [], config=config.loss, max_tokens=1000
    )
    policy = tiny_policy()
    before = parameters(policy)
    stats = PolicyOptimizer(policy, None, config).step(update, torch.ones(3), 1e-3)
    for name in ("grad_norm", "entropy", "kl", "logprob_diff_mean", "logprob_diff_max"):
        assert getattr(stats, name).isnan(), name  # nothing was measured, and 0 would be a value
    assert stats.clip_fraction.isnan().all()
    assert stats.skipped.item() == 0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(policy), strict=True))


def test_supervised_rows_alone_have_a_gradient_and_no_policy(config):
    _, _, rows = make_rows(3, 2, 4, 3)
    update = pack_update(
        [], np.empty((0, 3), np.float32), rows, [2] * 3, config=config.loss, max_tokens=1000
    )
    stats = PolicyOptimizer(tiny_policy(), None, config).step(update, torch.ones(3), 1e-3)
    assert stats.grad_norm.item() > 0
    assert stats.objective_losses[2].item() > 0
    assert stats.entropy.isnan()
    assert stats.logprob_diff_max.isnan()


def test_updates_without_a_signal_leave_the_means_of_the_others(tmp_path):
    config = tiny_config(tmp_path, tmp_path, "training.updates_per_rollout=2")
    rollouts, advantages, _ = make_rows(3, 2, 4, 0)
    idle = pack_update(
        rollouts, np.zeros_like(advantages), [], [], config=config.loss, max_tokens=1000
    )
    busy = make_update(config)
    optimizer = PolicyOptimizer(tiny_policy(), None, config)
    updates = [idle, busy]
    stats = [optimizer.step(update, torch.ones(3), 0.0) for update in updates]
    both = combine_stats(stats, updates)
    for name in ("grad_norm", "entropy", "logprob_diff_mean", "logprob_diff_max"):
        torch.testing.assert_close(getattr(both, name), getattr(stats[1], name), msg=name)
    torch.testing.assert_close(both.clip_fraction[:2], stats[1].clip_fraction[:2])
    assert both.kl.isnan()
    neither = combine_stats([stats[0]] * 2, [idle] * 2)
    for name in ("grad_norm", "entropy", "kl", "logprob_diff_mean", "logprob_diff_max"):
        assert getattr(neither, name).isnan(), name


def test_mismatch_is_measured_over_policy_tokens(config):
    """The engine's log-probs of make_rows are random; the trainer's are recomputed here."""
    policy = tiny_policy()
    update = make_update(config)
    batch = update.batches[0]
    with torch.no_grad():
        logits = policy.hidden(batch) @ policy.head.weight.T
    logprobs = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    diff = (logprobs - batch.rollout_logprobs).abs()[batch.token_objectives < 0]
    stats = PolicyOptimizer(policy, None, config).step(update, torch.ones(3), 1e-3)
    assert stats.logprob_diff_mean.item() == pytest.approx(diff.mean().item(), rel=1e-4)
    assert stats.logprob_diff_max.item() == pytest.approx(diff.max().item(), rel=1e-4)


def test_reference_enters_the_kl(config, tmp_path):
    with_kl = tiny_config(tmp_path, tmp_path, "loss.kl_coef=0.5", "model.reference=initial")
    policy = tiny_policy()
    update = make_update(config, kl_coef=0.5)
    same = PolicyOptimizer(policy, tiny_policy(), with_kl).step(update, torch.ones(3), 1e-3)
    assert same.kl.item() == pytest.approx(0, abs=1e-5)
    other = PolicyOptimizer(tiny_policy(), tiny_policy(seed=9), with_kl)
    assert other.step(update, torch.ones(3), 1e-3).kl.item() > 0.01


def test_several_updates_use_the_sampled_logprobs(tmp_path):
    """Off-policy, the ratio is exp(trainer - sampled), which make_rows puts far from 1."""
    config = tiny_config(tmp_path, tmp_path, "training.updates_per_rollout=2")
    stats = PolicyOptimizer(tiny_policy(), None, config).step(
        make_update(config), torch.ones(3), 1e-3
    )
    assert stats.clip_fraction[:2].min().item() > 0.1
    assert stats.clip_fraction[2].isnan()  # supervised: there is no ratio


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("max_tokens", [60, 1000])
def test_importance_weights_are_those_of_the_trained_policy(tmp_path, mode, max_tokens):
    """Which is not the one that sampled, in several updates either: nothing is left to clip."""
    config = tiny_config(
        tmp_path, tmp_path, "training.updates_per_rollout=2", "loss.rollout_is_cap=2.0",
        "loss.rollout_is_min=0.5", f"loss.rollout_is_mode={mode}",
    )  # fmt: skip
    policy, update = tiny_policy(), make_update(config, max_tokens)
    ratios = []
    for batch in update.batches:
        with torch.no_grad():
            logits = policy.hidden(batch) @ policy.head.weight.T
        logprobs = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        batch.rollout_logprobs.copy_(logprobs + torch.linspace(-1.5, 1.5, len(logprobs)))
        ratios.append((logprobs - batch.rollout_logprobs)[batch.token_objectives < 0].exp())
    ratio = torch.cat(ratios)
    bounded = (ratio < 0.5) | (ratio > 2)
    weights = ratio.where(~bounded, 0.0) if mode == "mask" else ratio.clamp(0.5, 2.0)
    assert 0 < bounded.sum() < len(ratio)

    optimizer = PolicyOptimizer(policy, None, config)
    lambdas = torch.ones(3)
    with ForbidHostSync():
        stats = optimizer.step(update, lambdas, 0.0)
    sums = [len(ratio), weights.sum(), weights.square().sum(), bounded.sum()]
    torch.testing.assert_close(stats.importance, torch.tensor(sums, dtype=torch.float32))
    assert (stats.clip_fraction[:2] == 0).all()
    both = combine_stats([stats, stats], [update, update])
    found = device_metrics(["a", "b", "c"], make_reweighter("uniform", 3), both)
    assert found["importance/effective_sample_size"] == pytest.approx(
        (weights.sum().square() / weights.square().sum() / len(ratio)).item(), rel=1e-5
    )
    assert found["importance/bounded_fraction"] == pytest.approx(bounded.float().mean().item())
    assert not any(name.startswith("retention/") for name in found)
    retaining = make_reweighter("recap", 3, window=4, retention=1.0)
    for _ in range(4):
        retaining.update(torch.ones(3))
    found = device_metrics(["a", "b", "c"], retaining, both)
    assert [found[f"retention/{name}"] for name in "abc"] == [0, 0, 0]


def test_importance_weights_without_tokens_or_where_all_are_masked(tmp_path):
    settings = ["loss.rollout_is_cap=1e-7", "loss.rollout_is_mode=mask"]
    config = tiny_config(tmp_path, tmp_path, *settings)
    rollouts, advantages, _ = make_rows(3, 2, 4, 0)
    idle = pack_update(
        rollouts, np.zeros_like(advantages), [], [], config=config.loss, max_tokens=1000
    )
    reweighter = make_reweighter("uniform", 3)
    found = []
    for update in (make_update(config), idle):
        stats = PolicyOptimizer(tiny_policy(), None, config).step(update, torch.ones(3), 1e-3)
        metrics = device_metrics(["a", "b", "c"], reweighter, stats)
        found.append([v for name, v in metrics.items() if name.startswith("importance/")])
    assert found[0] == [0.0, 1.0]
    assert all(map(math.isnan, found[1]))


def test_bfloat16_compute_moves_float32_weights_by_tiny_steps(config):
    """At lr 1e-7 an update of bf16 weights would vanish."""
    policy = tiny_policy(dtype=torch.bfloat16)
    before = parameters(policy)
    PolicyOptimizer(policy, None, config).step(make_update(config), torch.ones(3), 1e-7)
    for a, b in zip(before, parameters(policy), strict=True):
        assert b.dtype == torch.float32
        assert not torch.equal(a, b)


def test_state_round_trip_continues_identically(config):
    first, second = tiny_llama(), tiny_llama(seed=5)
    runs = [
        PolicyOptimizer(Policy(model, torch.float32), None, config) for model in (first, second)
    ]
    for model in (first, second):
        model.set_attn_implementation("recap_packed")
    runs[0].step(make_update(config), torch.ones(3), 1e-3)
    second.load_state_dict(first.state_dict())
    runs[1].load_named_state({key: value.clone() for key, value in runs[0].named_state()})
    for run in runs:
        run.step(make_update(config, seed=8), torch.ones(3), 1e-3)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learning_rate_rises_then_falls_linearly():
    rates = [learning_rate(step, 20, 1e-6, 0.1) for step in range(20)]
    assert rates[:3] == pytest.approx([5e-7, 1e-6, 1e-6])
    assert rates[-1] == pytest.approx(1e-6 / 18)
    assert np.allclose(np.diff(rates[2:]), -1e-6 / 18)
