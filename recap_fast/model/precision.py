"""Which dtype a model computes in."""

from __future__ import annotations

from typing import Literal

import torch


def compute_dtype(
    name: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> torch.dtype:
    """The dtype of this name; "auto": bfloat16 where the device has instructions for it, as every
    CUDA device that is supported and CPUs with AVX512-BF16 or AMX have; float32 elsewhere, where
    bfloat16 is emulated and takes several times as long."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    has_bfloat16 = device.type != "cpu" or (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if has_bfloat16 else torch.float32
