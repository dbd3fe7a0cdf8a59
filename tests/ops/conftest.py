"""Makes Triton's interpreter round as a GPU does, and uninitialised memory conspicuous."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 -> bfloat16 to the nearest; the interpreter cuts bits off, cvt.rn.bf16 rounds."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cut(self, source, target)
        bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view("uint16"), target.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", create_fp_trunc)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer: nothing unwritten goes unnoticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which also fills new memory
    yield
    torch.use_deterministic_algorithms(False)
