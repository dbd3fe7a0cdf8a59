"""Bytes that a forward and backward pass holds, from a model's shapes.

Counted by the tensors that autograd keeps in transformers' layers, by Liger's kernels where they
run: queries, keys, values and outputs of attention, inputs and outputs of norms, what the MLP
multiplies.
Shapes: T tokens of a pass, H hidden, I intermediate, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from recap_fast.model.checkpointing import LayerModes, Mode
from recap_fast.model.shapes import ModelShapes
from recap_fast.ops.adamw import BLOCK
from recap_fast.ops.chunked import chunk_rows

FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Part:
    """Something that takes memory."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Kernels:
    """How a backbone computes.

    Attributes:
        value_bytes: of the compute dtype.
        fused: Liger's norms and MLP keep fewer tensors than transformers' own.
        device: "cpu" pads segments for attention and sums gradients without FSDP.
    """

    value_bytes: int
    fused: bool
    device: Literal["cpu", "cuda"] = "cuda"


def moment_bytes(state: str) -> float:
    """AdamW's two moments of one parameter.

    Args:
        state: `optimizer.state`. What 8 bits leave in float32, vectors, is small.
    """
    return {"float32": 2.0 * FLOAT32, "bfloat16": 4.0, "8bit": 2 * (1 + FLOAT32 / BLOCK)}[state]


def norm_bytes(width: int, kernels: Kernels) -> int:
    """What a norm and its reader keep of one token: input and output; transformers' own a float32
    copy of the input and the normalised values too."""
    kept = 2 * kernels.value_bytes
    return width * (kept if kernels.fused else kept + FLOAT32)


def layer_bytes(shapes: ModelShapes, kernels: Kernels) -> int:
    """What a decoder layer keeps of one token until its backward pass."""
    attention = 2 * shapes.queries + 2 * shapes.keys
    if kernels.device == "cpu":  # the output as padded, and as packed again
        attention += shapes.queries
    mlp = (3 if kernels.fused else 4) * shapes.intermediate
    norms = 2 * norm_bytes(shapes.hidden, kernels)
    if shapes.has_qk_norm:
        # The output goes into the rotary embedding, which keeps nothing.
        width = shapes.queries + shapes.keys
        norms += norm_bytes(width, kernels) - width * kernels.value_bytes
    return norms + (attention + mlp) * kernels.value_bytes


def kept_layer_bytes(shapes: ModelShapes, kernels: Kernels, mode: Mode) -> int:
    """The same of a layer that waits for its turn: with full checkpointing its input, with
    selective checkpointing that and the outputs of its matrix products and of attention."""
    if mode == "none":
        return layer_bytes(shapes, kernels)
    if mode == "full":
        return shapes.hidden * kernels.value_bytes
    products = 2 * shapes.queries + 2 * shapes.keys + 2 * shapes.intermediate
    return (2 * shapes.hidden + products) * kernels.value_bytes


def activation_bytes(shapes: ModelShapes, kernels: Kernels, tokens: int, modes: LayerModes) -> int:
    """What waits for the backward pass: of all layers, and of the final norm with the states that
    enter the loss."""
    per_token = sum(kept_layer_bytes(shapes, kernels, mode) for mode in modes.in_order())
    final = norm_bytes(shapes.hidden, kernels) + shapes.hidden * kernels.value_bytes
    return tokens * (per_token + final)


def recomputed_bytes(shapes: ModelShapes, kernels: Kernels, tokens: int, modes: LayerModes) -> int:
    """Of the layer that the backward pass has arrived at; where some keep everything, they come
    first, and leave more room than this takes."""
    return 0 if modes.none else tokens * layer_bytes(shapes, kernels)


def backward_bytes(shapes: ModelShapes, kernels: Kernels, tokens: int) -> int:
    """Gradients between operations: two of the MLP's width and three of the residual's at once."""
    width = 2 * shapes.intermediate + 3 * shapes.hidden
    return tokens * width * kernels.value_bytes


def logits_bytes(
    shapes: ModelShapes, kernels: Kernels, tokens: int, *, bfloat16_logits: bool = False
) -> int:
    """Of the fused loss's chunk of logits with their gradient, and the states' gradient."""
    rows = min(tokens, chunk_rows(shapes.vocabulary, torch.device(kernels.device)))
    same = kernels.value_bytes == FLOAT32 or bfloat16_logits
    per_logit = kernels.value_bytes if same else FLOAT32 + kernels.value_bytes
    return rows * shapes.vocabulary * per_logit + tokens * shapes.hidden * kernels.value_bytes


def tower_bytes(shapes: ModelShapes, kernels: Kernels, tokens: int) -> tuple[int, int, int]:
    """Of the vision tower where every token of a pass is an image's: pixels, what a block keeps,
    and what all blocks keep."""
    tower = shapes.tower
    if tower is None:
        return 0, 0, 0
    patches = tokens * tower.patches_per_token
    block = 2 * norm_bytes(tower.hidden, kernels)
    block += (4 * tower.hidden + 4 * tower.intermediate) * kernels.value_bytes
    return patches * tower.patch_values * FLOAT32, patches * block, patches * block * tower.depth


def layer_widths(shapes: ModelShapes) -> dict[str, int]:
    """Inputs + outputs of a layer's linear modules, by name."""
    hidden, inner = shapes.hidden, shapes.intermediate
    return {
        "q_proj": hidden + shapes.queries, "k_proj": hidden + shapes.keys,
        "v_proj": hidden + shapes.keys, "o_proj": hidden + shapes.queries,
        "gate_proj": hidden + inner, "up_proj": hidden + inner, "down_proj": hidden + inner,
    }  # fmt: skip


def adapter_parameters(
    shapes: ModelShapes, rank: int, targets: str | list[str], *, trains_tower: bool
) -> int:
    """Of LoRA's adapters: rank * (inputs + outputs) of every linear layer that has one. Those of a
    tower are counted as if each block had a gated MLP."""
    widths = layer_widths(shapes)
    if targets != "all-linear":
        named = {target.rpartition(".")[2] for target in targets}
        widths = {name: width for name, width in widths.items() if name in named}
    found = rank * shapes.layers * sum(widths.values())
    if (tower := shapes.tower) is not None and trains_tower:
        block = 6 * tower.hidden + 3 * (tower.hidden + tower.intermediate)
        found += rank * tower.depth * block
    return found
