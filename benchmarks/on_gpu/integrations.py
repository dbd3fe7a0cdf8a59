"""Our head and loss in the place of TRL's, Liger's and verl's, whichever of them are installed."""

from __future__ import annotations

from typing import Any

from benchmarks.on_gpu.kernels import measure
from benchmarks.on_gpu.part import Context


def run(context: Context) -> dict[str, Any]:
    """`measure` of the suite, a rehearsal in bfloat16 alone."""
    return measure(context, "integrations", ("integrations",), "not float32")
