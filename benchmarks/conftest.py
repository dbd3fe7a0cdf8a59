"""Options, fixtures and records of the benchmark suites.

A suite's test checks the result against float64 first and only then times it. Implementations that
are absent, or whose result is wrong, end as skips with their reason; the reasons go into the JSON
beside the times. Our own implementations fail instead: a wrong result of ours is a bug.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from typing import Any

import pytest
import torch

from benchmarks.inputs import SHAPES, Inputs, Shape, Truth, compute_truth, errors
from benchmarks.measuring import (
    describe_device,
    device_timer,
    median_seconds,
    peak_mib,
    pick_device,
    provenance,
)
from benchmarks.peers import EAGER, FLOOR, FLOORS, POLICY_LOSSES, Implementation

WRONG = 10.0
"""Multiple of eager torch's error past which a result is not the same computation, unless it is
within the resolution of the operands' dtype: some peers return log-probs in bfloat16."""

DEVICE = pick_device()
_outcomes: list[dict[str, Any]] = []
_measured: set[str] = set()
_started = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", choices=tuple(SHAPES), default="small")
    parser.addoption("--rounds", type=int, default=5, help="timed rounds of each implementation")
    parser.addoption(
        "--deadline", type=float, default=float("inf"), help="seconds after which no test starts"
    )
    parser.addoption("--command", help="what the JSON names as the command that made it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every shape of the chosen size, one after the other."""
    if "shape" in metafunc.fixturenames:
        shapes = SHAPES[metafunc.config.getoption("--shapes")]
        metafunc.parametrize("shape", shapes, ids=str, scope="module")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # pytest-benchmark takes its timer from a mark; a suite may have one of its own.
        if item.get_closest_marker("benchmark") is None:
            item.add_marker(pytest.mark.benchmark(timer=device_timer(DEVICE)))
        item.add_marker(pytest.mark.timeout(900))


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline, group = item.config.getoption("--deadline"), _group_of(item)
    # What is measured in turns is measured with the first of its group.
    is_at_hand = group in _measured and "once" in getattr(item, "fixturenames", ())
    if not is_at_hand and time.monotonic() - _started > deadline:
        pytest.skip(f"not started: the {deadline:.0f} s of --deadline were over")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Turns a peer's exception into a skip, and notes every outcome without a time."""
    report = yield
    implementation = getattr(item, "callspec", None) and item.callspec.params.get("implementation")
    name = str(implementation or item.name)
    is_peer = not name.startswith(("recap-fast", FLOOR))
    if report.failed and is_peer and call.excinfo is not None:
        text = str(call.excinfo.value).strip().split("\n")[0]
        reason = f"failed: {call.excinfo.typename}: {text[:200]}"
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {reason}")
    if report.when == "call" and report.passed:
        _measured.add(_group_of(item))
    if report.skipped or report.failed:
        _outcomes.append(
            {
                "group": _group_of(item),
                "implementation": name,
                "reason": _reason(report),
                "failed": report.failed,
            }
        )
    return report


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    lines = str(report.longrepr).strip().splitlines()
    return next((line[2:].strip() for line in lines if line.startswith("E ")), lines[-1])


def _group_of(item: pytest.Item) -> str:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    suite = item.path.stem.removeprefix("test_")
    of = getattr(item, "originalname", "")
    size = " ".join(str(v) for k, v in params.items() if k in ("shape", "size"))
    return f"{_GROUP_NAMES.get(of, suite)} {size}".strip()


_GROUP_NAMES = {
    f"test_{name}": name
    for name in ("selective_logprobs", "trl_step", "trl_head", "liger_loss", "verl_head")
}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    """Adds what is not a time, and drops what names this machine rather than its kind."""
    output_json["machine_info"].pop("node", None)
    for record in output_json["benchmarks"]:
        record["params"] = {name: str(value) for name, value in record["params"].items()}
    command = config.getoption("--command") or "python -m pytest " + " ".join(sys.argv[1:])
    output_json["recap_fast"] = provenance(DEVICE, command)
    output_json["not_measured"] = _outcomes


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


class LossLab:
    """Operands, truth, eager torch's errors and the floors' times of one shape."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.inputs = Inputs.random(shape, device)
        self._floors: dict[str, float] = {}
        self._truths: dict[bool, Truth] = {}

    def truth(self, is_cross_entropy: bool) -> Truth:
        if is_cross_entropy not in self._truths:
            self._truths[is_cross_entropy] = compute_truth(self._operands(is_cross_entropy))
        return self._truths[is_cross_entropy]

    def _operands(self, is_cross_entropy: bool) -> Inputs:
        return self.inputs.with_unit_advantages() if is_cross_entropy else self.inputs

    def build(self, implementation: Implementation) -> Callable[[], torch.Tensor | None]:
        self.inputs.clear()
        gc.collect()  # what a peer that ran out of memory still holds
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return implementation.build(self._operands(implementation.is_cross_entropy))

    def check(
        self, implementation: Implementation, step: Callable[[], torch.Tensor | None]
    ) -> dict[str, float]:
        """Runs the step once and returns its errors. Fails or skips where they are too large."""
        logprobs = step()
        found = errors(self.inputs, logprobs, self.truth(implementation.is_cross_entropy))
        resolution = torch.finfo(getattr(torch, self.shape.dtype)).eps
        for name, bound in self.eager_errors.items():
            error = found.get(name)
            if error is not None and not error <= max(WRONG * bound, resolution):
                text = f"wrong: {name} is {error:.1e}, eager torch has {bound:.1e}"
                (pytest.fail if implementation.kind == "ours" else pytest.skip)(text)
        return found

    @cached_property
    def eager_errors(self) -> dict[str, float]:
        """Of eager torch in the operands' dtype, on at most 8192 tokens, which it can hold.

        Relative errors hardly depend on the number of tokens.
        """
        sequences = max(1, min(self.shape.sequences, 8192 // self.shape.length))
        part = Inputs(
            self.inputs.hidden.detach()[:sequences].requires_grad_(),
            self.inputs.weight.detach().requires_grad_(),
            self.inputs.targets[:sequences],
            self.inputs.advantages[:sequences],
        )
        eager = next(i for i in POLICY_LOSSES if i.name == EAGER)
        return errors(part, eager.build(part)(), compute_truth(part))

    def floor_seconds(self, name: str) -> float:
        """Measured once, whichever test asks first."""
        if name not in self._floors:
            floor = next(i for i in FLOORS if i.name == name)
            reason = floor.why_absent(self.device, self.shape.dtype)
            assert reason is None, reason
            self._floors[name] = median_seconds(self.build(floor), self.device)
            self.inputs.clear()
        return self._floors[name]

    def note_floor(self, name: str, seconds: float) -> None:
        """Takes over the time that the floor's own benchmark has found."""
        self._floors[name] = seconds


@pytest.fixture(scope="module")
def lab(shape: Shape, device: torch.device) -> Iterator[LossLab]:
    yield LossLab(shape, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def measure_loss(
    lab: LossLab, benchmark: Any, request: pytest.FixtureRequest
) -> Callable[[Implementation, str], None]:
    """Checks, times and describes one implementation of the loss or of log-probs."""

    def measure(implementation: Implementation, suite: str) -> None:
        shape, device = lab.shape, lab.device
        reason = implementation.why_absent(device, shape.dtype)
        if reason is not None:
            pytest.skip(reason)
        floor = None
        if implementation.kind != "floor":
            floor = lab.floor_seconds(implementation.floor)
        step = lab.build(implementation)
        found = {} if implementation.kind == "floor" else lab.check(implementation, step)
        peak = None
        if implementation.kind != "floor":
            peak = peak_mib(implementation.name, suite, shape, device)
        rounds = request.config.getoption("--rounds")
        benchmark.group = _group_of(request.node)
        # The floor writes into gradients that are already there.
        setup = None if implementation.kind == "floor" else lab.inputs.clear
        benchmark.pedantic(step, setup=setup, rounds=rounds, warmup_rounds=1)
        seconds = benchmark.stats.stats.median
        if floor is None:
            lab.note_floor(implementation.name, seconds)
            floor = seconds
        benchmark.extra_info.update(
            found,
            suite=suite,
            implementation=implementation.name,
            kind=implementation.kind,
            size=str(shape),
            shape=asdict(shape) | {"tokens": shape.tokens},
            tflops=shape.gemm_flops / seconds / 1e12,
            percent_of_floor=100 * floor / seconds,
            floor=implementation.floor,
            peak_mib=peak,
            device=describe_device(device),
        )

    return measure
