"""Pictures, a tokenizer and a model folder without weights, for tests of rows with images."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

from recap_fast.data.images import ImageEncoder, VisionTokens
from tests.tiny_tokenizer import tiny_tokenizer

START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"

VISION_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}" + START + IMAGE + END + "{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vision_tokenizer(chat_template: str | None = VISION_CHATML) -> PreTrainedTokenizerFast:
    """The character tokenizer with the special tokens of the Qwen-VL models."""
    tokenizer = tiny_tokenizer(chat_template)
    tokenizer.add_tokens([START, END, IMAGE, VIDEO], special_tokens=True)
    return tokenizer


def vision_tokens(tokenizer: PreTrainedTokenizerFast) -> VisionTokens:
    ids = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO, START, END])
    return VisionTokens(*ids)


def encoder(**budget: int | None) -> ImageEncoder:
    """Patches of 14 pixels, merged two by two: 28 pixels a token along each side."""
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64)
    return ImageEncoder(vision_tokens(vision_tokenizer()), processor, **budget)


MODELS = {
    "qwen2_vl": (Qwen2VLConfig, 14),
    "qwen2_5_vl": (Qwen2_5_VLConfig, 14),
    "qwen3_vl": (Qwen3VLConfig, 16),
}


def save_vision_model(folder: Path, model_type: str = "qwen2_5_vl") -> Path:
    """config.json, preprocessor_config.json and the tokenizer's files; no weights."""
    config_class, patch_size = MODELS[model_type]
    tokenizer = vision_tokenizer()
    tokens = vision_tokens(tokenizer)
    config = config_class(
        image_token_id=tokens.image,
        video_token_id=tokens.video,
        vision_start_token_id=tokens.start,
        vision_end_token_id=tokens.end,
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = 2 * patch_size
    Qwen2VLImageProcessorPil(
        patch_size=patch_size, min_pixels=side * side, max_pixels=64 * side * side
    ).save_pretrained(folder)
    return folder


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Coarse random colours."""
    pixels = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height)).convert(mode)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
