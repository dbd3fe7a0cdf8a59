"""Chooses what runs packed attention, by trying it, and says why it is not something faster.

- "varlen": torch's own attention for variable lengths, without padding. CUDA, 16-bit floats.
- "flash_attn": the same from the package flash-attn, where that is installed.
- "sdpa": padded rectangles. Any device, any dtype.

A backend is chosen when a model is loaded and never changes afterwards. Before it is chosen it
attends to a few tokens with the model's heads, forward and backward, and has to agree with sdpa:
head sizes, architectures and releases differ in what they support, and a kernel that aligns causal
masks at the first key instead of the last would be wrong without an error.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from recap_fast.model.attention import SDPA, Backend, Bounds, RaggedKernel, build_layout
from recap_fast.model.attention_layout import Segment

_TOLERANCE = 0.05
"""Relative error, in the Euclidean norm, up to which a backend's trial agrees with sdpa."""


class UnavailableError(Exception):
    """A backend that cannot run here. Its text says why."""


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What a model asks of attention."""

    device: torch.device
    dtype: torch.dtype  # that it computes in
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    backend: Backend
    refused: dict[str, str]
    """Backends that "auto" would rather have taken, and why it could not."""

    def __str__(self) -> str:
        return "; ".join([self.backend.name, *self.reasons()])

    def reasons(self) -> list[str]:
        return [f"{name} {reason}" for name, reason in self.refused.items()]


def choose_backend(name: str, needs: AttentionNeeds) -> Choice:
    """Finds the backend of that name, or for "auto" the first of `ORDER` that can run.

    Raises:
        UnavailableError: the named backend cannot run this model here.
    """
    if name != "auto":
        return Choice(open_backend(name, needs), {})
    refused: dict[str, str] = {}
    for candidate in ORDER[:-1]:
        try:
            return Choice(open_backend(candidate, needs), refused)
        except UnavailableError as error:
            refused[candidate] = str(error)
    return Choice(open_backend(ORDER[-1], needs), refused)


def cost_of_sdpa(needs: AttentionNeeds) -> str:
    """What a GPU pays for running padded rectangles in place of variable lengths."""
    if not needs.causal:
        return "one call for each size of image in place of one for all"
    costs = [
        "sequences padded to rectangles, up to twice as long",
        "masks of [sequences, queries, keys] in memory where a prompt is shared",
    ]
    if (copies := needs.num_heads // needs.num_kv_heads) > 1:
        costs.append(f"keys and values held {copies} times, once for each head of queries")
    return ", ".join(costs)


def open_backend(name: str, needs: AttentionNeeds) -> Backend:
    """Loads a backend and tries it on the device. Raises `UnavailableError`."""
    if name == SDPA.name:
        return SDPA
    if needs.device.type != "cuda":
        raise UnavailableError(f"needs a CUDA device, not {needs.device.type}")
    if needs.dtype not in (torch.bfloat16, torch.float16):
        dtype = str(needs.dtype).removeprefix("torch.")
        raise UnavailableError(f"computes in bfloat16 or float16, not {dtype}")
    backend = Backend(name, _LOADERS[name]())
    try_backend(backend, needs)
    return backend


def try_backend(backend: Backend, needs: AttentionNeeds) -> None:
    """Compares output and gradients of a few tokens with sdpa's. Waits for the device.

    Raises:
        UnavailableError: the backend fails, or computes something else.
    """
    try:
        results = _attend(backend, needs)
    except Exception as failure:  # kernels and dispatchers raise anything
        lines = str(failure).strip().splitlines() or ["no message"]
        first = f"{type(failure).__name__}: {lines[0]}"
        raise UnavailableError(f"fails on a trial: {first}") from failure
    for what, result, expected in zip(
        ("output", "query gradient", "key gradient", "value gradient"),
        results,
        _attend(SDPA, needs),
        strict=True,
    ):
        deviation = ((result - expected).norm() / expected.norm()).item()
        # 16-bit floats differ by about a percent, a mask that is off by one key by far more.
        if not deviation < _TOLERANCE:
            raise UnavailableError(f"{what} differs from sdpa's by {deviation:.0%} on a trial")


def _attend(backend: Backend, needs: AttentionNeeds) -> list[Tensor]:
    """Output and gradients, in float32, of a prompt with two completions and a lone sequence, or
    of four images."""
    prompt = range(0, 9 if needs.causal else 0)
    segments = [
        Segment(range(0), range(0, 9)),
        Segment(prompt, range(9, 14)),
        Segment(prompt, range(14, 15)),
        Segment(range(0), range(15, 18)),
    ]
    generator = torch.Generator(needs.device).manual_seed(0)  # leaves torch's own state alone

    def draw(heads: int) -> Tensor:
        shape = (18, heads, needs.head_dim)
        return torch.randn(shape, generator=generator, device=needs.device, dtype=needs.dtype)

    heads = needs.num_heads, needs.num_kv_heads, needs.num_kv_heads
    inputs = [draw(count).requires_grad_() for count in heads]
    layout = build_layout(segments, backend, causal=needs.causal).to(needs.device)
    with torch.enable_grad():
        output = layout.attend(*inputs, scale=None, dropout=0.0)
        gradients = torch.autograd.grad(output, inputs, draw(needs.num_heads))
    return [x.detach().float() for x in (output, *gradients)]


def _import(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise UnavailableError("is not installed") from error
        raise UnavailableError(f"cannot be imported: {error}") from error


@cache
def _load_varlen() -> RaggedKernel:
    varlen_attn = _import("torch.nn.attention.varlen", "varlen_attn")
    # torch 2.11 has no such switch and takes fewer key heads as they are.
    has_switch = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(
        query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scale: float | None
    ) -> Tensor:
        grouped = has_switch and query.shape[1] != key.shape[1]
        output: Tensor = varlen_attn(
            query,
            key,
            value,
            bounds.query_starts,
            bounds.key_starts,
            bounds.max_queries,
            bounds.max_keys,
            scale=scale,
            window_size=(-1, 0 if bounds.causal else -1),  # any key back; none ahead, or any
            **({"enable_gqa": True} if grouped else {}),
        )
        return output

    return attend


@cache
def _load_flash_attn() -> RaggedKernel:
    flash_attn_varlen_func = _import("flash_attn", "flash_attn_varlen_func")

    def attend(
        query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scale: float | None
    ) -> Tensor:
        output: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=bounds.query_starts,
            cu_seqlens_k=bounds.key_starts,
            max_seqlen_q=bounds.max_queries,
            max_seqlen_k=bounds.max_keys,
            softmax_scale=scale,
            causal=bounds.causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),  # torch's own asks itself
        )
        return output

    return attend


_LOADERS: dict[str, Callable[[], RaggedKernel]] = {
    "varlen": _load_varlen,
    "flash_attn": _load_flash_attn,
}

ORDER = ("varlen", "flash_attn", "sdpa")
"""Of preference. The last one runs everywhere."""
