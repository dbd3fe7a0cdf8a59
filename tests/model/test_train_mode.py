"""A model computes while it is trained what it computes while it samples, whatever its dropout."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from recap_fast.config import ModelConfig
from recap_fast.model.policy import load_policy
from recap_fast.model.train_mode import enter_train_mode, evaluating
from tests.tiny import save_tiny_vision_model, tiny_llama

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
ROUTED = {"num_local_experts": 4, "num_key_value_heads": 2, "intermediate_size": 32}

# Dropout as modules, as functional calls on attributes, on the configuration at run time; layers
# that are left out; routers that sample, or add noise (phimoe's is a threshold in evaluation).
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT | {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5},
    "opt": SIZES
    | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    | {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "falcon": SIZES | {"hidden_dropout": 0.5, "attention_dropout": 0.5, "parallel_attn": False},
    "qwen2": SIZES
    | {"intermediate_size": 64, "num_key_value_heads": 2, "attention_dropout": 0.5},
    "mixtral": SIZES | ROUTED | {"attention_dropout": 0.5, "router_jitter_noise": 0.5},
    "phimoe": SIZES
    | ROUTED
    | {"attention_dropout": 0.5, "router_jitter_noise": 0.5, "input_jitter_noise": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_training_is_done_as_in_evaluation(kind: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    ids = torch.arange(12)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    expected = model.eval()(ids, use_cache=False).logits
    model.train()
    assert not torch.equal(logits(), expected)  # or the case is none
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    enter_train_mode(model)
    assert any(module.training for module in model.modules()) == checkpointing
    for _ in range(3):
        torch.testing.assert_close(logits(), expected)


def test_modules_of_any_kind() -> None:
    class DropPath(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_prob = 0.3

    class StableDropout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = 0.3

    model = tiny_llama()
    kinds = [
        nn.Dropout(0.2), nn.Dropout2d(0.2), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2),
        DropPath(), StableDropout(),
    ]  # fmt: skip
    model.extra = nn.ModuleList(kinds)
    enter_train_mode(model)
    assert [getattr(m, "p", None) or getattr(m, "drop_prob", 0) for m in kinds] == [0.0] * 6


def test_what_was_switched_off_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    model.config.attention_dropout = 0.25
    with caplog.at_level(logging.INFO):
        enter_train_mode(model)
        enter_train_mode(model)
        enter_train_mode(tiny_llama())
    assert [r.getMessage() for r in caplog.records] == [
        "dropout is off, as rollouts are sampled without it: attention_dropout 0.25"
    ]


def test_a_vision_model_as_loaded(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(save_tiny_vision_model(tmp_path, attention_dropout=0.5))
    config = ModelConfig(path=folder, device="cpu", train_vision=True, gradient_checkpointing=True)
    with caplog.at_level(logging.INFO):
        model = load_policy(config, folder).model
    assert model.is_gradient_checkpointing
    assert model.config.get_text_config().attention_dropout == 0
    attention = [m for m in model.modules() if hasattr(m, "attention_dropout")]
    assert attention
    assert all(m.attention_dropout == 0 for m in attention)
    assert sum("dropout is off" in r.getMessage() for r in caplog.records) == 1


def test_layers_are_checkpointed_before_and_after_an_evaluation() -> None:
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    enter_train_mode(model)
    passes = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: passes.append(1))

    def count_passes() -> int:
        passes.clear()
        model(torch.arange(9)[None], use_cache=False).logits.sum().backward()
        return len(passes)

    assert count_passes() == 2  # forward, and again in backward
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert count_passes() == 1
    assert count_passes() == 2
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert count_passes() == 2


def test_probabilities_are_zero_even_where_a_caller_sets_the_mode_again() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", **MODELS["gpt2"]), attn_implementation="eager"
    )
    enter_train_mode(model)
    ids = torch.arange(12)[None]
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(model.train()(ids, use_cache=False).logits, expected)
