"""Records of tensors on their way to a device: all of them, from pinned memory, asynchronously."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.vision_step import WORKLOADS, vision_step
from recap_fast.model.attention import Backend
from recap_fast.model.upload import to_device, upload
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.training.packing import pack_update
from tests.training.test_packing import make_rows

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _torchs_own_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU worker, once started in this process, has put a stand-in in its place."""
    monkeypatch.setattr(Tensor, "pin_memory", torch._C.TensorBase.pin_memory)


class PretendCuda(TorchFunctionMode):
    """Counts what is copied to CUDA, and keeps it here. Fails on a copy that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.uploads = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.pin_memory:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if function is Tensor.to and CUDA in (*args[1:], kwargs.get("device")):
            assert kwargs.get("non_blocking"), "waits for the copy"
            assert any(args[0] is pinned for pinned in self.pinned), "copies pageable memory"
            self.uploads += 1
            return args[0]
        return function(*args, **kwargs)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in records, sequences and mappings, whatever their nesting."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, name) for name in value.__dataclass_fields__]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [t for item in value for t in tensors_of(item)] if isinstance(value, list | tuple) else []
    )


def check(update: Any, stays: int = 0) -> None:
    before = tensors_of(update)
    with PretendCuda() as cuda:
        after = tensors_of(update.to(CUDA))
    assert len({id(t) for t in before}) - stays == cuda.uploads > 10
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", [Backend("sdpa", None), Backend("ragged", lambda *_: None)])
def test_text(backend: Backend) -> None:
    rollouts, advantages, rows = make_rows(3, 2, 4, 2)
    update = pack_update(
        rollouts, advantages, rows, [2, 2],
        config=PolicyLossConfig(), max_tokens=60, attention=backend,
    )  # fmt: skip
    assert len(update.batches) > 1
    check(update)


def test_images() -> None:
    _, update = vision_step(WORKLOADS["small"], torch.device("cpu"))
    images = [batch.images for batch in update.batches if batch.images is not None]
    assert images
    check(update, stays=len(images))  # their grids are read on the host


def test_other_devices_need_no_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", None)
    values = torch.from_numpy(np.arange(3.0))
    assert upload(values, torch.device("cpu")) is values
    assert upload(values, torch.device("meta")).device.type == "meta"


META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Inner:
    values: Tensor
    kept: Tensor

    def to(self, device: torch.device) -> Inner:
        return Inner(self.values.to(device), self.kept)


@dataclass(frozen=True)
class Outer:
    first: Tensor
    again: Tensor
    absent: Tensor | None
    inner: Inner
    several: list[Inner]
    pair: tuple[Tensor, int]
    kernel: Any
    name: str = "unchanged"


def test_all_tensors_move_and_the_rest_stays() -> None:
    shared = torch.arange(3)
    inner = Inner(torch.ones(2), torch.zeros(1))
    record = Outer(shared, shared, None, inner, [inner, inner], (torch.ones(1), 7), len)
    moved = to_device(record, META)
    assert moved.first.is_meta
    assert moved.again is moved.first, "one tensor was copied twice"
    assert moved.absent is None
    for part in (moved.inner, *moved.several):
        assert part.values.is_meta
        assert part.kept is inner.kept, "the record itself decides what of it stays"
    assert moved.pair[0].is_meta
    assert (moved.pair[1], moved.kernel, moved.name) == (7, len, "unchanged")
    assert record.first is shared
    assert record.inner is inner


def test_only_records_move() -> None:
    with pytest.raises(AssertionError):
        to_device([torch.ones(1)], META)
