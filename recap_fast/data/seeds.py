"""Seeds and orders that depend on what is named, and on no process."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np


def seed_of(*parts: Any) -> int:
    """A 32-bit seed that depends on all parts and on nothing else (`hash` differs by process)."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def permutation(size: int, *seed_parts: Any) -> np.ndarray:
    """An order of the numbers below `size`, determined by the parts."""
    # RandomState, because NumPy guarantees its stream across versions and Generator's not: a run
    # may be resumed on another machine.
    return np.random.RandomState(seed_of(*seed_parts)).permutation(size)
