"""Sizes of a model and of its parts, without its weights: what a plan of memory is made from.

Those of published Qwen and Llama models come with the package; of others from a folder's
config.json (or the hub's cache). Models built like Llama are counted by formula, others by making
them on the meta device, where nothing is allocated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recap_fast.model.errors import ModelError
from recap_fast.model.model_path import SMOLLM2
from recap_fast.model.published_shapes import published_fields

_SUFFIX = re.compile(
    r"(-(instruct|base|chat|it|hf|thinking|math|coder|2507|v\d(\.\d)?))+$", re.IGNORECASE
)
_FORMULA_TYPES = ("llama", "qwen2", "qwen3", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True, slots=True)
class TowerShapes:
    """Of a vision tower with its mergers."""

    depth: int
    hidden: int
    intermediate: int
    patch_values: int  # of a patch, float32 pixels
    patches_per_token: int
    parameters: int


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """Dimensions, and parameters by part. A tied head has none of its own."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    has_qk_norm: bool
    embedding: int  # parameters, as all below
    head: int
    layer: int  # of the largest decoder layer
    all_layers: int
    other: int  # the final norm, and what else belongs to no layer
    tower: TowerShapes | None

    @property
    def text_parameters(self) -> int:
        return self.embedding + self.head + self.all_layers + self.other

    @property
    def tower_parameters(self) -> int:
        return 0 if self.tower is None else self.tower.parameters

    @property
    def parameters(self) -> int:
        return self.text_parameters + self.tower_parameters

    @property
    def largest_tensor(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def queries(self) -> int:
        """Width of all heads' queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all heads' keys."""
        return self.kv_heads * self.head_dim

    def kv_bytes(self, bytes_per_value: int = 2) -> int:
        """Of a token in the cache of keys and values."""
        return 2 * self.layers * self.keys * bytes_per_value


def load_shapes(path: str) -> ModelShapes:
    """The shapes of a model by what `ModelConfig.path` names; reads no weights and no network.

    Raises:
        ModelError: it is no published size that is known here, and there is no config.json.
    """
    path = os.path.expanduser(path)
    if not os.path.isdir(path) and (fields := _published(path)):
        return shapes_of_fields(fields)
    return shapes_of_config(_local_config(path))


def _published(path: str) -> dict[str, Any] | None:
    name = path.rpartition("/")[2].lower()
    # Qwen2.5-Math-7B and Qwen2.5-Coder-7B have the shapes of Qwen2.5-7B; Meta-Llama is Llama.
    name = name.removeprefix("meta-").replace("-math-", "-").replace("-coder-", "-")
    return published_fields().get(_SUFFIX.sub("", name))


def _local_config(path: str) -> Any:
    from transformers import AutoConfig

    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        raise ModelError(f"model.path: {path} has no config.json: give a model's folder")
    if os.path.isabs(path) and not os.path.exists(path):
        raise ModelError(f"model.path: there is no folder {path[:200]}")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of a damaged folder transformers raises anything
        first = " ".join(str(error).split())[:160]
        raise ModelError(
            f"model.path: the shapes of {path[:200]} are not known here: give a folder with its "
            f"config.json (no weights are needed) or a published Qwen2.5, Qwen3, Qwen2.5-VL, "
            f"Qwen3-VL or Llama model, or {SMOLLM2!r} ({first})"
        ) from error


def shapes_of_config(config: Any) -> ModelShapes:
    """Of transformers' configuration of a model.

    Raises:
        ModelError: transformers cannot make such a model.
    """
    if config.model_type not in _FORMULA_TYPES:
        return _counted(config)
    text = config.get_text_config()
    fields = text.to_dict() | {
        "model_type": config.model_type,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": getattr(text, "attention_bias", False),
        "mlp_bias": getattr(text, "mlp_bias", False),
    }
    if vision := getattr(config, "vision_config", None):
        fields["vision_config"] = vision.to_dict()
    return shapes_of_fields(fields)


def shapes_of_fields(fields: Mapping[str, Any]) -> ModelShapes:
    """Of the fields of config.json, those of the text model at the top, for the types that are
    built like Llama: parameters are counted by formula."""
    kind, hidden = fields["model_type"], fields["hidden_size"]
    inner, heads = fields["intermediate_size"], fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads") or heads
    head_dim = fields.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, kv_heads * head_dim
    has_qk_norm = kind.startswith("qwen3")
    layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * inner + 2 * hidden
    if kind.startswith("qwen2"):  # biases of q, k and v
        layer += queries + 2 * keys
    elif fields.get("attention_bias"):
        layer += queries + 2 * keys + hidden
    if fields.get("mlp_bias"):
        layer += 2 * inner + hidden
    layer += 2 * head_dim if has_qk_norm else 0
    embedding, layers = fields["vocab_size"] * hidden, fields["num_hidden_layers"]
    return ModelShapes(
        model_type=kind, hidden=hidden, intermediate=inner, layers=layers, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, vocabulary=fields["vocab_size"],
        tied=fields["tie_word_embeddings"], has_qk_norm=has_qk_norm, embedding=embedding,
        head=0 if fields["tie_word_embeddings"] else embedding, layer=layer,
        all_layers=layers * layer, other=hidden,
        tower=_tower(kind, fields["vision_config"]) if "vision_config" in fields else None,
    )  # fmt: skip


def _tower(kind: str, vision: Mapping[str, Any]) -> TowerShapes:
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    output, merged = vision["out_hidden_size"], vision["spatial_merge_size"] ** 2
    patch = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    attention = 4 * hidden * hidden + 4 * hidden
    wide = merged * hidden
    merger = wide * wide + wide + wide * output + output
    if kind == "qwen2_5_vl":  # RMS norms, a gated MLP
        block = attention + 2 * hidden + 3 * hidden * inner + 2 * inner + hidden
        total = patch * hidden + vision["depth"] * block + hidden + merger
    else:  # layer norms, two linear layers, a merger for each layer that feeds the text model's
        block = attention + 4 * hidden + 2 * hidden * inner + inner + hidden
        deep = len(vision["deepstack_visual_indexes"]) * (merger + 2 * wide)
        embedded = patch * hidden + hidden + vision["num_position_embeddings"] * hidden
        total = embedded + vision["depth"] * block + 2 * hidden + merger + deep
    return TowerShapes(vision["depth"], hidden, inner, patch, merged, total)


def _counted(config: Any) -> ModelShapes:
    """By making the model on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from recap_fast.model.vision import is_vision_language

    auto = AutoModelForImageTextToText if is_vision_language(config) else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto.from_config(config)
        return shapes_of_model(model)
    except Exception as error:  # transformers raises anything for what it does not know
        first = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model.path: models of type {config.model_type!r} cannot be planned for: {first}"
        ) from error


def shapes_of_model(model: Any) -> ModelShapes:
    """Of a model that is there, on any device, the meta device too."""
    config, text = model.config, model.config.get_text_config()
    heads = text.num_attention_heads
    visual = getattr(model.base_model, "visual", None)

    def count(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    decoder, embedding = model.get_decoder(), model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    tied = config.tie_word_embeddings or head is embedding
    per_layer = [count(layer) for layer in decoder.layers]
    tower = 0 if visual is None else count(visual)
    own_head = 0 if tied else head.numel()
    # On the meta device a tied head may not be tied yet.
    everything = count(model) - (head.numel() if tied and head is not embedding else 0)
    return ModelShapes(
        model_type=config.model_type, hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
        layers=len(per_layer), heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=embedding.shape[0], tied=tied,
        has_qk_norm=hasattr(decoder.layers[0].self_attn, "q_norm"),
        embedding=embedding.numel(), head=own_head, layer=max(per_layer),
        all_layers=sum(per_layer),
        other=everything - tower - sum(per_layer) - embedding.numel() - own_head,
        tower=None if visual is None else _tower_of_model(visual, config.vision_config, tower),
    )  # fmt: skip


def _tower_of_model(visual: Any, vision: Any, parameters: int) -> TowerShapes:
    patch = visual.patch_embed.proj.weight
    hidden = patch.shape[0]
    inner = getattr(vision, "intermediate_size", None) or int(hidden * vision.mlp_ratio)
    merged = vision.spatial_merge_size**2
    return TowerShapes(vision.depth, hidden, inner, patch[0].numel(), merged, parameters)
