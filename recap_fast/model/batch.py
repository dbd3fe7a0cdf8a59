"""One forward pass of a model: what packing hands over, what `Policy` runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recap_fast.model.attention_layout import AttentionLayout
from recap_fast.model.upload import to_device
from recap_fast.model.vision import PackedImages


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One forward pass. T packed tokens, N predicted tokens."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # position in the token's own sequence: [T] int64; [3, T] with an adapter
    layout: AttentionLayout
    hidden_index: Tensor  # [N] int64: packed position whose hidden state predicts target n
    targets: Tensor  # [N] int64
    sequence_ids: Tensor  # [N] int32, of the whole update, not of this pass
    token_objectives: Tensor  # [N] int32: -1 policy token, k >= 0 supervised token of objective k
    rollout_logprobs: Tensor  # [N] float32, 0 for supervised tokens
    images: PackedImages | None = None

    def to(self, device: torch.device) -> PackedBatch:
        return to_device(self, device)
