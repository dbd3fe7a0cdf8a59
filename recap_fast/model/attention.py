"""Attention over a flat batch of sequences of different lengths.

Everything but attention works token by token, so the model runs on the T packed tokens as one
sequence. Only inside attention are tokens seen by segment. A segment is a run of queries with the
keys that they may see: a whole sequence (causal), or one rollout's completion, whose keys are those
of its group's prompt and its own. A prompt is therefore computed once for all rollouts of its
group, with the same result.

A batch's layout holds what its backend needs of the segments: `RaggedLayout` here, for kernels
that know variable lengths (chosen in `attention_backends.py`), or `PaddedLayout`. Indices are made
on the host while packing; nothing here depends on values on the device. `packed_attention` is
registered with transformers as the attention implementation "recap_packed".

Shapes: T packed tokens, G segments, T_k their keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recap_fast.model.attention_layout import AttentionLayout, Segment
from recap_fast.model.attention_padded import build_padded
from recap_fast.model.upload import to_device

IMPLEMENTATION = "recap_packed"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where segments begin and end among a kernel's queries and keys."""

    query_starts: Tensor  # [G + 1] int32, the last is T
    key_starts: Tensor  # [G + 1] int32, the last is T_k
    max_queries: int  # of the longest segment
    max_keys: int
    causal: bool

    def to(self, device: torch.device) -> Bounds:
        return to_device(self, device)


class RaggedKernel(Protocol):
    """Attention over segments of any length. Causal from the end: the last query of a segment
    sees all of its keys, the one before sees all but the last, and so on. Not causal: every query
    of a segment sees all of its keys."""

    def __call__(
        self,
        query: Tensor,  # [T, heads, D]
        key: Tensor,  # [T_k, kv_heads, D]; kv_heads divides heads
        value: Tensor,  # [T_k, kv_heads, D]
        bounds: Bounds,
        scale: float | None,  # None: 1 / sqrt(D)
    ) -> Tensor: ...  # [T, heads, D]


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to run packed attention."""

    name: str
    kernel: RaggedKernel | None
    """None: padded rectangles through torch's scaled dot product."""


SDPA = Backend("sdpa", None)


def build_layout(
    segments: Sequence[Segment], backend: Backend = SDPA, *, causal: bool = True
) -> AttentionLayout:
    """Lays segments out for a backend. Together they must cover positions 0 .. T-1 once each.

    Args:
        causal: False for the patches of images, which see one another; segments then have no
            prefixes.
    """
    if backend.kernel is None:
        return build_padded(segments, causal=causal)
    return _build_ragged(segments, backend.kernel, causal)


@dataclass(frozen=True, slots=True)
class RaggedLayout:
    """Segments end to end, in packed order, so that queries and outputs need no gathering."""

    kernel: RaggedKernel
    bounds: Bounds
    keys: Tensor | None  # [T_k] int64, packed positions; None: every key is its own query's

    @property
    def max_length(self) -> int:
        return self.bounds.max_keys

    def to(self, device: torch.device) -> RaggedLayout:
        return to_device(self, device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float
    ) -> Tensor:
        assert not dropout, "chosen for models without dropout"
        # Rotary embeddings make float32 of queries and keys under autocast, whose list of
        # operators to cast for does not have these kernels.
        device = query.device.type
        cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if cast else value.dtype
        query, key, value = (x.to(dtype) for x in (query, key, value))
        if self.keys is not None:
            key, value = (_Repeat.apply(x, self.keys) for x in (key, value))
        return self.kernel(query, key, value, self.bounds, scale)


class _Repeat(torch.autograd.Function):
    """Rows of `tokens` by index. A shared prompt's gradients are summed in float32: there are as
    many of them as rollouts in a group, which is too many for bfloat16."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_tokens = len(tokens)
        return tokens.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        (gradient,) = gradients
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros((ctx.num_tokens, *gradient.shape[1:]), dtype=wide)
        total.index_add_(0, index, gradient.to(wide))
        return total.to(gradient.dtype), None


def _build_ragged(segments: Sequence[Segment], kernel: RaggedKernel, causal: bool) -> RaggedLayout:
    segments = sorted(segments, key=lambda segment: segment.own.start)
    query_starts = _starts([len(segment.own) for segment in segments])
    shared = any(segment.prefix for segment in segments)
    runs = [run for segment in segments for run in (segment.prefix, segment.own)]
    bounds = Bounds(
        query_starts=query_starts,
        key_starts=_starts([s.num_keys for s in segments]) if shared else query_starts,
        max_queries=max(len(segment.own) for segment in segments),
        max_keys=max(segment.num_keys for segment in segments),
        causal=causal,
    )
    keys = torch.cat([torch.arange(run.start, run.stop) for run in runs]) if shared else None
    return RaggedLayout(kernel, bounds, keys)


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)


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
    tokens = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    return layout.attend(*tokens, scale=scaling, dropout=dropout)[None], None


def register() -> None:
    """Makes the implementation known to transformers, which then builds no mask for it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, packed_attention)
