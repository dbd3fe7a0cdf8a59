"""TRL's, Liger's and verl's own head or loss, and ours in its place: in turns, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks.inputs import Shape
from benchmarks.integrations import (
    CASES,
    HEADS,
    Case,
    Measured,
    describe,
    measure_heads,
    measure_implementations,
)
from benchmarks.measuring import Replay
from benchmarks.peers import LIGER_LOSSES, VERL_HEADS
from benchmarks.verl_heads import find_python, measure_in_its_environment

CLOCK = Replay()
pytestmark = pytest.mark.benchmark(timer=CLOCK.read)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        sizes = CASES[metafunc.config.getoption("--shapes")]
        metafunc.parametrize("size", sizes, ids=str)


@pytest.fixture(scope="module")
def once() -> Callable[[Any, Callable[[], Any]], Any]:
    """Gives by key what a function returned when that key was first asked for.

    The implementations of a comparison are measured together, whichever test comes first.
    """
    found: dict[Any, Any] = {}

    def ask(key: Any, function: Callable[[], Any]) -> Any:
        if key not in found:
            found[key] = function()
        return found[key]

    return ask


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--rounds")


def note(benchmark: Any, suite: str, size: object, name: str, found: Measured, **more: Any) -> None:
    benchmark.group = f"{suite} {size}"
    CLOCK.play(benchmark, found.seconds)
    benchmark.extra_info.update(
        describe(found), suite=suite, size=str(size), implementation=name, **more
    )


def compare_heads(
    suite: str, size: Case, name: str, device: torch.device, rounds: int, once: Any, benchmark: Any
) -> None:
    pytest.importorskip("trl")
    measured = once((suite, size), lambda: measure_heads(suite, size, device, rounds))
    note(benchmark, suite, size, name, measured[name], workload=asdict(size))


@pytest.mark.parametrize("implementation", HEADS)
def test_trl_step(
    size: Case, implementation: str, device: torch.device, rounds: int, once: Any, benchmark: Any
) -> None:
    compare_heads("trl_step", size, implementation, device, rounds, once, benchmark)


@pytest.mark.parametrize("implementation", HEADS)
def test_trl_head(
    size: Case, implementation: str, device: torch.device, rounds: int, once: Any, benchmark: Any
) -> None:
    compare_heads("trl_head", size, implementation, device, rounds, once, benchmark)


@pytest.mark.parametrize("implementation", [i.name for i in LIGER_LOSSES])
def test_liger_loss(
    shape: Shape, implementation: str, device: torch.device, rounds: int, once: Any, benchmark: Any
) -> None:
    pytest.importorskip("liger_kernel")
    measured = once(
        ("liger_loss", shape),
        lambda: measure_implementations("liger_loss", LIGER_LOSSES, shape, device, rounds),
    )
    note(benchmark, "liger_loss", shape, implementation, measured[implementation])


@pytest.mark.parametrize("implementation", [i.name for i in VERL_HEADS])
def test_verl_head(
    shape: Shape, implementation: str, rounds: int, once: Any, benchmark: Any
) -> None:
    python = find_python()
    if python is None:
        pytest.skip("verl is not installed, and tools/verl_env.sh has not made its environment")
    measured, versions = once(
        ("verl_head", shape), lambda: measure_in_its_environment(python, shape, rounds)
    )
    note(benchmark, "verl_head", shape, implementation, measured[implementation], versions=versions)
