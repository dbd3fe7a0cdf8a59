"""The model that a folder of adapters makes of its base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from recap_fast.config import ModelConfig
from recap_fast.model.lora import LoraError, base_of
from recap_fast.model.model_path import resolve_model
from recap_fast.model.policy import find_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_merged(folder: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The base with the adapters added to its weights, on the CPU, in `dtype`, or in the base's
    own; there is no adapter in it any more.

    The sums are made in float32 and rounded once, as the weights were that the engine sampled from.

    Raises:
        ModelError: the base cannot be found or loaded.
        LoraError: the adapters are not those of this base.
    """
    from peft import PeftModel

    config = ModelConfig(path=folder, device="cpu")
    base = resolve_model(base_of(folder))
    auto_class, published = find_class(config, folder, torch.device("cpu"), False)
    model = auto_class.from_pretrained(base, dtype=torch.float32)
    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:300]
        raise LoraError(f"{folder}: its adapters do not fit {base}: {first}") from error
    done: PreTrainedModel = merged.to(dtype or published.dtype or torch.float32)
    return done
