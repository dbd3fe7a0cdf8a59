"""Time and memory of the fused policy loss on a CPU, beside its peers and its GEMM floor.

    python benchmarks/bench_policy_loss.py [--tokens 2048 --hidden 576 --vocab 49152]
        [--dtype both] [--rounds 5] [--json PATH]

Time: one process; every round runs every implementation once, forward and backward; the median
over the rounds is reported, after one round that does not count. Memory: a fresh process for each
implementation; the kernel's high-water mark of resident memory over one step, less what was
resident before it (inputs, and libraries warmed by a step of 16 tokens), less the gradients that
the step leaves behind. Errors: relative root mean square of both gradients against float64; an
implementation more than 10 times as far off as eager torch is reported as wrong and not timed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from peers import EAGER, FLOOR, OURS, STEPS, Inputs, clipped_mean
from rich.console import Console
from rich.table import Table

WRONG = 10.0
"""Multiple of eager torch's error past which a result is not the same computation."""


@dataclass
class Measurement:
    """One implementation in one dtype. None: not measured, for `reason`."""

    name: str
    dtype: str
    milliseconds: float | None = None
    fastest: float | None = None  # ms, over the rounds
    percent_of_floor: float | None = None
    peak_mib: float | None = None
    error_hidden: float | None = None
    error_weight: float | None = None
    reason: str | None = None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--peak-of", choices=tuple(STEPS), help=argparse.SUPPRESS)
    return parser.parse_args()


def make_inputs(arguments: argparse.Namespace, dtype: str, tokens: int | None = None) -> Inputs:
    """The operands of one step."""
    tokens = tokens or arguments.tokens
    return Inputs.random(tokens, arguments.hidden, arguments.vocab, getattr(torch, dtype))


