"""The weight stream, and which engine a configuration gets."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from recap_fast.config import RolloutConfig
from recap_fast.rollout import vllm as adapter
from recap_fast.rollout.embedded import EmbeddedEngine
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.protocol import (
    EngineError,
    ExpectedWeights,
    build_rollouts,
    iter_weights,
    prompt_seed,
    stop_token_ids,
    weight_names,
)
from recap_fast.types import Prompt, WeightSyncError
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
    assert names[1 if tied else -1] == "lm_head.weight"
    assert weight_names(model) == weights.keys()


def test_what_a_stream_lacks_is_named() -> None:
    sent = [(name, torch.zeros(1)) for name in "bdf"]
    expected = ExpectedWeights("abcdefghij")
    assert [name for name, _ in expected.watch(sent)] == ["b", "d", "f"]
    with pytest.raises(WeightSyncError, match=r"an engine was sent an incomplete set of weights; "
                                              r"it lacked a, c, e, g, h and 2 more$"):  # fmt: skip
        expected.check("an engine")
    list(expected.watch((name, torch.zeros(1)) for name in "aceghij"))
    expected.check("an engine")


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
    tokenizer.eos_token = tokenizer.chat_template = None
    assert stop_token_ids(model, tokenizer) == {7}


def test_end_of_the_templates_turn_stops(tokenizer: Any) -> None:
    """A base model: its generation config and its tokenizer know the end of a document only."""
    tokenizer.eos_token = "</s>"
    model = random_llama()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(model, tokenizer) == {tokenizer.eos_token_id, end}
    assert EmbeddedEngine(
        RolloutConfig(), model=model, tokenizer=tokenizer, max_model_len=64
    )._stop_ids == {tokenizer.eos_token_id, end}


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


@pytest.mark.parametrize(
    ("written", "stops", "text"),
    [
        ("<think>1</think><answer>2</answer></s>", True, "<think>1</think><answer>2</answer>"),
        ("<think>1</think>", False, "<think>1</think>"),
        ("2<|im_end|>3</s>", True, "2<|im_end|>3"),
        ("</s>", True, ""),
        ("2<|im_start|>", False, "2<|im_start|>"),
    ],
)
def test_texts_lose_only_the_token_that_stopped(
    tokenizer: Any, written: str, stops: bool, text: str
) -> None:
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>"], special_tokens=True)
    prompt = Prompt("s", 0, [5], "", "", {})
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    end = frozenset(tokenizer.convert_tokens_to_ids(["</s>"]))
    rollout = build_rollouts([prompt], [[(ids, [0.0] * len(ids))]], 1, end, tokenizer)[0]
    assert rollout.text == text
    assert rollout.token_ids == ids
    assert rollout.finish_reason == ("stop" if stops else "length")
