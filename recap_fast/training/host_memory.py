"""What a process of a run on GPUs takes of its host's memory, and what the host has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log
from pathlib import Path

from recap_fast.model.shapes import ModelShapes
from recap_fast.training.memory_model import FLOAT32, Part, moment_bytes

PROCESS = 4 * 2**30
"""Estimate: of Python, torch, CUDA's host side, the engine and the tokenizer, without what follows
from the model."""
_MEAN_ROUNDING = 1 / log(2)
"""Of sizes that are rounded up to powers of two, in the mean."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is trained and what is frozen but sharded: parameters of the whole model.

    Attributes:
        base: frozen under adapters, of `value` bytes each.
        reference: of a second model's shards, of `value` bytes each.
    """

    trained: int
    base: int
    reference: int
    value: int
    shards: int


def host_parts(shapes: ModelShapes, kept: Kept, state: str, *, offload: bool) -> Iterator[Part]:
    """Of each process.

    Args:
        state: `optimizer.state`.
        offload: `model.offload`.
    """
    own = ceil(kept.trained / kept.shards)
    moments = ceil(moment_bytes(state) * own)
    if offload:
        masters = pinned_bytes(shapes, kept.trained, FLOAT32, kept.shards)
        yield Part("masters", masters, "pinned, in blocks of powers of two")
        yield Part("gradients", masters, "pinned, likewise")
        yield Part("optimizer state", moments, f"AdamW, {state}")
        base = pinned_bytes(shapes, kept.base, kept.value, kept.shards)
        yield Part("frozen base", base, "pinned, likewise")
        reference = pinned_bytes(shapes, kept.reference, kept.value, kept.shards)
        yield Part("reference model", reference, "pinned, likewise")
    yield Part("checkpoint", FLOAT32 * own + moments, "a copy, while it is written")
    yield Part("process", PROCESS, "estimate")


def pinned_bytes(shapes: ModelShapes, parameters: int, value: int, shards: int) -> int:
    """Of some of a model's tensors, in shards, as torch's allocator of pinned memory gives them:
    each rounded up to a power of two."""
    matrices = [
        *[shapes.hidden * shapes.queries] * 2 * shapes.layers,
        *[shapes.hidden * shapes.keys] * 2 * shapes.layers,
        *[shapes.hidden * shapes.intermediate] * 3 * shapes.layers,
        *([shapes.largest_tensor] if shapes.tied else [shapes.largest_tensor] * 2),
    ]
    rest = parameters - sum(matrices)
    if rest < 0:  # adapters alone
        return ceil(_MEAN_ROUNDING * value * parameters / shards)
    rounded = sum(1 << (ceil(value * size / shards) - 1).bit_length() for size in matrices)
    return rounded + ceil(_MEAN_ROUNDING * value * rest / shards)


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that this host, or the container that we are in, has left; None where it does not
    say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return min(free, limit - int(stat["anon"]))  # files' pages are given back
    except (OSError, KeyError, ValueError):  # no limit ("max"), or no cgroup
        return free
