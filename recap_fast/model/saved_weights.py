"""The weights of a model under the names that `from_pretrained` expects."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import Tensor

from recap_fast.model.lora import has_adapters, saved_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def saved_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `save_pretrained` would write: of a model with adapters these alone, else each tied
    weight once, and no buffer that the model says not to save, under the names of the published
    checkpoints, which for vision-language models are not those of transformers' modules. Shards
    stay shards, and nothing is copied where weights are only renamed.

    Raises:
        ValueError: tensors that are one, which the model does not declare as tied.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if has_adapters(model):
        return saved_adapters(model)
    weights = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        weights.pop(name, None)
    for name in _copies(model, weights):
        del weights[name]
    return dict(revert_weight_conversion(model, weights))


def _copies(model: PreTrainedModel, weights: dict[str, Tensor]) -> list[str]:
    """Names to leave out, of tensors that have another. transformers' own function looks for equal
    memory, for which it must flatten each tensor: shards of unequal sizes cannot be."""
    names: dict[int, list[str]] = {}
    for name in weights:
        names.setdefault(id(model.get_parameter_or_buffer(name)), []).append(name)
    tied = [
        f"{module}.{pattern}" if module else pattern
        for module, submodule in model.named_modules()
        for pattern in getattr(submodule, "_tied_weights_keys", None) or ()
    ]
    copies = []
    for same in names.values():
        declared = [name for name in same if any(re.search(pattern, name) for pattern in tied)]
        if len(same) - len(declared) > 1:
            raise ValueError(f"{sorted(same)} are one tensor, and the model does not tie them")
        copies += declared if len(declared) < len(same) else sorted(declared)[:-1]
    return copies
