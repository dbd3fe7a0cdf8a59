"""Attention over a flat batch of sequences of different lengths, without padding the batch.

Everything but attention works token by token, so the model runs on the T packed tokens as one
sequence. Only inside attention are queries and keys gathered by segment. A segment is a run of
queries with the keys that they may see: a whole sequence (causal), or one rollout's completion,
whose keys are those of its group's prompt and its own. A prompt is therefore computed once for all
rollouts of its group, with the same result.

`packed_attention` is registered with transformers as the attention implementation "recap_packed".
Indices are made on the host while packing; nothing here depends on values on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

IMPLEMENTATION = "recap_packed"


@dataclass(frozen=True, slots=True)
class Segment:
    """Packed positions of one segment's queries, and of what precedes them in their sequence."""

    prefix: range  # keys only; empty for a whole sequence
    own: range  # queries, and keys after the prefix

    @property
    def num_keys(self) -> int:
        return len(self.prefix) + len(self.own)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Segments of similar length, padded to a rectangle. Padding is computed and dropped."""

    queries: Tensor  # [B, Lq] int64, packed positions
    keys: Tensor | None  # [B, Lk] int64; None: same as queries
    mask: Tensor | None  # [B, 1, Lq, Lk] bool, True where a query sees a key; None: causal

    def to(self, device: torch.device) -> Bucket:
        move = [None if x is None else x.to(device, non_blocking=True) for x in self._fields()]
        return Bucket(*move)  # type: ignore[arg-type]

    def _fields(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.queries, self.keys, self.mask


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """How the T tokens of a packed batch attend to one another."""

    buckets: tuple[Bucket, ...]
    gather: Tensor  # [T] int64: a token's row among the buckets' outputs laid end to end
    max_length: int  # keys of the longest segment

    def to(self, device: torch.device) -> AttentionLayout:
        buckets = tuple(bucket.to(device) for bucket in self.buckets)
        return AttentionLayout(buckets, self.gather.to(device, non_blocking=True), self.max_length)


def build_layout(segments: Sequence[Segment]) -> AttentionLayout:
    """Sorts segments into buckets. Together they must cover positions 0 .. T-1 once each."""
    by_shape: dict[tuple[bool, int], list[Segment]] = {}
    for segment in segments:
        # Powers of two bound the padding by half, with few buckets.
        size = 1 << (len(segment.own) - 1).bit_length()
        by_shape.setdefault((bool(segment.prefix), size), []).append(segment)
    num_tokens = sum(len(segment.own) for segment in segments)
    gather = torch.empty(num_tokens, dtype=torch.int64)
    buckets, offset = [], 0
    for (has_prefix, _), members in sorted(by_shape.items()):
        bucket = _build_bucket(members, has_prefix)
        width = bucket.queries.shape[1]
        for row, segment in enumerate(members):
            start = offset + row * width
            own = segment.own
            gather[own.start : own.stop] = torch.arange(start, start + len(own))
        offset += bucket.queries.numel()
        buckets.append(bucket)
    return AttentionLayout(tuple(buckets), gather, max(s.num_keys for s in segments))


def _build_bucket(members: list[Segment], has_prefix: bool) -> Bucket:
    width = max(len(segment.own) for segment in members)
    queries = torch.zeros(len(members), width, dtype=torch.int64)
    for row, segment in enumerate(members):
        queries[row, : len(segment.own)] = torch.arange(segment.own.start, segment.own.stop)
    if not has_prefix:
        # Padding stands after the tokens, so the causal mask alone keeps it out of sight.
        return Bucket(queries, None, None)
    key_width = max(segment.num_keys for segment in members)
    keys = torch.zeros(len(members), key_width, dtype=torch.int64)
    for row, segment in enumerate(members):
        split = len(segment.prefix)
        keys[row, :split] = torch.arange(segment.prefix.start, segment.prefix.stop)
        keys[row, split : segment.num_keys] = torch.arange(segment.own.start, segment.own.stop)
    # A key's index is its position in the sequence; query j stands at len(prefix) + j. Every
    # row sees key 0, padding too, so no softmax runs over nothing (which would be NaN).
    position = torch.tensor([len(segment.prefix) for segment in members])
    position = position[:, None] + torch.arange(width)  # [B, Lq]
    mask = torch.arange(key_width) <= position[:, None, :, None]
    return Bucket(queries, keys, mask)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, kv_heads, T, D]
    value: Tensor,  # [1, kv_heads, T, D]
    attention_mask: Tensor | None,
    *,
    layout: AttentionLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form that transformers calls. Returns ([1, T, heads, D], None).

    Raises:
        ValueError: the model asks for attention of another kind than plain causal attention.
    """
    assert attention_mask is None, "masks are part of the layout"
    if sliding_window is not None and layout.max_length > sliding_window:
        raise ValueError(
            f"packed attention has no sliding window: sequences may have up to {sliding_window} "
            f"tokens, got {layout.max_length}"
        )
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"packed attention does not support {name!r}, which this model uses")
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, heads, D]
    outputs = []
    for bucket in layout.buckets:
        indices = bucket.queries if bucket.keys is None else bucket.keys
        b_q, b_k, b_v = (
            _gather(x, index)
            for x, index in zip(tokens, (bucket.queries, indices, indices), strict=True)
        )
        out = _attend(
            b_q, b_k, b_v, attn_mask=bucket.mask, dropout_p=dropout,
            is_causal=bucket.mask is None, scale=scaling, enable_gqa=b_q.shape[1] != b_k.shape[1],
        )  # [B, heads, Lq, D]  # fmt: skip
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B * Lq, heads, D]
    return torch.cat(outputs).index_select(0, layout.gather)[None], None


def _attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    if query.device.type != "cpu":
        return scaled_dot_product_attention(query, key, value, **kwargs)
    # The CPU's fused backward pass is about four times slower in bfloat16 than in float32.
    with torch.autocast("cpu", enabled=False):
        output = scaled_dot_product_attention(query.float(), key.float(), value.float(), **kwargs)
    return output.to(query.dtype)


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    """[T, heads, D], [B, L] -> [B, heads, L, D]."""
    picked = tokens.index_select(0, index.flatten())
    return picked.view(*index.shape, *tokens.shape[1:]).transpose(1, 2)


def register() -> None:
    """Makes the implementation known to transformers, which then builds no mask for it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, packed_attention)
