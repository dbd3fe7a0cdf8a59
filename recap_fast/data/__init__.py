"""Opens the sources of rows, templates and tokenises them, and mixes them into steps.

Every order depends on the seed alone, and a cursor continues it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on

if TYPE_CHECKING:
    from recap_fast.data.mix import DataStream

__all__ = [
    "DataStream",
]

__getattr__ = hand_on(
    __name__,
    {
        "DataStream": "mix",
    },
)
