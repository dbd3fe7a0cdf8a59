"""The plan's bytes against the peak of resident memory of a real training step on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from benchmarks.measuring import CLEAR_REFS, in_fresh_process
from recap_fast.model.shapes import shapes_of_config
from recap_fast.training.memory_plan import plan_memory
from tests.training import measured_memory

_SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "activations of all layers": (
        {"model_type": "llama", "hidden_size": 384, "intermediate_size": 1024,
         "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
         "vocab_size": 8192, "tie_word_embeddings": False},
        {"gradient_checkpointing": "none", "max_tokens": 1024}, 256,
    ),
    "checkpointing, norms of queries and keys": (
        {"model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 64, "vocab_size": 16384, "tie_word_embeddings": True},
        {"gradient_checkpointing": "full", "max_tokens": 2048}, 256,
    ),
    "selective checkpointing": (
        {"model_type": "llama", "hidden_size": 384, "intermediate_size": 1024,
         "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
         "vocab_size": 8192, "tie_word_embeddings": False},
        {"gradient_checkpointing": "selective", "max_tokens": 2048}, 256,
    ),
    "parameters, a large vocabulary": (
        {"model_type": "qwen2", "hidden_size": 640, "intermediate_size": 2560,
         "num_hidden_layers": 6, "num_attention_heads": 10, "num_key_value_heads": 2,
         "vocab_size": 32768, "tie_word_embeddings": True},
        {"gradient_checkpointing": "none", "max_tokens": 512}, 128,
    ),
}  # fmt: skip
_MANY_PARAMETERS = _SHAPES["parameters, a large vocabulary"]
for _state in ("bfloat16", "8bit"):
    _settings = _MANY_PARAMETERS[1] | {"state": _state}
    _SHAPES[f"AdamW's moments, {_state}"] = (_MANY_PARAMETERS[0], _settings, 128)
_ALWAYS = ("selective checkpointing", "AdamW's moments, 8bit")


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize(
    "name",
    [
        name if name in _ALWAYS else pytest.param(name, marks=pytest.mark.variant)
        for name in _SHAPES
    ],
)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(name: str) -> None:
    fields, settings, length = _SHAPES[name]
    config = measured_memory.make_config(**settings)
    shapes = shapes_of_config(AutoConfig.for_model(**fields))
    plan = plan_memory(config, shapes, 1, 2**40)
    # The plan leaves room for the overfull pass that `max_tokens` allows; so fill it.
    tokens = int(settings["max_tokens"] * 1.05) // length * length
    measured = in_fresh_process(measured_memory.peak, fields, settings, tokens, length)
    print(f"{name}: planned {plan.total / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    for part in (*plan.parts, *plan.stages["training pass"]):
        print(f"    {part.name}: {part.bytes / 2**20:.0f} MiB")
    assert plan.total == pytest.approx(measured, rel=0.1)
