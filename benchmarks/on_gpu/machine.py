"""What this machine is, and what it lacks for the other parts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from benchmarks.measuring import pick_device, provenance
from benchmarks.on_gpu.part import Context

NEEDED = ("torch", "numpy", "pydantic", "typer", "rich", "matplotlib", "transformers", "pytest",
          "pytest_benchmark", "pytest_timeout", "hypothesis", "triton", "safetensors", "yaml",
          "pebble")  # fmt: skip
OPTIONAL = ("trl", "liger_kernel", "cut_cross_entropy", "quack", "cutlass", "unsloth_zoo", "verl",
            "vllm", "flash_attn", "reasoning_gym", "math_verify", "sklearn")  # fmt: skip


def run(context: Context) -> dict[str, Any]:
    """Names, versions, and the packages that are not installed."""
    return {
        **provenance(pick_device(), "bash benchmarks/on_gpu.sh"),
        "missing": [name for name in NEEDED if find_spec(name) is None],
        "absent_peers": [name for name in OPTIONAL if find_spec(name) is None],
    }
