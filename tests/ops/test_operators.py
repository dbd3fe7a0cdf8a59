"""The custom operators: their registrations, torch.compile without graph breaks, CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recap_fast.ops import (
    PolicyLossOutput,
    fused_linear_policy_loss,
    group_advantages,
    linear_logprobs,
    linear_token_statistics,
    selective_logprobs,
)
from recap_fast.ops.advantages import _group_advantages
from recap_fast.ops.attach import attach_gradients
from recap_fast.ops.logprobs import (
    _linear_logprobs,
    _linear_logprobs_backward,
    _linear_token_statistics,
    _selective_logprobs,
    _selective_logprobs_backward,
)
from recap_fast.ops.policy_loss import _policy_loss
from tests.ops.batches import Batch, outputs, random_batch

OFF_POLICY = {"old": True, "ref": True, "rollout": True, "kl_coef": 0.1, "entropy_coef": 0.1}
impls = pytest.mark.parametrize("impl", ["torch", "triton"])


def _float32(batch: Batch) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in batch.tensors.items()}


def _operator_arguments(batch: Batch, **given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `fused_linear_policy_loss` hands to the operator."""
    tensors = _float32(batch) | given
    names = [a.name for a in _policy_loss._opoverload._schema.arguments]
    positional = tuple(tensors.get(name) for name in names if not _is_keyword(name))
    keywords = {n: getattr(batch.config, n) for n in names if hasattr(batch.config, n)}
    wanted = {
        "want_hidden": True,
        "want_weight": True,
        "want_bias": tensors.get("bias") is not None,
        "want_objectives": batch.config.entropy_coef == 0,
        "weight_grad_dtype": torch.float32,
    }
    return positional, keywords | wanted


def _is_keyword(name: str) -> bool:
    arguments = _policy_loss._opoverload._schema.arguments
    return next(a.kwarg_only for a in arguments if a.name == name)


@pytest.mark.thinned(7)
@impls
@pytest.mark.parametrize(
    "options",
    [
        {},
        OFF_POLICY | {"bias": True},
        {"rollout": True, "rollout_is_mode": "mask", "rollout_is_min": 0.9},
        {"rewards": True},
        {"importance": True},
    ],
)
def test_policy_loss_operator(impl: str, options: dict[str, Any]) -> None:
    positional, keywords = _operator_arguments(random_batch(**options), loss_scale=torch.ones(()))
    torch.library.opcheck(_policy_loss, positional, keywords | {"impl": impl})


def test_policy_loss_operator_writes_into_a_gradient() -> None:
    batch = random_batch()
    grad = torch.zeros(batch.tensors["weight"].shape)
    positional, keywords = _operator_arguments(batch, weight_grad=grad)
    torch.library.opcheck(_policy_loss, positional, keywords | {"impl": "torch"})


def test_attach_operator() -> None:
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((5, 4), (9, 4), (9,))]
    gradients = [torch.randn_like(leaf) for leaf in leaves]
    for scale in (None, torch.tensor(8.0)):
        torch.library.opcheck(attach_gradients, (torch.ones(()), *leaves, *gradients, scale))


@impls
def test_logprobs_operators(impl: str) -> None:
    hidden, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((6, 4), (9, 4), (9,)))
    targets = torch.tensor([1, 8, -100, 0, 3, 3])
    settings = (0.7, 5.0, impl)
    factors = (torch.randn(6), torch.randn(6))
    for operator in (_linear_logprobs, _linear_token_statistics):
        torch.library.opcheck(operator, (hidden, weight, bias, targets, *settings))
    operands = tuple(x.detach() for x in (hidden, weight, bias))
    torch.library.opcheck(
        _linear_logprobs_backward, (*factors, *operands, targets, *settings, True, True, True)
    )
    logits = torch.randn(6, 9, requires_grad=True)
    torch.library.opcheck(_selective_logprobs, (logits, targets, 0.7, impl))
    torch.library.opcheck(
        _selective_logprobs_backward, (*factors, logits.detach(), targets, 0.7, impl)
    )


@impls
def test_advantages_operator(impl: str) -> None:
    rewards = torch.rand(2, 6).t()
    torch.library.opcheck(_group_advantages, (rewards, torch.arange(6) // 3, "std", 1e-4, impl))


@impls
def test_a_compiled_caller_has_no_graph_break(impl: str) -> None:
    batch = random_batch(bias=True, **OFF_POLICY)
    tensors = _float32(batch)
    weight, bias = tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, PolicyLossOutput]:
        output = fused_linear_policy_loss(
            **(tensors | {"hidden": hidden.tanh(), "weight": weight, "bias": bias}),
            config=batch.config,
            impl=impl,
        )
        return 2 * output.loss, output

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        hidden = tensors["hidden"].clone().requires_grad_()
        loss, output = run(hidden, weight, bias)
        gradients = torch.autograd.grad(loss, [hidden, weight, bias])
        results.append([*outputs(output).values(), *gradients])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager)


@impls
def test_compiled_logprobs_and_advantages(impl: str) -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.tensor([1, 8, -100, 0, 3, 3])

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs, entropy = linear_logprobs(hidden * 2, weight, targets, impl=impl)
        picked, _ = selective_logprobs(hidden @ weight.T, targets, impl=impl)
        advantages = group_advantages(logprobs.detach()[:, None], targets, impl=impl)
        more = linear_token_statistics(hidden, weight, targets, impl=impl)
        factor = more.mean_logits + more.is_top1 - more.log_sum_sq_probs  # of no gradient
        loss = (logprobs + 0.1 * entropy).sum() + (advantages[:, 0] * picked).sum()
        return loss + (factor * (more.logprobs - 0.2 * more.entropy)).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for eager, fast in zip(
        torch.autograd.grad(step(hidden, weight), [hidden, weight]),
        torch.autograd.grad(compiled(hidden, weight), [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(fast, eager)


@pytest.mark.gpu
@impls
def test_a_captured_graph_replays_the_same_numbers(impl: str) -> None:
    from recap_fast import RecapReweighter

    batch = random_batch(n=200, h=64, v=1000, bias=True, **OFF_POLICY)
    tensors = {k: v.cuda() for k, v in _float32(batch).items()}
    hidden = tensors["hidden"].requires_grad_()
    weight = tensors["weight"].requires_grad_()

    def step(reweighter: RecapReweighter, values: Tensor) -> list[Tensor]:
        tensors["objective_weights"] = reweighter.update(values)
        output = fused_linear_policy_loss(**tensors, config=batch.config, impl=impl)
        return [*outputs(output).values(), *torch.autograd.grad(output.loss, [hidden, weight])]

    values = torch.rand(3, device="cuda")
    eager, captured = (RecapReweighter(3, window=2, device="cuda") for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile and allocate outside of the capture
            step(RecapReweighter(3, window=2, device="cuda"), values)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(captured, values)
    for seed in range(6):
        torch.manual_seed(seed)
        values.copy_(torch.rand(3))
        hidden.data.copy_(torch.randn(hidden.shape))
        graph.replay()
        for expected, got in zip(step(eager, values), replayed, strict=True):
            assert torch.equal(got, expected)
