"""Replays a run's stage times and completion lengths, and predicts what the same work would take
with trainer and engines on the same GPUs or apart, one step off or further.

Needs no GPU and no torch: a discrete-event simulation, the same for the same seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on

if TYPE_CHECKING:
    from recap_fast.simulate.pipeline import Outcome, SetUp, simulate
    from recap_fast.simulate.plan import plan
    from recap_fast.simulate.trace import read_trace

__all__ = ["Outcome", "SetUp", "plan", "read_trace", "simulate"]

__getattr__ = hand_on(
    __name__,
    {
        "Outcome": "pipeline",
        "SetUp": "pipeline",
        "plan": "plan",
        "read_trace": "trace",
        "simulate": "pipeline",
    },
)
