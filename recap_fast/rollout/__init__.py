"""Samples completions from the policy, with vLLM or transformers, and keeps their weights in step.

A guard compares the engine's log-probs with the trainer's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on

if TYPE_CHECKING:
    from recap_fast.rollout.factory import make_engine
    from recap_fast.rollout.protocol import RolloutEngine

__all__ = [
    "RolloutEngine",
    "make_engine",
]

__getattr__ = hand_on(
    __name__,
    {
        "RolloutEngine": "protocol",
        "make_engine": "factory",
    },
)
