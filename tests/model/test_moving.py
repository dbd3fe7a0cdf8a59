"""Records of tensors on their way to a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from recap_fast.model.moving import to_device

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
