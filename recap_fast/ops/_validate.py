"""Checks at the public boundary: shapes, dtypes, devices. Never values, so that nothing syncs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recap_fast.ops.launch import why_unavailable

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FULL_DTYPES = (torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)
NUMBER_DTYPES = FULL_DTYPES + INTEGER_DTYPES
IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
IGNORED_TARGET = -100


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of log-probs, ratios and sums: float64 for float64 operands, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[tuple[str, int | None]],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> Tensor:
    """Return `value` if it is a plain tensor of that shape (None: any size), dtype and device."""
    wanted = "[" + ", ".join(f"{n}={size}" if size is not None else n for n, size in shape) + "]"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: wanted a tensor of shape {wanted}, got {type(value).__name__}")
    if hasattr(value, "device_mesh"):
        raise ValueError(f"{name}: wanted a plain tensor, got a DTensor; pass its full_tensor()")
    matches = value.dim() == len(shape) and all(
        size is None or size == got for (_, size), got in zip(shape, value.shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name}: wanted shape {wanted}, got {list(value.shape)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: wanted dtype {names}, got {str(value.dtype)[6:]}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: wanted device {device} (that of hidden), got {value.device}")
    return value


def check_head(
    hidden: object, weight: object, targets: object, bias: object
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check the operands of the head: hidden [N, H], weight [V, H], targets [N], bias [V]."""
    hidden = check_tensor("hidden", hidden, [("N", None), ("H", None)], COMPUTE_DTYPES)
    n, h = hidden.shape
    device = hidden.device
    weight = check_tensor("weight", weight, [("V", None), ("H", h)], COMPUTE_DTYPES, device)
    if weight.shape[0] == 0:
        raise ValueError(f"weight: wanted at least one vocabulary row, got {list(weight.shape)}")
    targets = check_tensor("targets", targets, [("N", n)], (torch.int64,), device)
    if bias is not None:
        bias = check_tensor("bias", bias, [("V", weight.shape[0])], COMPUTE_DTYPES, device)
    return hidden, weight, targets, bias


def check_scale(temperature: float, logit_softcap: float | None) -> None:
    """Check the two scalars that shape the logits."""
    if not temperature > 0:
        raise ValueError(f"temperature: wanted a number > 0, got {temperature}")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap: wanted None or a number > 0, got {logit_softcap}")


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation to run: "reference", "torch" or "triton".

    An explicit name is run or refused, never replaced. "auto" is Triton on CUDA, except for
    float64 operands, and torch elsewhere: Triton's interpreter has to be asked for by name.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: wanted one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl in ("torch", "reference"):
        return impl
    reason = why_unavailable(device)
    if dtype == torch.float64:
        reason = "the kernels compute in float32, and the operands are float64"
    if impl == "triton" and reason is not None:
        raise ValueError(f'impl="triton" cannot run here: {reason}; use impl="torch" or "auto"')
    return "triton" if reason is None and (impl == "triton" or device.type == "cuda") else "torch"
