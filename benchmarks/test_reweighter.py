"""One update of the objective weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recap_fast import RecapReweighter, make_reweighter

WINDOW, TEMPERATURE = 10, 5.0
OBJECTIVES = {"small": [4], "cpu": [4, 32], "gpu": [4, 32]}
METHODS = ("dwa", "scale_invariant", "famo")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    counts = OBJECTIVES[metafunc.config.getoption("--shapes")]
    metafunc.parametrize("size", counts, ids=lambda k: f"K={k}")


def values_of_steps(k: int, steps: int) -> np.ndarray:
    """Losses [steps, K] that fall at different paces."""
    random = np.random.default_rng(0)
    falling = np.exp(-np.arange(steps)[:, None] / np.linspace(5, 50, k))
    return falling + 0.1 * random.random((steps, k)) + 0.1


def exact_weights(values: np.ndarray) -> np.ndarray:
    """RECAP's Algorithm 2 in float64 from the last 2W values of K losses."""
    older, newer = values[-2 * WINDOW : -WINDOW], values[-WINDOW:]
    both = values[-2 * WINDOW :]
    rate = np.minimum(older.mean(0) / newer.mean(0), 10.0)
    instability = both.std(0, ddof=1) / (older.mean(0) + newer.mean(0))
    shares = np.exp((rate + instability) / TEMPERATURE)
    return len(shares) * shares / shares.sum()


def as_called(reweighter: Any, values: Tensor) -> Callable[[], Tensor]:
    """update() from Python: on CUDA its time is the host's, unless the queue is full."""
    return lambda: reweighter.update(values)


def as_graph(reweighter: Any, values: Tensor) -> Callable[[], Tensor]:
    """The device's own time: update() captured in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights = reweighter.update(values)

    def replay() -> Tensor:
        graph.replay()
        return weights

    return replay


WAYS: dict[str, tuple[str, Callable[[Any, Tensor], Callable[[], Tensor]], str | None]] = {
    "recap-fast recap": ("recap", as_called, None),
    "recap-fast recap, CUDA graph": ("recap", as_graph, "cuda"),
    **{f"recap-fast {name}": (name, as_called, None) for name in METHODS},
}


@pytest.mark.parametrize("implementation", WAYS, ids=str)
def test_reweighter(
    implementation: str,
    size: int,
    benchmark: Any,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    method, prepare, needed = WAYS[implementation]
    if needed not in (None, device.type):
        pytest.skip(f"needs {needed}, this is {device.type}")
    history = values_of_steps(size, 3 * WINDOW)
    reweighter = make_reweighter(method, size, device=device)
    for row in torch.tensor(history, dtype=torch.float32, device=device):
        weights = reweighter.update(row)
    if isinstance(reweighter, RecapReweighter):
        error = float(np.abs(weights.double().cpu().numpy() - exact_weights(history)).max())
        assert error <= 1e-5, f"weights are off by {error:.1e}"
        benchmark.extra_info["error_weights"] = error
    step = prepare(reweighter, torch.tensor(history[-1], dtype=torch.float32, device=device))
    benchmark.group = f"reweighter K={size}"
    benchmark.pedantic(
        step, rounds=10 * request.config.getoption("--rounds"), iterations=100, warmup_rounds=2
    )
    benchmark.extra_info.update(suite="reweighter", implementation=implementation, size=f"K={size}")
