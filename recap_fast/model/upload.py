"""Sends tensors from the host to the device without waiting for either."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; itself where it lies there already.

    CUDA copies from pinned memory only without holding the host up. A pinned copy may be dropped
    at once: torch's allocator keeps its memory until the transfer is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
