"""No host sync in a whole optimizer step; loss and reweighter in one CUDA graph equal to eager."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measuring import pick_device
from benchmarks.on_gpu.part import Context
from benchmarks.training_step import WORKLOADS, recap_step
from recap_fast import RecapReweighter, fused_linear_policy_loss
from recap_fast.training import optimization

IMPLEMENTATIONS = ("torch", "triton")
TOKENS, HIDDEN, VOCAB, SEQUENCES, OBJECTIVES, WINDOW = 192, 64, 1000, 8, 3, 2


def run(context: Context) -> dict[str, Any]:
    """Each check's outcome by implementation.

    Raises:
        RuntimeError: a check failed; the text holds all outcomes.
    """
    device = pick_device()
    checks = {"no host sync in a step": no_host_sync, "CUDA graph equals eager": graph_is_eager}
    found = {
        f"{name}, {impl}": _outcome(check, impl, device)
        for name, check in checks.items()
        for impl in IMPLEMENTATIONS
    }
    failed = {name: text for name, text in found.items() if text.startswith("failed")}
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(found)} checks failed: {found}")
    return found


def _outcome(check: Callable[[str, torch.device], str], impl: str, device: torch.device) -> str:
    if device.type != "cuda" and (impl == "triton" or check is graph_is_eager):
        return "skipped: needs a CUDA device"
    try:
        return check(impl, device)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"


@contextmanager
def host_syncs_raise(device: torch.device) -> Iterator[None]:
    """torch's own check on CUDA; elsewhere the tests' guard, which knows the same operations."""
    if device.type != "cuda":
        from tests.no_sync import ForbidHostSync

        with ForbidHostSync(device):
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_host_sync(impl: str, device: torch.device) -> str:
    """A PolicyOptimizer step from uploaded batches to updated weights."""
    loss = functools.partial(fused_linear_policy_loss, impl=impl)
    with mock.patch.object(optimization, "fused_linear_policy_loss", loss):
        step, _, _ = recap_step(WORKLOADS["small"], device)
        step()  # kernels are compiled and libraries started outside the region
        with host_syncs_raise(device):
            stats = step()
    norm = stats.grad_norm.item()
    assert norm > 0, f"the step's gradient norm is {norm}"
    return "ok"


class _Captured:
    """The loss with weights from the reweighter, on static operands."""

    def __init__(self, impl: str, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.impl = impl
        self.hidden = normal(TOKENS, HIDDEN).bfloat16().requires_grad_()
        self.weight = (normal(VOCAB, HIDDEN) / HIDDEN**0.5).bfloat16().requires_grad_()
        self.targets = torch.randint(VOCAB, (TOKENS,), generator=generator, device=device)
        self.rewards = normal(SEQUENCES, OBJECTIVES).abs()
        self.sequence_ids = torch.arange(SEQUENCES, device=device).repeat_interleave(
            TOKENS // SEQUENCES, output_size=TOKENS
        )
        self.group_ids = torch.arange(SEQUENCES, device=device) // 4
        self.reweighter = RecapReweighter(
            OBJECTIVES, window=WINDOW, signals="reward", device=device
        )
        for _ in range(2 * WINDOW):
            self.reweighter.update(normal(OBJECTIVES).abs())

    def step(self) -> tuple[Tensor, ...]:
        """Weights, loss and gradients."""
        weights = self.reweighter.update(self.rewards.mean(0))
        output = fused_linear_policy_loss(
            self.hidden,
            self.weight,
            self.targets,
            sequence_ids=self.sequence_ids.int(),
            rewards=self.rewards,
            group_ids=self.group_ids,
            objective_weights=weights,
            impl=self.impl,
        )
        gradients = torch.autograd.grad(output.loss, (self.hidden, self.weight))
        return weights, output.loss.detach(), output.logprobs, *gradients


def graph_is_eager(impl: str, device: torch.device) -> str:
    """Captured once and replayed on two sets of rewards, bitwise equal to eager on the same."""
    case = _Captured(impl, device)
    start = case.reweighter.state_dict()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            case.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = case.step()
    rewards = [case.rewards.clone(), case.rewards.flip(0).square()]
    case.reweighter.load_state_dict(start)
    replayed = []
    for values in rewards:
        case.rewards.copy_(values)
        graph.replay()
        replayed.append([x.clone() for x in static])
    case.reweighter.load_state_dict(start)
    for values, from_graph in zip(rewards, replayed, strict=True):
        case.rewards.copy_(values)
        names = ("weights", "loss", "logprobs", "d_hidden", "d_weight")
        for name, eager, other in zip(names, case.step(), from_graph, strict=True):
            assert torch.equal(eager, other), f"{name} of the graph differs from eager's"
    assert not torch.equal(replayed[0][1], replayed[1][1]), "both rewards give the same loss"
    return "ok"
