"""What parts of an optimizer step cost: buffers that stay, the head's gradient, determinism.

One training step of the "cpu" workload (benchmarks/training_step.py: SmolLM2-135M's shape, a tied
head, 2 prompts x 8 rollouts x 32 tokens), split into passes as a long step is. The variants take
turns in one process, so that what else the machine does falls on all alike. Peak memory is that of
a second step beyond what lies there before it, each variant in a process of its own.

    python -m benchmarks.bench_update [--rounds 7] [--shapes cpu] [--passes 2]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.measuring import _resident, provenance
from benchmarks.training_step import WORKLOADS, recap_step
from recap_fast.ops import fused_linear_policy_loss
from recap_fast.training import optimization
from recap_fast.training.determinism import determinism, prepare_determinism

CPU = torch.device("cpu")


def _through_autograd(*args: Any, weight_grad: Any, **kwargs: Any) -> Any:
    return fused_linear_policy_loss(*args, **kwargs)


@contextmanager
def head_through_autograd() -> Iterator[None]:
    """The loss hands the head's gradient to autograd, which adds it."""
    with (
        mock.patch.object(optimization, "fused_linear_policy_loss", _through_autograd),
        mock.patch.object(optimization.PolicyOptimizer, "_head_gradient", return_value=None),
    ):
        yield


@contextmanager
def buffers_freed() -> Iterator[None]:
    """Gradients are freed after each step and made again in the next."""
    zero_grad = torch.optim.Optimizer.zero_grad
    freeing = partial(zero_grad, set_to_none=True)
    with mock.patch.object(
        torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: freeing(self)
    ):
        yield


VARIANTS: dict[str, Callable[[], Any]] = {
    "as it is": nullcontext,
    "gradients freed": buffers_freed,
    "head through autograd": head_through_autograd,
    "deterministic": partial(determinism, True),
}


def build(shapes: str, passes: int) -> tuple[Callable[[], Any], Any]:
    """The step, and its model."""
    workload = WORKLOADS[shapes]
    tokens = workload.prompts * workload.prompt_tokens
    tokens += workload.rollouts * (workload.completion_tokens - 1)
    workload = replace(workload, max_tokens=-(-tokens // passes))
    step, update, model = recap_step(workload, CPU)
    assert len(update.batches) == passes, f"{len(update.batches)} passes, wanted {passes}"
    return step, model


def measure_seconds(shapes: str, passes: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant's steps, in turn."""
    step, model = build(shapes, passes)
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(rounds + 1):
        for name, variant in VARIANTS.items():
            with variant():
                if name == "gradients freed":
                    model.zero_grad(set_to_none=True)
                start = time.perf_counter()
                step()
                seconds = time.perf_counter() - start
            if turn:  # libraries start up in the first
                found[name].append(seconds)
    return found


def peak_mib(shapes: str, passes: int, name: str, threads: int) -> tuple[float, float]:
    """MiB that a second step needs at most beyond what lies there before it, and those of gradients
    that lie there between steps."""
    torch.set_num_threads(threads)
    step, model = build(shapes, passes)
    with VARIANTS[name]():
        step()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
        step()
    kept = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return (_resident("VmHWM") - before) / 2**20, kept / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="0: memory only")
    parser.add_argument("--shapes", choices=["small", "cpu"], default="cpu")
    parser.add_argument("--passes", type=int, default=2)
    options = parser.parse_args()
    prepare_determinism()
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    memory = {}
    for name in VARIANTS:
        with context.Pool(1) as pool:
            memory[name] = pool.apply(peak_mib, (options.shapes, options.passes, name, threads))
    print(provenance(CPU, f"python -m benchmarks.bench_update --passes {options.passes}"))
    for name, (most, kept) in memory.items():
        print(f"{name:22} a step's peak {most:.0f} MiB, gradients kept {kept:.0f} MiB")
    if not options.rounds:
        return
    seconds = measure_seconds(options.shapes, options.passes, options.rounds)
    reference = statistics.median(seconds["as it is"])
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"{min(times):.3f} to {max(times):.3f}"
        print(f"{name:22} median {median:.3f} s ({median / reference - 1:+.1%}), {spread}")


if __name__ == "__main__":
    main()
