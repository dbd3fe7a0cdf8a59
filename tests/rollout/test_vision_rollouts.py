"""Rollouts of prompts with images: the embedded engine against the trainer's packed pass, and the
requests that vLLM gets, against vLLM's own types."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from recap_fast.config import RolloutConfig
from recap_fast.model.policy import Policy
from recap_fast.model.vision import MODEL_TYPES
from recap_fast.rollout import factory
from recap_fast.rollout.embedded import EmbeddedEngine, inference_state
from recap_fast.rollout.mismatch import sequence_logprobs, verify_sync
from recap_fast.rollout.protocol import EngineError, iter_weights
from recap_fast.rollout.vllm import build_request, check_expansion, image_arguments
from recap_fast.types import Prompt, Rollout, SamplingSpec
from tests.model.test_vision import IMAGE, alone, draw_prompt, pack, packed_logprobs
from tests.rollout.vllm_vision import vllm_model_class
from tests.tiny import packed_vision_model, tiny_llama, tiny_vision_model
from tests.tiny_tokenizer import tiny_tokenizer


def draw_prompts(counts: list[int], seed: int = 0) -> list[Prompt]:
    """Prompts with so many images each; lengths differ, so that most rows are padded."""
    random = np.random.default_rng(seed)
    prompts = []
    for row, count in enumerate(counts):
        ids, images = draw_prompt(random, count)
        prompts.append(Prompt("pictures", row, ids, "", None, {}, images))
    return prompts


def make_engine(model: Any, **options: Any) -> EmbeddedEngine:
    return EmbeddedEngine(
        RolloutConfig(engine="transformers", **options),
        model=model, tokenizer=tiny_tokenizer(), max_model_len=512,
    )  # fmt: skip


def packed(policy: Policy, rollouts: list[Rollout]) -> torch.Tensor:
    advantages = np.ones((len(rollouts), 3), np.float32)
    with torch.no_grad():
        return packed_logprobs(policy, pack((rollouts, advantages, []), policy))


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_sampled_logprobs_are_the_trainers(kind):
    """Several rows of a prompt from one prefill, with no image, one and several."""
    policy = Policy(packed_vision_model(kind), torch.float32)
    prompts = draw_prompts([0, 1, 3, 2, 1])
    rollouts = make_engine(policy.model).generate(prompts, SamplingSpec(4, 12, 1.0, seed=1))
    assert [r.group for r in rollouts] == [group for group in range(5) for _ in range(4)]
    assert len({tuple(r.token_ids) for r in rollouts}) > 10
    sampled = torch.tensor([p for r in rollouts for p in r.logprobs])
    torch.testing.assert_close(packed(policy, rollouts), sampled, atol=1e-5, rtol=1e-5)
    original = tiny_vision_model(kind)
    for rollout in rollouts[::3]:
        prompt = rollout.prompt
        with torch.no_grad():
            theirs = alone(
                original, prompt.token_ids + rollout.token_ids, len(prompt.token_ids), prompt.images
            )
        torch.testing.assert_close(torch.tensor(rollout.logprobs), theirs, atol=1e-5, rtol=1e-5)


def test_finished_rows_leave_with_their_positions():
    """Rows of unlike offset between tokens and positions are compacted on the way."""
    policy = Policy(packed_vision_model("qwen2_5_vl"), torch.float32)
    policy.model.generation_config.eos_token_id = list(range(60))
    prompts = draw_prompts([2, 0, 3])
    rollouts = make_engine(policy.model).generate(prompts, SamplingSpec(8, 24, 1.0, seed=3))
    lengths = {len(r.token_ids) for r in rollouts}
    assert len(lengths) > 5
    sampled = torch.tensor([p for r in rollouts for p in r.logprobs])
    torch.testing.assert_close(packed(policy, rollouts), sampled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_generation_leaves_the_model_as_it_was(kind):
    model = packed_vision_model(kind).train()
    policy = Policy(model, torch.float32)
    before = [c._attn_implementation for c in (model.config, *map_configs(model))]
    engine = make_engine(model)
    verify_sync(engine, model, draw_prompts([1, 2]))
    rollouts = engine.generate(draw_prompts([1]), SamplingSpec(1, 4, 0.0, 0))
    assert model.training
    assert [c._attn_implementation for c in (model.config, *map_configs(model))] == before
    with inference_state(model, torch.float32):
        ours = sequence_logprobs(model, rollouts[0])
    torch.testing.assert_close(ours, packed(policy, rollouts), atol=1e-5, rtol=1e-5)


def map_configs(model: Any) -> tuple[Any, Any]:
    return model.config.text_config, model.config.vision_config


def test_prompts_that_do_not_fit_are_named():
    engine = make_engine(packed_vision_model("qwen2_5_vl"))
    (prompt,) = draw_prompts([2])
    short = replace(prompt, images=prompt.images[:1])
    with pytest.raises(EngineError, match=r"prompt pictures:0: its 1 images make"):
        engine.generate([short], SamplingSpec(1, 4, 1.0, 0))
    text = make_engine(tiny_llama())
    with pytest.raises(EngineError, match=r"prompt pictures:0 has images, but the model takes non"):
        text.generate([prompt], SamplingSpec(1, 4, 1.0, 0))


def test_servers_that_recompute_take_no_images():
    """vLLM's would end at an update."""
    with pytest.raises(EngineError, match=r"on_update is recompute, and rows have images: vllm's"):
        factory.make_engine(
            RolloutConfig.model_validate(
                {"engine": "vllm_server", "async": {"depth": 1, "on_update": "recompute"}}
            ),
            model=packed_vision_model("qwen2_5_vl"), model_path="", tokenizer=tiny_tokenizer(),
            max_model_len=128, seed=0, device="cpu", image_pixels=(64, 4096),
        )  # fmt: skip


