"""Loads language models, with vision or without, and runs their backbones on packed batches.

Attention over a batch without padding, and the kernels that it may use, are chosen here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on

if TYPE_CHECKING:
    from recap_fast.model.model_path import resolve_model
    from recap_fast.model.policy import Policy, load_policy, load_tokenizer

__all__ = [
    "Policy",
    "load_policy",
    "load_tokenizer",
    "resolve_model",
]

__getattr__ = hand_on(
    __name__,
    {
        "Policy": "policy",
        "load_policy": "policy",
        "load_tokenizer": "policy",
        "resolve_model": "model_path",
    },
)
