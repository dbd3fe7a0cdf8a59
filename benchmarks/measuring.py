"""How the benchmarks measure time and memory, and what they note about the machine."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import Inputs, Shape
from recap_fast.report.metrics import describe_machine

CLEAR_REFS = Path("/proc/self/clear_refs")


class EventTime:
    """A point in the stream of a CUDA device. The difference of two is in seconds."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: EventTime) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) * 1e-3


def pick_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_timer(device: torch.device) -> Callable[[], Any]:
    """A timer for pytest-benchmark, which only ever subtracts two of its readings.

    On CUDA it records events: the difference is the device's own time between them, free of the
    host's waiting. Both lie in the stream, so work that was queued before the first is not counted.
    """
    return EventTime if device.type == "cuda" else time.perf_counter


def median_seconds(step: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Median over `rounds` after one that does not count."""
    timer = device_timer(device)
    step()
    times = []
    for _ in range(rounds):
        start = timer()
        step()
        times.append(timer() - start)
    return statistics.median(times)


def seconds_in_turns(
    steps: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each step in each of `rounds`, after one that does not count.

    Each round runs every step once, so that what else the machine does meets all of them; the
    order turns round from one to the next.
    """
    timer = device_timer(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            start = timer()
            steps[name]()
            times[name].append(timer() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


class Replay:
    """A timer that shows times taken before: pytest-benchmark itself cannot take turns."""

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        return self._now

    def play(self, benchmark: Any, times: Sequence[float]) -> None:
        """Gives `times` to a benchmark whose timer is `read`."""
        pending = iter(times)

        def advance() -> None:
            self._now += next(pending)

        benchmark.pedantic(advance, rounds=len(times))


def peak_mib(name: str, suite: str, shape: Shape, device: torch.device) -> float | None:
    """MiB that one step needs beyond its operands and the gradients that it leaves.

    On CUDA: torch's own high-water mark. On a CPU: the kernel's mark of resident memory, in a
    process of its own, so that memory which an earlier step left to the allocator counts.
    None where the system cannot tell.
    """
    if device.type == "cuda":
        return _cuda_peak(name, suite, shape, device)
    if not CLEAR_REFS.exists():
        return None
    return in_fresh_process(_resident_peak, name, suite, shape)


def in_fresh_process(
    function: Callable[..., Any], *arguments: Any, preload: Sequence[str] = ()
) -> Any:
    """What `function` returns in a process of its own, with this one's number of threads.

    The first call of a process says which modules its own children find imported: `preload`.
    """
    # Children of a server that has imported torch but never computed start within milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.peers", *preload])
    with context.Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, arguments)


def find_implementation(suite: str, name: str) -> Any:
    """An implementation by the names of its suite and its own."""
    from benchmarks import peers

    suites = {
        "policy_loss": peers.POLICY_LOSSES,
        "logprobs": peers.LOGPROBS,
        "liger_loss": peers.LIGER_LOSSES,
        "verl_head": peers.VERL_HEADS,
    }
    return next(implementation for implementation in suites[suite] if implementation.name == name)


def _gradient_bytes(inputs: Inputs) -> int:
    return sum(x.grad.nbytes for x in (inputs.hidden, inputs.weight) if x.grad is not None)


def _cuda_peak(name: str, suite: str, shape: Shape, device: torch.device) -> float:
    inputs = Inputs.random(shape, device)
    step = find_implementation(suite, name).build(inputs)
    inputs.clear()
    return (cuda_growth(step, device) - _gradient_bytes(inputs)) / 2**20


def _resident_peak(name: str, suite: str, shape: Shape) -> float:
    build = find_implementation(suite, name).build
    # Libraries allocate for good when they are first used.
    build(Inputs.random(Shape(2, 8, shape.hidden, shape.vocab, shape.dtype)))()
    inputs = Inputs.random(shape)
    step = build(inputs)
    inputs.clear()
    return (resident_growth(step) - _gradient_bytes(inputs)) / 2**20


def resident_growth(step: Callable[[], object]) -> int:
    """Bytes by which this process's resident memory rose above its start while a step ran."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    CLEAR_REFS.write_text("5")  # resets the high-water mark, see proc(5)
    step()
    return _resident("VmHWM") - before


def cuda_growth(step: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch allocated beyond what it held, at most, while a step ran."""
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _resident(key: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status: wanted a line {key}, got none")


def describe_device(device: torch.device) -> dict[str, Any]:
    """The device's name, and its clocks and temperature at this moment."""
    if device.type == "cpu":
        return {"name": describe_machine()["cpu"], "threads": torch.get_num_threads()}
    return {"name": torch.cuda.get_device_name(device), **_nvidia_smi(device)}


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=False)) if done.returncode == 0 else {}


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """What made a set of results: command, date, machine, versions, device."""
    machine = describe_machine()
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": describe_device(device),
        "cpu": machine["cpu"],
        "system": machine["system"],
        "versions": machine["versions"] | _peer_versions(),
    }


def _peer_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in (
        "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "unsloth-zoo", "verl",
        "triton",
    ):  # fmt: skip
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def gemm_tflops(shape: Shape, device: torch.device) -> float:
    """TFLOP/s of one bare GEMM of the shape's logits, in its dtype: the ceiling that is real."""
    inputs = Inputs.random(shape, device)
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    seconds = median_seconds(partial(torch.mm, hidden, weight.t()), device)
    return shape.gemm_flops / 3 / seconds / 1e12


def free_memory(device: torch.device) -> None:
    """Gives back what a model that is gone has left, before the next one is made."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_step(
    step: Callable[[], Any],
    benchmark: Any,
    config: Any,
    suite: str,
    implementation: str,
    size: str,
    flops: float,
    tokens: int,
) -> None:
    """Times an optimizer step of `flops` operations and `tokens` sampled tokens for a suite."""
    benchmark.group = f"{suite} {size}"
    benchmark.pedantic(step, rounds=max(2, config.getoption("--rounds") // 2), warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        suite=suite,
        implementation=implementation,
        size=size,
        tflops=flops / seconds / 1e12,
        more={"completion tokens/s": tokens / seconds},
    )
