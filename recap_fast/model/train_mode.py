"""The mode that a policy is trained in: as rollouts are sampled, so without dropout.

In training mode the trainer's log-probs would not be those of the policy that sampled: the ratio of
an on-policy update would not be 1, and the KL to the model itself not 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def enter_train_mode(model: PreTrainedModel) -> None:
    """Puts a model in evaluation mode, but for what gradient checkpointing needs.

    transformers checkpoints a layer only where the layer itself says that it is training; what it
    is made of need not. For the layer's own sake, and for callers that set the mode of the whole
    model, dropout's probabilities are set to 0 as well.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # this module alone: train() would take its children along
    _disable_dropout(model)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode in all of a model; afterwards each of its modules has its own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _disable_dropout(model: PreTrainedModel) -> None:
    """Sets every probability of dropout and LayerDrop in a model to 0.

    In its modules, and in its configuration, which some models read as they run.
    """
    found: dict[str, float] = {}
    for config in _configs(model.config):
        found |= _zero(config)
    for module in model.modules():
        kind = type(module).__name__
        zeroed = _zero(module, ("p",) if "drop" in kind.lower() else ())
        known = found.values()  # most modules have theirs from the configuration
        found |= {f"{kind}.{name}": value for name, value in zeroed.items() if value not in known}
    if found:
        settings = ", ".join(f"{name} {value:g}" for name, value in found.items())
        logger.info("dropout is off, as rollouts are sampled without it: %s", settings)


def _zero(owner: Any, others: tuple[str, ...] = ()) -> dict[str, float]:
    """Sets an object's own probabilities, and `others`, to 0; returns those that were not.

    They are called attention_dropout, attn_pdrop, layerdrop, drop_path_rate and the like.
    """
    found = {
        name: value
        for name, value in vars(owner).items()
        if ("drop" in name or name in others) and isinstance(value, float) and value != 0
    }
    for name in found:
        setattr(owner, name, 0.0)
    return found


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside of it: of the text model, of the vision tower."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)
