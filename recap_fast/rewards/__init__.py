"""Scores completions: the built-in reward functions, and the worker processes that run them.

A model's text never ends a run and never makes a reward absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on

if TYPE_CHECKING:
    from recap_fast.rewards.scorer import RewardError, RewardScorer

__all__ = [
    "RewardError",
    "RewardScorer",
]

__getattr__ = hand_on(
    __name__,
    {
        "RewardScorer": "scorer",
        "RewardError": "scorer",
    },
)
