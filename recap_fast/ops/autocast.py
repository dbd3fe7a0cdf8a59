"""The head under torch.autocast: the operators' GEMMs are out of its sight."""

from __future__ import annotations

import torch
from torch import Tensor


def follow_autocast(hidden: Tensor) -> Tensor:
    """Hidden in the dtype that autocast gives `torch.nn.functional.linear`, differentiably.

    As it is where autocast is off for its device, and where it is float64, which autocast leaves
    alone. The gradient returns in hidden's own dtype.
    """
    kind = hidden.device.type
    # Asking first: torch raises for devices that have no autocast.
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return hidden
    return hidden if hidden.dtype == torch.float64 else hidden.to(torch.get_autocast_dtype(kind))
