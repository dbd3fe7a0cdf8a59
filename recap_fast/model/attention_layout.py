"""What a layout of packed attention is made of, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Packed positions of one segment's queries, and of what precedes them in their sequence."""

    prefix: range  # keys only; empty for a whole sequence
    own: range  # queries, and keys after the prefix

    @property
    def num_keys(self) -> int:
        return len(self.prefix) + len(self.own)


class AttentionLayout(Protocol):
    """What packed attention asks of a layout."""

    @property
    def max_length(self) -> int: ...  # keys of the longest segment

    def to(self, device: torch.device) -> AttentionLayout: ...

    def attend(
        self,
        query: Tensor,  # [T, heads, D]
        key: Tensor,  # [T, kv_heads, D]
        value: Tensor,  # [T, kv_heads, D]
        *,
        scale: float | None,
        dropout: float,
    ) -> Tensor: ...  # [T, heads, D]
