"""liger-kernel's kernels in a model's backbone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from recap_fast.config import ModelConfig


def patch_backbone(config: ModelConfig, model_type: str, device: torch.device) -> None:
    """Has models of the type that are made from now on run Liger's kernels, where they can.

    For the whole process: CPU tensors in a patched model are an error.
    """
    if config.liger and device.type == "cuda":
        _apply_liger(model_type)


_LIGER_MISSES = {
    "qwen2_vl": {"apply_rotary_pos_emb": "liger_rotary_pos_emb"},
    "qwen2_5_vl": {"apply_rotary_pos_emb": "liger_rotary_pos_emb"},
    "qwen3_vl": {"Qwen3VLTextMLP": "LigerSwiGLUMLP"},
}
"""By model type: names of transformers' module that Liger's own patch leaves, and Liger's for them.
It patches the rotary embedding that these models had when it took three sets of angles, which are
now merged before ([1, T, D], as in text models), and no MLP of Qwen3-VL."""


def _apply_liger(model_type: str) -> None:
    """Patches the backbone's norms, rotary embedding and MLP; the head's loss is our own."""
    from liger_kernel import transformers as liger
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if patch is None:
        return
    patch(cross_entropy=False, fused_linear_cross_entropy=False)
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    for name, replacement in _LIGER_MISSES.get(model_type, {}).items():
        if hasattr(module, name):  # releases differ
            setattr(module, name, getattr(liger, replacement))


def spare_rotary_inputs(layer: nn.Module) -> None:
    """Has Liger's rotary embedding, where a layer's model runs it, rotate copies.

    It overwrites queries and keys, by a kernel that torch does not know to write. Outputs of
    products that are kept to be used again would be rotated twice, and no error raised. For the
    whole process.
    """
    modules = [sys.modules[type(part).__module__] for part in layer.modules()]
    for module in {id(module): module for module in modules}.values():
        for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"):
            rotate = getattr(module, name, None)
            if rotate is not None and rotate.__module__.startswith("liger_kernel."):
                setattr(module, name, _rotating_copies(rotate))


def _rotating_copies(rotate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(rotate)
    def rotate_copies(q: Tensor, k: Tensor, *others: Any, **named: Any) -> Any:
        return rotate(q.clone(), k.clone(), *others, **named)

    rotate_copies.__module__ = __name__  # so that it is copied for once
    return rotate_copies
