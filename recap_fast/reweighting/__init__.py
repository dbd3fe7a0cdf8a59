"""Weights of the objectives from their recent values, on the device and without a host sync.

RECAP, and eight methods to compare it with, behind one interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on

if TYPE_CHECKING:
    from recap_fast.reweighting.balance import GradientBalance
    from recap_fast.reweighting.base import Reweighter
    from recap_fast.reweighting.recap import RecapReweighter, make_reweighter

__all__ = [
    "GradientBalance",
    "RecapReweighter",
    "Reweighter",
    "make_reweighter",
]

__getattr__ = hand_on(
    __name__,
    {
        "GradientBalance": "balance",
        "RecapReweighter": "recap",
        "Reweighter": "base",
        "make_reweighter": "recap",
    },
)
