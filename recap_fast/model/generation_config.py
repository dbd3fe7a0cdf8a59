"""Makes a model's generation config one that transformers agrees to save again.

transformers loads what it refuses to save, such as a temperature beside `do_sample: false`: without
this the first checkpoint would raise. Training has no use for these settings.
"""

from __future__ import annotations

import logging
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_NOT_SETTINGS = ("transformers_version", "_from_model_config")


def repair_generation_config(model: PreTrainedModel) -> None:
    """Drops from a model's generation config the settings with which it could not be saved."""
    config = getattr(model, "generation_config", None)
    if config is None or _can_be_saved(config):
        return
    names = [name for name in config.to_diff_dict() if name not in _NOT_SETTINGS]
    repaired, refused = type(config)(), names
    # What goes together (do_sample and temperature) may come in any order: until none fits.
    while fitting := [name for name in refused if _take(repaired, config, name)]:
        refused = [name for name in refused if name not in fitting]
    model.generation_config = repaired
    logger.warning(
        "model.path: transformers does not save a generation config as this model's; its "
        "checkpoints will be without %s, which training has no use for",
        ", ".join(f"{name} {getattr(config, name)!r}" for name in refused),
    )


def _take(target: GenerationConfig, source: GenerationConfig, name: str) -> bool:
    """Takes a setting over, if the result can be saved."""
    before = getattr(target, name, None)
    setattr(target, name, getattr(source, name))
    if _can_be_saved(target):
        return True
    setattr(target, name, before)
    return False


def _can_be_saved(config: GenerationConfig) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except (
            ValueError,
            TypeError,
            AttributeError,
        ):  # its own checks, or what JSON has no word for
            return False
    return True
