"""One optimizer step, from packing to the update; evaluation, checkpoints and the run folder.

The loop over steps is `recap_fast.trainer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on

if TYPE_CHECKING:
    from recap_fast.training.evaluate import Evaluator
    from recap_fast.training.optimization import PolicyOptimizer
    from recap_fast.training.packing import pack_update

__all__ = [
    "Evaluator",
    "PolicyOptimizer",
    "pack_update",
]

__getattr__ = hand_on(
    __name__,
    {
        "Evaluator": "evaluate",
        "PolicyOptimizer": "optimization",
        "pack_update": "packing",
    },
)
