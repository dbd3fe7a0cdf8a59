"""What transformers loads but would not save is repaired when a model is loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from recap_fast.config import ModelConfig
from recap_fast.model.errors import ModelError
from recap_fast.model.generation_config import repair_generation_config
from recap_fast.model.policy import load_policy
from tests.tiny import save_tiny_model, tiny_llama


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, {"temperature", "top_p"}),
        ({"temperature": 0.9}, {"temperature"}),
        ({"top_k": 20, "min_p": 0.1, "typical_p": 0.5, "eta_cutoff": 0.1},
         {"top_k", "min_p", "typical_p", "eta_cutoff"}),
        ({"pad_token_id": -1}, {"pad_token_id"}),
        ({"num_beams": 1, "length_penalty": 0.5, "early_stopping": True},
         {"length_penalty", "early_stopping"}),
        ({"output_scores": True}, {"output_scores"}),
        ({"use_cache": False, "cache_implementation": "static"}, {"cache_implementation"}),
        ({"num_return_sequences": 3}, {"num_return_sequences"}),
        ({"stop_strings": {"a"}}, {"stop_strings"}),  # no JSON
        ({"max_new_tokens": 0, "early_stopping": "x"}, {"max_new_tokens", "early_stopping"}),
    ],
)  # fmt: skip
def test_only_what_cannot_be_saved_goes(
    settings: dict[str, Any], dropped: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    config = GenerationConfig(eos_token_id=[3, 5], bos_token_id=1, repetition_penalty=1.1)
    for name, value in settings.items():
        setattr(config, name, value)
    model.generation_config = config
    with pytest.raises((ValueError, TypeError)):
        config.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        repair_generation_config(model)
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == [3, 5]
    assert (saved.bos_token_id, saved.repetition_penalty) == (1, 1.1)
    for name in settings.keys() - dropped:
        assert getattr(saved, name) == settings[name], name
    (message,) = [r.getMessage() for r in caplog.records]
    assert all(name in message for name in dropped)
    assert "eos_token_id" not in message


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "num_return_sequences": 4}],
)
def test_a_sound_one_is_left_alone(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    model.generation_config = config = GenerationConfig(eos_token_id=3, **settings)
    repair_generation_config(model)
    assert model.generation_config is config
    assert not caplog.records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def edit(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_loaded_policy_can_be_saved(folder: Path, tmp_path: Path) -> None:
    edit(folder / "generation_config.json", do_sample=False, temperature=0.9, top_p=0.6)
    model = load_policy(ModelConfig(path=str(folder), device="cpu"), str(folder)).model
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", '{"early_stopping": "x"}', "early_stopping"),
        ("generation_config.json", "[]", "could not be loaded"),
        ("config.json", '{"model_type": "llama", "hidden_act": 3}', "hidden_act"),
        ("config.json", '{"model_type": "llama", "hidden_size": "many"}', "hidden_size"),
        ("config.json", "[]", "could not be loaded"),
        ("config.json", '{"model_type": "no such"}', "no such"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_a_line(
    folder: Path, name: str, content: str, message: str
) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_policy(ModelConfig(path=str(folder), device="cpu"), str(folder))
    assert "\n" not in str(caught.value)