def float64_gradients(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the step in float64 from the same operands, one sequence at a time."""
    weight = inputs.weight.detach().double().requires_grad_()
    b, t, h = inputs.hidden.shape
    d_hidden = torch.empty(b, t, h, dtype=torch.float64)
    for row in range(b):
        hidden = inputs.hidden[row : row + 1].detach().double().requires_grad_()
        logprobs = torch.log_softmax(hidden @ weight.t(), -1)
        picked = logprobs.gather(-1, inputs.targets[row : row + 1, :, None])[..., 0]
        (clipped_mean(picked, inputs.advantages[row : row + 1].double()) / b).backward()
        d_hidden[row] = hidden.grad[0]
    return d_hidden, weight.grad


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth||."""
    return float((got.double() - truth).norm() / truth.norm())


def run(name: str, inputs: Inputs) -> float:
    """Seconds of one step."""
    inputs.hidden.grad = inputs.weight.grad = None
    start = time.perf_counter()
    STEPS[name][0](inputs)
    return time.perf_counter() - start


def check(measurements: list[Measurement], inputs: Inputs) -> None:
    """Fill in errors; this is also the round that does not count."""
    truth = float64_gradients(inputs)
    for m in measurements:
        run(m.name, inputs)
        if m.name != FLOOR:
            m.error_hidden = relative_error(inputs.hidden.grad, truth[0])
            m.error_weight = relative_error(inputs.weight.grad, truth[1])
    reference = next(m for m in measurements if m.name == EAGER)
    for m in measurements:
        for error, bound in (
            (m.error_hidden, reference.error_hidden),
            (m.error_weight, reference.error_weight),
        ):
            if error is not None and bound is not None and not error <= WRONG * bound:
                m.reason = f"wrong: error {error:.1e}, eager torch has {bound:.1e}"


def time_rounds(measurements: list[Measurement], inputs: Inputs, rounds: int) -> None:
    """Fill in times, interleaved, so that a disturbance of the machine meets all alike."""
    seconds: dict[str, list[float]] = {m.name: [] for m in measurements}
    for _ in range(rounds):
        for m in measurements:
            seconds[m.name].append(run(m.name, inputs))
    floor = statistics.median(seconds[FLOOR])
    for m in measurements:
        median = statistics.median(seconds[m.name])
        m.milliseconds, m.fastest = median * 1e3, min(seconds[m.name]) * 1e3
        m.percent_of_floor = 100 * floor / median


def peak_in_this_process(arguments: argparse.Namespace) -> float:
    """MiB that one step needs beyond its inputs and the gradients that it leaves."""
    name = arguments.peak_of
    run(name, make_inputs(arguments, arguments.dtype, tokens=16))
    inputs = make_inputs(arguments, arguments.dtype)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
    run(name, inputs)
    gradients = sum(x.grad.nbytes for x in (inputs.hidden, inputs.weight))
    return (resident("VmHWM") - before - gradients) / 2**20


def resident(key: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status: wanted a line {key}, got none")


def peak_in_new_process(arguments: argparse.Namespace, name: str, dtype: str) -> float | None:
    """The same in a process of its own; None where the system cannot tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    shape = [f"--{key}={getattr(arguments, key)}" for key in ("tokens", "hidden", "vocab")]
    command = [sys.executable, __file__, *shape, f"--dtype={dtype}", f"--peak-of={name}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def measure(arguments: argparse.Namespace, dtype: str) -> list[Measurement]:
    """Everything about one dtype."""
    measurements = [Measurement(name, dtype) for name in STEPS]
    for m in measurements:
        package = STEPS[m.name][1]
        if package is not None and importlib.util.find_spec(package) is None:
            m.reason = f"skipped: {package} is not installed"
    present = [m for m in measurements if m.reason is None]
    for m in present:
        m.peak_mib = peak_in_new_process(arguments, m.name, dtype)
    inputs = make_inputs(arguments, dtype)
    check(present, inputs)
    time_rounds([m for m in present if m.reason is None], inputs, arguments.rounds)
    return measurements


def draw(measurements: list[Measurement], arguments: argparse.Namespace, dtype: str) -> Table:
    """The table of one dtype."""
    shape = f"N={arguments.tokens} H={arguments.hidden} V={arguments.vocab}"
    threads = torch.get_num_threads()
    table = Table(title=f"Policy loss, forward + backward: {dtype}, {shape}, {threads} threads")
    columns = (
        "implementation",
        "ms",
        "fastest",
        "% of floor",
        "x ours",
        "peak MiB",
        "dX err",
        "dW err",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "implementation" else "right")
    ours = next(m for m in measurements if m.name == OURS)
    for m in measurements:
        if m.reason is not None:
            table.add_row(m.name, m.reason)
            continue
        relative = None
        if m.milliseconds is not None and ours.milliseconds is not None:
            relative = m.milliseconds / ours.milliseconds
        values = (m.milliseconds, m.fastest, m.percent_of_floor, relative, m.peak_mib)
        formats = (".0f", ".0f", ".0f", ".2f", ".0f")
        cells = ["-" if v is None else format(v, f) for v, f in zip(values, formats, strict=True)]
        errors = ["-" if e is None else f"{e:.1e}" for e in (m.error_hidden, m.error_weight)]
        table.add_row(m.name, *cells, *errors)
    return table


def provenance() -> dict[str, Any]:
    """What produced the numbers."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("trl", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "versions": versions,
    }


def processor_name() -> str:
    """The processor's name as Linux knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Run the benchmark."""
    arguments = parse_arguments()
    if arguments.peak_of is not None:
        print(peak_in_this_process(arguments))
        return
    dtypes = ("bfloat16", "float32") if arguments.dtype == "both" else (arguments.dtype,)
    results: list[Measurement] = []
    for dtype in dtypes:
        measurements = measure(arguments, dtype)
        Console(width=120).print(draw(measurements, arguments, dtype))
        results += measurements
    if arguments.json is not None:
        record = provenance() | {"results": [asdict(m) for m in results]}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
