"""Sends tensors, and records of them, from the host to the device without waiting for either."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; itself where it lies there already.

    CUDA copies from pinned memory only without holding the host up. A pinned copy may be dropped
    at once: torch's allocator keeps its memory until the transfer is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_device(record: Record, device: torch.device) -> Record:
    """The dataclass `record` with its tensors, and those of what it holds, on `device`.

    Nothing waits for the copies. A tensor that stands in several places is copied once. What is
    neither tensor, dataclass, list nor tuple is kept as it is.
    """
    moved: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in moved:
                moved[id(value)] = upload(value, device)
            return moved[id(value)]
        if isinstance(value, (list, tuple)):
            return type(value)(move(item) for item in value)
        if hasattr(value, "to"):  # a record that knows what of it stays on the host
            return value.to(device)
        return value

    assert is_dataclass(record)
    assert not isinstance(record, type)
    return replace(record, **{f.name: move(getattr(record, f.name)) for f in fields(record)})
