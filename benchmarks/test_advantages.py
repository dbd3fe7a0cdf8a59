"""Group-relative advantages of S rollouts for K objectives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.inputs import relative_error
from recap_fast import group_advantages

GROUP = 8
SIZES = {
    "small": [(64, 4)],
    "cpu": [(64, 1), (512, 8)],
    "gpu": [(64, 1), (512, 8), (4096, 32)],
}
"""(S, K) by the word given to --shapes."""


def trl_formula(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """What TRL's trainer does for its one reward, for K at once; groups of equal size, in order."""
    grouped = rewards.view(-1, GROUP, rewards.shape[1])
    mean = grouped.mean(1).repeat_interleave(GROUP, 0)
    std = grouped.std(1).repeat_interleave(GROUP, 0)
    return (rewards - mean) / (std + 1e-4)


def index_add(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Groups of any size in eager torch, as verl's estimator over a batch."""
    groups = rewards.shape[0] // GROUP
    zeros = rewards.new_zeros(groups, rewards.shape[1])
    mean = zeros.index_add(0, group_ids, rewards).div_(GROUP)[group_ids]
    square = zeros.index_add(0, group_ids, (rewards - mean).square())
    return (rewards - mean) / ((square / (GROUP - 1)).sqrt()[group_ids] + 1e-4)


IMPLEMENTATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str | None]] = {
    "recap-fast (torch)": (partial(group_advantages, impl="torch"), None),
    "recap-fast (triton)": (partial(group_advantages, impl="triton"), "cuda"),
    "eager, equal groups (as TRL)": (trl_formula, None),
    "eager, any groups": (index_add, None),
    "torch.compile, any groups": (torch.compile(index_add, dynamic=False), None),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = SIZES[metafunc.config.getoption("--shapes")]
    metafunc.parametrize("size", sizes, ids=lambda size: f"S={size[0]} K={size[1]}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_advantages(
    implementation: str,
    size: tuple[int, int],
    benchmark: Any,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    function, needed = IMPLEMENTATIONS[implementation]
    if needed not in (None, device.type):
        pytest.skip(f"needs {needed}, this is {device.type}")
    s, k = size
    generator = torch.Generator(device).manual_seed(0)
    rewards = torch.rand(s, k, generator=generator, device=device)
    group_ids = torch.arange(s, device=device) // GROUP
    got = function(rewards, group_ids)
    error = relative_error(got, trl_formula(rewards.double(), group_ids))
    assert error <= 1e-5, f"{implementation}: error {error:.1e} against float64"
    benchmark.group = f"advantages S={s} K={k}"
    benchmark.pedantic(
        function,
        args=(rewards, group_ids),
        rounds=10 * request.config.getoption("--rounds"),
        iterations=20,
        warmup_rounds=2,
    )
    benchmark.extra_info.update(
        suite="advantages",
        implementation=implementation,
        size=f"S={s} K={k}",
        error_advantages=error,
    )
