"""Packed attention through torch's scaled dot product, on any device and in any dtype.

Segments of similar length are padded to a rectangle, a bucket, and each bucket is one call. Where
attention is not causal, a bucket holds segments of one length, and needs neither padding nor mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from recap_fast.model.attention_layout import Segment
from recap_fast.model.upload import to_device


@dataclass(frozen=True, slots=True)
class Bucket:
    """Segments of similar length, padded to a rectangle. Padding is computed and dropped."""

    queries: Tensor  # [B, Lq] int64, packed positions
    keys: Tensor | None  # [B, Lk] int64; None: same as queries
    mask: Tensor | None  # [B, 1, Lq, Lk] bool, True where a query sees a key; None: the layout's

    def to(self, device: torch.device) -> Bucket:
        return to_device(self, device)


@dataclass(frozen=True, slots=True)
class PaddedLayout:
    """Buckets of segments, and where their outputs belong."""

    buckets: tuple[Bucket, ...]
    gather: Tensor  # [T] int64: a token's row among the buckets' outputs laid end to end
    max_length: int
    causal: bool  # what a bucket without a mask is

    def to(self, device: torch.device) -> PaddedLayout:
        return to_device(self, device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float
    ) -> Tensor:
        outputs = []
        for bucket in self.buckets:
            indices = bucket.queries if bucket.keys is None else bucket.keys
            b_query = _gather(query, bucket.queries)
            b_key, b_value = _gather(key, indices), _gather(value, indices)
            out = _attend(
                b_query, b_key, b_value, attn_mask=bucket.mask, dropout_p=dropout,
                is_causal=self.causal and bucket.mask is None, scale=scale,
            )  # [B, heads, Lq, D]  # fmt: skip
            outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B * Lq, heads, D]
        return torch.cat(outputs).index_select(0, self.gather)


def build_padded(segments: Sequence[Segment], *, causal: bool = True) -> PaddedLayout:
    """Sorts segments into buckets."""
    by_shape: dict[tuple[bool, int], list[Segment]] = {}
    for segment in segments:
        length = len(segment.own)
        # Powers of two bound the padding by half, with few buckets. Padding hides behind a causal
        # mask only, and images come in few sizes.
        size = 1 << (length - 1).bit_length() if causal else length
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
    longest = max(s.num_keys for s in segments)
    return PaddedLayout(tuple(buckets), gather, longest, causal)


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


def _attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """[B, heads, Lq, D]; keys and values may have fewer heads, which divide the query's."""
    group = query.shape[1] // key.shape[1]
    if group > 1 and not _groups_heads(query.device):
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    elif group > 1:
        kwargs["enable_gqa"] = True
    if query.device.type != "cpu":
        return scaled_dot_product_attention(query, key, value, **kwargs)
    # The CPU's fused backward pass is about four times slower in bfloat16 than in float32.
    with torch.autocast("cpu", enabled=False):
        output = scaled_dot_product_attention(query.float(), key.float(), value.float(), **kwargs)
    return output.to(query.dtype)


def _groups_heads(device: torch.device) -> bool:
    """Whether fewer heads of keys than of queries are best left to torch.

    CUDA's kernels that take a mask want as many: torch would fall back to holding the scores
    [B, heads, Lq, Lk], which are gigabytes a layer.
    """
    return device.type == "cpu"


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    """[T, heads, D], [B, L] -> [B, heads, L, D]."""
    picked = tokens.index_select(0, index.flatten())
    return picked.view(*index.shape, *tokens.shape[1:]).transpose(1, 2)
