"""What config.json says of published models, so that a plan for one needs no network.

One line a size. Text: hidden, intermediate, layers, heads, key-value heads, head dimension,
vocabulary, whether the head is tied to the embedding. Towers: depth, hidden, intermediate.
"""

from __future__ import annotations

from typing import Any

_TEXT = {
    "qwen2": {
        "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 64, 151936, True),
        "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
        "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 128, 151936, True),
        "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 128, 152064, False),
        "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 128, 152064, False),
        "Qwen2.5-32B": (5120, 27648, 64, 40, 8, 128, 152064, False),
        "Qwen2.5-72B": (8192, 29568, 80, 64, 8, 128, 152064, False),
    },
    "qwen3": {
        "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, 151936, True),
        "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, 151936, True),
        "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151936, True),
        "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151936, False),
        "Qwen3-14B": (5120, 17408, 40, 40, 8, 128, 151936, False),
        "Qwen3-32B": (5120, 25600, 64, 64, 8, 128, 151936, False),
    },
    "llama": {
        "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152, True),
        "SmolLM2-360M": (960, 2560, 32, 15, 5, 64, 49152, True),
        "SmolLM2-1.7B": (2048, 8192, 24, 32, 32, 64, 49152, True),
        "Llama-2-7B": (4096, 11008, 32, 32, 32, 128, 32000, False),
        "Llama-2-13B": (5120, 13824, 40, 40, 40, 128, 32000, False),
        "Llama-2-70B": (8192, 28672, 80, 64, 8, 128, 32000, False),
        "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
        "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128, 128256, True),
        "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
        "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128, 128256, False),
        "Llama-3.3-70B": (8192, 28672, 80, 64, 8, 128, 128256, False),
        "Llama-3.1-405B": (16384, 53248, 126, 128, 8, 128, 128256, False),
    },
}
_VISION = {
    "qwen2_5_vl": {
        "Qwen2.5-VL-3B": ("Qwen2.5-3B", (32, 1280, 3420)),
        "Qwen2.5-VL-7B": ("Qwen2.5-7B", (32, 1280, 3420)),
        "Qwen2.5-VL-32B": ("Qwen2.5-32B", (32, 1280, 3456)),
        "Qwen2.5-VL-72B": ("Qwen2.5-72B", (32, 1280, 3456)),
    },
    "qwen3_vl": {
        "Qwen3-VL-2B": ("Qwen3-1.7B", (24, 1024, 4096)),
        "Qwen3-VL-4B": ("Qwen3-4B", (24, 1024, 4096)),
        "Qwen3-VL-8B": ("Qwen3-8B", (27, 1152, 4304)),
        "Qwen3-VL-32B": ("Qwen3-32B", (27, 1152, 4304)),
    },
}
_TEXT_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_TOWER_KEYS = ("depth", "hidden_size", "intermediate_size")
_TOWER: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"patch_size": 14},
    "qwen3_vl": {
        "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1, 2],
    },
}  # fmt: skip
"""What the sizes of a family share; of the layers that feed Qwen3-VL's mergers, their number."""


def published_fields() -> dict[str, dict[str, Any]]:
    """Name without owner and suffix, in lower case -> fields of its config.json."""
    found: dict[str, dict[str, Any]] = {}
    texts = {name: sizes for family in _TEXT.values() for name, sizes in family.items()}
    for kind, family in _TEXT.items():
        for name, sizes in family.items():
            found[name.lower()] = {
                "model_type": kind, **dict(zip(_TEXT_KEYS, sizes, strict=True)),
            }  # fmt: skip
    for kind, vision_family in _VISION.items():
        for name, (text, tower) in vision_family.items():
            fields = dict(zip(_TEXT_KEYS, texts[text], strict=True))
            vision: dict[str, Any] = {
                **dict(zip(_TOWER_KEYS, tower, strict=True)), **_TOWER[kind],
                "out_hidden_size": fields["hidden_size"],
                "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
            }  # fmt: skip
            found[name.lower()] = {"model_type": kind, **fields, "vision_config": vision}
    return found
