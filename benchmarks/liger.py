"""Liger patches transformers' modules for the whole process; what is compared must not stay so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch


@contextmanager
def patches_undone(model_type: str) -> Iterator[None]:
    """Leaves transformers' module of a model type as it was found, whatever was patched within."""
    module = vars(import_module(f"transformers.models.{model_type}.modeling_{model_type}"))
    before = dict(module)
    try:
        yield
    finally:
        for name in module.keys() - before.keys():
            del module[name]
        module.update(before)


def skip_without_liger(liger: bool, device: torch.device) -> None:
    """Skips a benchmark that leaves Liger out where Liger could not run anyway."""
    if not liger and device.type != "cuda":
        pytest.skip("Liger acts on CUDA only: the same as with it")
