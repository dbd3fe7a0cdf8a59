"""The weight stream, and which engine a configuration gets."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from recap_fast.config import RolloutConfig
from recap_fast.rollout import vllm as adapter
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.protocol import (
    EngineError,
    build_rollouts,
    iter_weights,
    prompt_seed,
    stop_token_ids,
)
from recap_fast.types import Prompt
from tests.rollout.conftest import random_llama


@pytest.mark.parametrize("tied", [True, False])
def test_stream_is_complete_in_layer_order_and_copies_nothing(tied: bool) -> None:
    model = random_llama(tied=tied)
    weights = dict(iter_weights(model))
    assert weights.keys() == model.state_dict().keys() | {"lm_head.weight"}
    for name, parameter in model.named_parameters():
        assert weights[name].data_ptr() == parameter.data_ptr()
        assert not weights[name].requires_grad
    assert (weights["lm_head.weight"].data_ptr() == model.model.embed_tokens.weight.data_ptr()) == (
        tied
    )
    names = list(weights)
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == "lm_head.weight"


def make(engine: str, tokenizer: Any) -> Any:
    return make_engine(
        RolloutConfig(engine=engine),
        model=random_llama(),
        model_path="nowhere",
        tokenizer=tokenizer,
        max_model_len=64,
        seed=0,
        device="cpu",
    )


def test_auto_falls_back_and_says_why(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adapter, "why_unavailable", lambda device, **kind: "no module named vllm")
    assert make("auto", tokenizer).name == "transformers"
    assert "no module named vllm" in caplog.text


def test_explicit_engine_never_falls_back(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adapter, "why_unavailable", lambda device, **kind: "no module named vllm")
    with pytest.raises(EngineError, match="no module named vllm"):
        make("vllm", tokenizer)
    monkeypatch.setattr(adapter, "why_unavailable", lambda device: None)
    with caplog.at_level(logging.WARNING):
        assert make("transformers", tokenizer).name == "transformers"
    assert caplog.text == ""


def test_reason_is_the_import_error_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    reason = adapter.why_unavailable(torch.device("cpu"))
    assert reason is not None
    assert "ModuleNotFoundError" in reason


def test_stop_tokens_are_the_union_of_all_eos(tokenizer: Any) -> None:
    model = random_llama()
    model.generation_config.eos_token_id = [7, 9]
    assert stop_token_ids(model, tokenizer) == {7, 9, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = 7
    tokenizer.eos_token = None
    assert stop_token_ids(model, tokenizer) == {7}


def test_prompt_seeds_differ_by_step_and_prompt() -> None:
    seeds = {prompt_seed(step, index) for step in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert prompt_seed(3, 4) == prompt_seed(3, 4)


def test_one_greedy_completion_stands_for_the_group(tokenizer: Any) -> None:
    prompt = Prompt("s", 0, [5], "", "", {})
    end = tokenizer.eos_token_id
    ids = [*tokenizer("ab")["input_ids"], end]
    rollouts = build_rollouts([prompt], [[(ids, [0.0] * 3)]], 3, frozenset({end}), tokenizer)
    assert [(r.text, r.finish_reason, r.group) for r in rollouts] == [("ab", "stop", 0)] * 3
