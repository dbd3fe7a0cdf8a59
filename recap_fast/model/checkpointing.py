"""Activation checkpointing: what a decoder layer keeps for its backward pass.

full: its input alone; everything is computed again. selective: also what takes long to compute for
its size, the outputs of attention and of products with the layer's weights; norms, activations and
rotary embeddings are computed again. Gradients are the same to the last bit in all modes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from recap_fast.model.liger import spare_rotary_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["none", "selective", "full"]

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class LayerModes:
    """How many of a model's layers are in each mode, in the order of the layers.

    Those that keep least come first: the backward pass comes to them when the memory of the others
    is free again, and what it computes again finds room there.
    """

    full: int
    selective: int
    none: int

    @classmethod
    def uniform(cls, mode: Mode, layers: int) -> LayerModes:
        return cls(**{name: layers * (name == mode) for name in ("full", "selective", "none")})

    @classmethod
    def by_cost(cls, layers: int) -> list[LayerModes]:
        """All choices for a number of layers, those that compute least again first."""
        some = [cls(0, count, layers - count) for count in range(layers + 1)]
        return some + [cls(count, layers - count, 0) for count in range(1, layers + 1)]

    def in_order(self) -> list[Mode]:
        modes: list[Mode] = ["full"] * self.full
        modes += ["selective"] * self.selective
        return modes + ["none"] * self.none

    def describe(self) -> str:
        there = {"full": self.full, "selective": self.selective, "no": self.none}
        parts = [f"{count} {name}" for name, count in there.items() if count]
        if len(parts) == 1:
            return f"{parts[0].partition(' ')[2]} checkpointing"
        return f"{' + '.join(parts)} checkpointing"


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model's text decoder, whatever it calls them: GPT-2's are `h`."""
    decoder = model.get_decoder()
    return next(part for part in decoder.children() if isinstance(part, nn.ModuleList))


def checkpoint_layers(model: PreTrainedModel, modes: LayerModes) -> None:
    """Sets the mode of each decoder layer; the blocks of a vision tower get that of the first.

    A layer checkpoints while it is in training mode itself, which this puts it in or takes it out
    of; what it is made of stays as it is.

    Raises:
        ValueError: the model's layers cannot be checkpointed, or are not as many as `modes` says.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = list(decoder_layers(model))
    wanted = modes.in_order()
    if len(layers) != len(wanted):
        raise ValueError(f"wanted modes of {len(layers)} layers, got {len(wanted)}")
    if modes.none < len(layers) and not isinstance(layers[0], GradientCheckpointingLayer):
        raise ValueError(f"layers of type {type(layers[0]).__name__} cannot be checkpointed")
    mode_of = dict(zip(layers, wanted, strict=True))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            _set_mode(module, mode_of.get(module, wanted[0]))


def _set_mode(layer: Any, mode: Mode) -> None:
    layer.gradient_checkpointing = layer.training = mode != "none"
    settings: dict[str, Any] = {}
    if mode == "selective":
        spare_rotary_inputs(layer)
        keeps = _KeepsDearOutputs.of(layer)
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, keeps)
    # Nothing random runs in a layer: dropout is off.
    layer._gradient_checkpointing_func = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, **settings
    )


@dataclass(frozen=True, slots=True)
class _KeepsDearOutputs:
    """Which operators' outputs stay.

    Attributes:
        narrowest: inputs of the layer's products, the fewest; those of LoRA's adapters have fewer,
            and are computed again.
        last: inputs and outputs of the layer's last product, whose outputs nothing in it reads;
            None where others have the same shape, and with adapters, which make it again on the way
            to their own.
    """

    narrowest: int
    last: tuple[int, int] | None

    @classmethod
    def of(cls, layer: nn.Module) -> _KeepsDearOutputs:
        linear = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        shapes = [
            (module.in_features, module.out_features)
            for name, module in linear.items()
            if ".lora_" not in name
        ]
        if not shapes:
            return cls(0, None)
        is_plain = len(shapes) == len(linear) and shapes.count(shapes[-1]) == 1
        return cls(min(inputs for inputs, _ in shapes), shapes[-1] if is_plain else None)

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = _is_attention(operator)
        if operator in _PRODUCTS:
            left, right = args[_PRODUCTS[operator] :][:2]
            kept = left.shape[-1] >= self.narrowest
            kept = kept and (left.shape[-1], right.shape[-1]) != self.last
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS: dict[Callable[..., Any], int] = {_aten.mm.default: 0, _aten.addmm.default: 1}
"""Where a product's two factors are among its arguments."""


@cache
def _is_attention(operator: Any) -> bool:
    """Of torch, of flash-attn, or of another package that names it so."""
    name = operator._schema.name
    return ("attention" in name or "attn" in name) and "backward" not in name
