"""Language models small enough for tests, with and without vision: real architectures, random
weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLImageProcessorPil,
)

from recap_fast.config import TrainConfig, load_config
from recap_fast.model import attention
from recap_fast.model.policy import Policy
from recap_fast.types import ImageInput
from tests.tiny_tokenizer import tiny_tokenizer
from tests.vision_rows import vision_tokenizer, vision_tokens

VOCAB = 331


def tiny_llama(
    *, tied: bool = True, seed: int = 0, vocab: int = VOCAB, layers: int = 2
) -> LlamaForCausalLM:
    """A Llama with grouped-query attention."""
    attention.register()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attn_implementation=attention.IMPLEMENTATION,
    )
    return LlamaForCausalLM(config)


def tiny_policy(*, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> Policy:
    """Float32 weights, computing in `dtype`."""
    return Policy(tiny_llama(tied=tied, seed=seed), dtype)


VISION_TOKENS = {"image_token_id": VOCAB - 1, "video_token_id": VOCAB - 2,
                 "vision_start_token_id": VOCAB - 3, "vision_end_token_id": VOCAB - 4}  # fmt: skip
PATCH, MERGE = 4, 2  # pixels of a patch's side, patches of an image token's side

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2],
    },
}  # fmt: skip
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 32, "intermediate_size": 48,
        "window_size": 16, "fullatt_block_indexes": [1],  # windows of 2 x 2 image tokens
    },
    "qwen3_vl": {
        "hidden_size": 32, "intermediate_size": 48,
        "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2],
    },
}  # fmt: skip


def tiny_vision_config(
    kind: str, *, tied: bool = True, tokens: dict[str, int] = VISION_TOKENS, **text: Any
) -> Any:
    """Configuration of a vision-language model of one of `recap_fast.model.vision.MODEL_TYPES`.

    Args:
        text: instead of the text model's settings.
    """
    text = _TEXT | text
    output = "hidden_size" if kind == "qwen2_vl" else "out_hidden_size"
    vision = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE,
              "initializer_range": 0.1, output: text["hidden_size"]}  # fmt: skip
    if kind == "qwen3_vl":
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_interleaved": True}
    return AutoConfig.for_model(
        kind,
        text_config=text,
        vision_config=vision | _VISION[kind],
        tie_word_embeddings=tied,
        **tokens,
    )


def tiny_vision_model(kind: str, *, seed: int = 0, **settings: Any) -> Any:
    """A vision-language model as transformers makes it. Biases and norms are random too."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(tiny_vision_config(kind, **settings))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def packed_vision_model(kind: str, **settings: Any) -> Any:
    """The same with the attention that `load_policy` gives it."""
    attention.register()
    model = tiny_vision_model(kind, **settings)
    both = {"": attention.IMPLEMENTATION, "text_config": attention.IMPLEMENTATION}
    model.set_attn_implementation(both)
    return model


def tiny_image(random: np.random.Generator, height: int, width: int) -> ImageInput:
    """An image of height x width image tokens, of noise."""
    grid = (1, height * MERGE, width * MERGE)
    patches = random.normal(size=(grid[1] * grid[2], 3 * 2 * PATCH * PATCH))
    picture = Image.new("RGB", (grid[2] * PATCH, grid[1] * PATCH))
    return ImageInput(picture, torch.from_numpy(patches).float(), grid)


def image_tokens(image: ImageInput) -> list[int]:
    """An image's tokens, with start and end."""
    count = image.grid[1] * image.grid[2] // MERGE**2
    start, end = VISION_TOKENS["vision_start_token_id"], VISION_TOKENS["vision_end_token_id"]
    return [start, *[VISION_TOKENS["image_token_id"]] * count, end]


def save_tiny_model(folder: Path, *, tied: bool = True) -> Path:
    """A model folder with random weights and a character tokenizer."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab=len(tokenizer), tied=tied)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_vision_model(folder: Path, kind: str = "qwen2_5_vl", **text: Any) -> Path:
    """The same of a vision-language model, with an image processor."""
    tokenizer = vision_tokenizer()
    ids = vision_tokens(tokenizer)
    tokens = {"image_token_id": ids.image, "video_token_id": ids.video,
              "vision_start_token_id": ids.start, "vision_end_token_id": ids.end}  # fmt: skip
    model = tiny_vision_model(kind, tokens=tokens, vocab_size=len(tokenizer), **text)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = PATCH * MERGE
    Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, min_pixels=side**2, max_pixels=36 * side**2
    ).save_pretrained(folder)
    return folder


def tiny_settings(folder: Path, model: Path) -> dict[str, Any]:
    """A run of 3 objectives and 4 steps, on the transformers engine, in under a second a step."""
    rewards = {
        "length": "tests.tiny_rewards:length",
        "vowels": "tests.tiny_rewards:vowels",
    }
    return {
        "run": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {
            "sources": [
                {
                    "name": "sums", "kind": "rl", "reasoning_gym": "chain_sum", "size": 100,
                    "parameters": {"min_terms": 2, "max_terms": 2}, "rewards": rewards,
                    "held_out": 4,
                },
                {
                    "name": "words", "kind": "sft", "reasoning_gym": "spell_backward",
                    "size": 100, "parameters": {"max_word_len": 5}, "held_out": 4,
                },
            ],
            "batch_size": 4,
            "mixing": {"sums": 1, "words": 1},
        },
        "rollout": {"engine": "transformers", "group_size": 4, "max_new_tokens": 8},
        "reweighting": {"parameters": {"window": 1}},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 4, "max_tokens": 2048},
        "checkpoint": {"every": 2},
        "logging": {"tensorboard": False},
    }  # fmt: skip


def tiny_config(folder: Path, model: Path, *overrides: str) -> TrainConfig:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(folder, model)))
    return load_config(path, overrides)
