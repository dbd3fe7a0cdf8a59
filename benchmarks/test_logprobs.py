"""Differentiable per-token log-probs: from hidden states, and from logits that exist already."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.inputs import Shape, relative_error
from benchmarks.measuring import median_seconds
from benchmarks.peers import LOGPROBS, Implementation

LOGITS = {"small": (256, 4096), "cpu": (2048, 49152), "gpu": (8192, 151936)}
"""[N, V] by the word given to --shapes."""


@pytest.mark.parametrize("implementation", LOGPROBS, ids=str)
def test_linear_logprobs(implementation: Implementation, measure_loss: Callable[..., None]) -> None:
    measure_loss(implementation, "logprobs")


def ours(logits: Tensor, targets: Tensor, impl: str) -> Tensor:
    from recap_fast import selective_logprobs

    return selective_logprobs(logits, targets, impl=impl)[0]


def eager(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def trl(logits: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    # The one call that gives what ours gives; row by row on a CPU, a Triton kernel on CUDA.
    return selective_log_softmax_and_entropy(logits, targets)[0]


SELECTIVE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str | None]] = {
    "recap-fast torch": (partial(ours, impl="torch"), None),
    "recap-fast triton": (partial(ours, impl="triton"), "cuda"),
    "eager torch": (eager, None),
    "torch.compile": (torch.compile(eager, dynamic=False), None),
    "TRL selective_log_softmax": (trl, None),
}


def traffic(logits: Tensor) -> Callable[[], None]:
    """The floor: logits read in the forward pass, and read and written in the backward pass."""
    gradient = torch.empty_like(logits)

    def step() -> None:
        logits.amax()
        torch.neg(logits, out=gradient)

    return step


@pytest.mark.parametrize("implementation", SELECTIVE, ids=str)
def test_selective_logprobs(
    implementation: str, benchmark: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    function, needed = SELECTIVE[implementation]
    if needed not in (None, device.type):
        pytest.skip(f"needs {needed}, this is {device.type}")
    if implementation.startswith("TRL"):
        pytest.importorskip("trl")
    n, v = LOGITS[request.config.getoption("--shapes")]
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(n, v, generator=generator, device=device).bfloat16().requires_grad_()
    targets = torch.randint(v, (n,), generator=generator, device=device)

    def step() -> Tensor:
        logprobs = function(logits, targets)
        logprobs.float().mean().backward()
        return logprobs.detach()

    found = check(step(), logits, targets)
    logits.grad = None
    floor = median_seconds(traffic(logits.detach()), device)
    size = str(Shape(1, n, 1, v)).replace(" H=1", "")
    benchmark.group = f"selective_logprobs {size}"
    benchmark.pedantic(
        step,
        setup=lambda: setattr(logits, "grad", None),
        rounds=request.config.getoption("--rounds"),
        warmup_rounds=1,
    )
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        found,
        suite="selective_logprobs",
        implementation=implementation,
        size=size,
        percent_of_floor=100 * floor / seconds,
        floor="logits read twice and written once",
        gigabytes_per_second=3 * logits.nbytes / seconds / 1e9,
    )


def check(logprobs: Tensor, logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Errors against float64, 512 rows at a time; fails past bfloat16's resolution."""
    assert logits.grad is not None
    truth, gradient = [], 0.0
    scale = 0.0
    for start in range(0, len(targets), 512):
        rows = slice(start, start + 512)
        exact = torch.log_softmax(logits.detach()[rows].double(), -1)
        truth.append(exact.gather(1, targets[rows, None])[:, 0])
        wanted = exact.exp_().neg_().scatter_add_(
            1, targets[rows, None], torch.ones_like(truth[-1])[:, None]
        ).div_(len(targets))  # fmt: skip
        gradient += float((logits.grad[rows].double() - wanted).square().sum())
        scale += float(wanted.square().sum())
    found = {
        "error_logprobs": relative_error(logprobs, torch.cat(truth)),
        "error_logits": (gradient / scale) ** 0.5,
    }
    limit = torch.finfo(torch.bfloat16).eps
    assert all(error <= limit for error in found.values()), (found, limit)
    return found
