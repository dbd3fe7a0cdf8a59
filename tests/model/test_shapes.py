"""Parameter counts and shapes, against transformers' models on the meta device and against what is
published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
)

from recap_fast.model.errors import ModelError
from recap_fast.model.published_shapes import published_fields
from recap_fast.model.shapes import load_shapes, shapes_of_config, shapes_of_model
from tests.tiny import save_tiny_model, tiny_vision_config

# As the model cards and the safetensors' headers have them.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "smollm2-135m-instruct": 134_515_008,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_models_have_their_parameters(name: str, parameters: int) -> None:
    assert load_shapes(name).parameters == parameters


def _meta_model(fields: dict[str, Any]) -> Any:
    """transformers' model from fields of config.json; those of the text are at the top."""
    fields = dict(fields)
    kind = fields.pop("model_type")
    auto: Any = AutoModelForCausalLM
    if vision := fields.pop("vision_config", None):
        auto = AutoModelForImageTextToText
        tied = fields.pop("tie_word_embeddings")
        config = AutoConfig.for_model(
            kind, text_config=fields, vision_config=vision, tie_word_embeddings=tied
        )
    else:
        config = AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize(
    "name",
    ["qwen2.5-0.5b", "qwen2.5-7b", "qwen3-4b", "qwen3-8b", "llama-3.2-1b", "llama-3.1-8b",
     "smollm2-135m", "qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen3-vl-2b", "qwen3-vl-8b"],
)  # fmt: skip
def test_the_formulas_count_what_transformers_makes(name: str) -> None:
    found, wanted = load_shapes(name), shapes_of_model(_meta_model(published_fields()[name]))
    assert found == wanted


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("tied", [True, False])
def test_vision_models_of_other_shapes(kind: str, tied: bool) -> None:
    config = tiny_vision_config(kind, tied=tied)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert shapes_of_config(config) == shapes_of_model(model)
    model.tie_weights()
    assert shapes_of_config(config).parameters == sum(p.numel() for p in model.parameters())


def test_a_folder_needs_config_json_only(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    parameters = sum(t.numel() for t in AutoModelForCausalLM.from_pretrained(folder).parameters())
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert load_shapes(str(folder)).parameters == parameters


def test_other_models_are_counted_by_making_them(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    wanted = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    shapes = load_shapes(str(tmp_path))
    assert shapes.parameters == wanted
    assert (shapes.layers, shapes.tied, shapes.kv_bytes()) == (3, True, 2 * 3 * 16 * 2)


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_count(biases: dict[str, bool]) -> None:
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=48,
                                  num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, vocab_size=99, **biases)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shapes_of_config(config) == shapes_of_model(model)


def test_unknown_models_are_refused_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    for path in (str(tmp_path), "somebody/Qwen2.5-7B-AWQ", "nobody/none"):
        with pytest.raises(ModelError, match="give a folder with its config.json") as error:
            load_shapes(path)
        assert "\n" not in str(error.value)