# ---- vLLM: what it is sent, and what comes back


@pytest.fixture(scope="module")
def vision():
    return Policy(packed_vision_model("qwen2_5_vl"), torch.float32).vision


def test_requests_are_what_vllm_takes(vision):
    preprocess = pytest.importorskip("vllm.renderers.inputs.preprocess")
    parse = pytest.importorskip("vllm.multimodal.parse")
    text, two = draw_prompts([0, 2])
    assert build_request(text, vision) == {"prompt_token_ids": text.token_ids}
    request = build_request(two, vision)
    parsed = preprocess.parse_dec_only_prompt(request)
    assert parsed["prompt_token_ids"].count(IMAGE) == 2
    words = [token for token in two.token_ids if token != IMAGE]
    assert [token for token in parsed["prompt_token_ids"] if token != IMAGE] == words
    items = parse.MultiModalDataParser().parse_mm_data(parsed["multi_modal_data"])
    assert items.get_all_counts() == {"image": 2}
    for i, image in enumerate(two.images):
        size = items["image"].get_image_size(i)
        assert (size.width, size.height) == image.image.size


def test_vllm_puts_the_trainers_tokens_back(vision):
    """vLLM's own replacement of placeholders, with as many tokens as each grid makes."""
    processing = pytest.importorskip("vllm.multimodal.processing.processor")
    (prompt,) = draw_prompts([3])
    update = processing.PromptReplacement(
        "image", [IMAGE], lambda i: [IMAGE] * vision.num_tokens(prompt.images[i])
    )
    updates = {"image": [[update.resolve(i)] for i in range(3)]}
    request = build_request(prompt, vision)
    expanded, _ = processing.apply_token_matches(request["prompt_token_ids"], updates)
    assert expanded == prompt.token_ids
    check_expansion(prompt, expanded, vision)


def test_another_count_of_image_tokens_is_an_error(vision):
    (prompt,) = draw_prompts([1], seed=4)
    count = prompt.token_ids.count(IMAGE)
    place = prompt.token_ids.index(IMAGE)
    longer = [*prompt.token_ids[:place], IMAGE, *prompt.token_ids[place:]]
    with pytest.raises(EngineError, match=rf"pictures:0: vllm makes {count + 1} .* has {count} "):
        check_expansion(prompt, longer, vision)


def test_what_vllm_is_told_about_images(vision):
    from inspect import signature

    llm = pytest.importorskip("vllm").LLM
    arguments = pytest.importorskip("vllm.engine.arg_utils").EngineArgs
    assert image_arguments(None, None) == {"skip_tokenizer_init": True}
    without = image_arguments(vision, None)
    assert without["limit_mm_per_prompt"] == {"image": 0, "video": 0}
    given = image_arguments(vision, (64, 4096))
    size = {"shortest_edge": 64, "longest_edge": 4096}
    assert given["mm_processor_kwargs"] == {"size": size}
    assert "skip_tokenizer_init" not in given, "vLLM's image processor needs the tokenizer"
    known = signature(arguments).parameters.keys() | signature(llm).parameters.keys()
    assert (given | without).keys() <= known


@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_sent_under_names_that_vllm_loads(kind, tied, tmp_path):
    """What a saved checkpoint is called and what a sync sends end up as the same weights."""
    with vllm_model_class(kind) as model_class:
        mapper = model_class.hf_to_vllm_mapper
    model = packed_vision_model(kind, tied=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(mapper.apply_list(list(file.keys())))
    sent = set(mapper.apply_list([name for name, _ in iter_weights(model)]))
    assert sent == saved | {"language_model.lm_head.weight"}
    assert {name.split(".")[0] for name in sent} == {"visual", "language_model"}
