"""Which attention backend runs a model on its device, and what the log says of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from recap_fast.model.attention import SDPA, Backend
from recap_fast.model.attention_backends import (
    AttentionNeeds,
    UnavailableError,
    choose_backend,
    cost_of_sdpa,
)
from recap_fast.model.errors import ModelError
from recap_fast.model.vision import tower_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def choose_attention(
    name: str,
    path: str,
    model: PreTrainedModel,
    compute_dtype: torch.dtype,
    device: torch.device | None = None,
) -> Backend:
    """The backend that runs packed batches of a model on its device, found by trying.

    Args:
        device: instead of the model's own.

    Raises:
        ModelError: the backend is named (not "auto") and cannot run the model.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    needs = AttentionNeeds(
        device=device or model.device,
        dtype=compute_dtype,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
    return _backend_for(name, path, needs)


def choose_vision_attention(
    name: str,
    path: str,
    model: PreTrainedModel,
    compute_dtype: torch.dtype,
    device: torch.device | None = None,
) -> Backend:
    """The same for the patches of images, in a model's vision tower."""
    heads, head_dim = tower_heads(model.config)
    where = device or model.device
    needs = AttentionNeeds(where, compute_dtype, heads, heads, head_dim, causal=False)
    return _backend_for(name, f"the vision tower of {path}", needs)


def _backend_for(name: str, what: str, needs: AttentionNeeds) -> Backend:
    try:
        choice = choose_backend(name, needs)
    except UnavailableError as error:
        raise ModelError(f"model.attention: {name} cannot run {what} here: it {error}") from error
    on_cuda = needs.device.type == "cuda"
    level = logging.INFO if on_cuda else logging.DEBUG  # no news elsewhere
    logger.log(level, "attention of %s: %s", what, choice)
    if on_cuda and choice.backend is SDPA and choice.refused:
        logger.warning(
            "attention of %s falls back to torch's scaled dot product (%s), which is slower and "
            "takes more memory: %s",
            what, "; ".join(choice.reasons()), cost_of_sdpa(needs),
        )  # fmt: skip
    return choice.backend
