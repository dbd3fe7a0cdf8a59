"""The embedded engine against one sequence at a time, without a cache or a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from recap_fast.config import RolloutConfig
from recap_fast.model import attention
from recap_fast.rollout import embedded
from recap_fast.rollout.embedded import EmbeddedEngine, inference_state
from recap_fast.rollout.mismatch import logprob_diff, sequence_logprobs, verify_sync
from recap_fast.rollout.protocol import EngineError, iter_weights
from recap_fast.types import Prompt, SamplingSpec
from tests.rollout.conftest import random_llama


@pytest.fixture
def model() -> Any:
    return random_llama()


@pytest.fixture
def engine(model: Any, tokenizer: Any) -> EmbeddedEngine:
    return make(model, tokenizer)


def make(model: Any, tokenizer: Any, **options: Any) -> EmbeddedEngine:
    config = RolloutConfig(engine="transformers", **options)
    return EmbeddedEngine(config, model=model, tokenizer=tokenizer, max_model_len=128)


def test_groups_are_handed_on_batch_by_batch(model, tokenizer, prompts, monkeypatch):
    """Shortest prompts first, one in a batch here; the list keeps the prompts' order."""
    spec = SamplingSpec(2, 8, 1.0, seed=0)
    expected = make(model, tokenizer).generate(prompts, spec)
    monkeypatch.setattr(embedded, "_MAX_CACHED_TOKENS", 1)
    groups = []
    rollouts = make(model, tokenizer).generate(prompts, spec, groups.append)
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in expected]
    lengths = [len(group[0].prompt.token_ids) for group in groups]
    assert lengths == sorted(lengths)
    assert sorted(sum(groups, []), key=lambda r: r.group) == rollouts


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_those_of_the_tempered_policy(
    engine: EmbeddedEngine, model: Any, prompts: list[Prompt], temperature: float
) -> None:
    rollouts = engine.generate(prompts, SamplingSpec(6, 24, temperature, seed=0))
    with inference_state(model, torch.float32):
        for rollout in rollouts:
            ours = sequence_logprobs(model, rollout, temperature)
            torch.testing.assert_close(
                ours, torch.tensor(rollout.logprobs), atol=2e-5, rtol=0, msg=str(rollout)
            )


def test_greedy_takes_the_likeliest_token(
    engine: EmbeddedEngine, model: Any, prompts: list[Prompt]
) -> None:
    rollouts = engine.generate(prompts, SamplingSpec(2, 8, 0.0, seed=0))
    assert [r.group for r in rollouts] == [0, 0, 1, 1, 2, 2, 3, 3]
    for r in rollouts:
        with inference_state(model, torch.float32):
            logits = model(torch.tensor([r.prompt.token_ids + r.token_ids])).logits[0]
        assert logits[len(r.prompt.token_ids) - 1 : -1].argmax(-1).tolist() == r.token_ids


def test_samples_follow_the_distribution(
    engine: EmbeddedEngine, model: Any, prompts: list[Prompt]
) -> None:
    """Frequencies of the first token lie within 5 standard errors of its probability."""
    n = 4000
    rollouts = engine.generate(prompts[:1], SamplingSpec(n, 1, 0.7, seed=0))
    counts = torch.bincount(
        torch.tensor([r.token_ids[0] for r in rollouts]), minlength=model.config.vocab_size
    )
    with inference_state(model, torch.float32):
        logits = model(torch.tensor([prompts[0].token_ids])).logits[0, -1]
    expected = (logits / 0.7).softmax(-1)
    error = (counts / n - expected).abs() / (expected * (1 - expected) / n + 1e-9).sqrt()
    assert expected.max() < 0.9, "a distribution so peaked would prove little"
    assert error.max() < 5


def test_endings(engine: EmbeddedEngine, prompts: list[Prompt], tokenizer: Any) -> None:
    rollouts = engine.generate(prompts, SamplingSpec(8, 24, 1.0, seed=0))
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert len(r.logprobs) == len(r.token_ids)
        assert tokenizer.eos_token_id not in r.token_ids[:-1]
        assert (r.token_ids[-1] == tokenizer.eos_token_id) == (r.finish_reason == "stop")
        assert r.finish_reason == "stop" or len(r.token_ids) == 24
        assert "<|im_end|>" not in r.text


def test_every_configured_eos_ends_a_completion(
    model: Any, prompts: list[Prompt], tokenizer: Any
) -> None:
    frequent = list(range(10, 60))
    model.generation_config.eos_token_id = frequent
    rollouts = make(model, tokenizer).generate(prompts, SamplingSpec(8, 24, 1.0, seed=0))
    ends = {r.token_ids[-1] for r in rollouts if r.finish_reason == "stop"}
    assert len(ends) > 3
    for r in rollouts:
        assert not set(frequent) & set(r.token_ids[:-1])


def test_generation_config_does_not_bend_the_distribution(
    model: Any, prompts: list[Prompt], tokenizer: Any
) -> None:
    spec = SamplingSpec(4, 12, 1.0, seed=0)
    plain = make(model, tokenizer).generate(prompts, spec)
    model.generation_config.update(
        repetition_penalty=3.0, top_k=1, top_p=0.1, temperature=0.1, do_sample=True
    )
    assert make(model, tokenizer).generate(prompts, spec) == plain


def test_result_does_not_depend_on_batching(
    engine: EmbeddedEngine, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SamplingSpec(4, 16, 1.0, seed=3)
    together = engine.generate(prompts, spec)
    monkeypatch.setattr(embedded, "_MAX_CACHED_TOKENS", 1)
    monkeypatch.setattr(embedded, "_COMPACT_BELOW", 0.0)
    alone = engine.generate(prompts, spec)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.group for r in alone] == [g for g in range(len(prompts)) for _ in range(4)]


def test_seed_decides_and_global_random_state_is_untouched(
    engine: EmbeddedEngine, prompts: list[Prompt]
) -> None:
    state = torch.get_rng_state()
    first = engine.generate(prompts, SamplingSpec(2, 12, 1.0, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert engine.generate(prompts, SamplingSpec(2, 12, 1.0, seed=1)) == first
    assert engine.generate(prompts, SamplingSpec(2, 12, 1.0, seed=2)) != first
    assert len({tuple(r.token_ids) for r in first}) == len(first)


def test_sees_updates_at_once_and_leaves_the_model_as_it_was(
    engine: EmbeddedEngine, model: Any, prompts: list[Prompt]
) -> None:
    attention.register()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    verify_sync(engine, model, prompts)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.3)
    engine.sync_weights(iter_weights(model))
    assert verify_sync(engine, model, prompts).mean < 1e-4
    assert model.training
    assert model.config._attn_implementation == attention.IMPLEMENTATION
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_model_is_restored_after_an_error(
    engine: EmbeddedEngine, model: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(prompts, SamplingSpec(1, 4, 1.0, 0))
    assert model.training
    assert torch.is_grad_enabled()


def test_bfloat16_stays_near_float32(model: Any, prompts: list[Prompt], tokenizer: Any) -> None:
    engine = make(model, tokenizer, dtype="bfloat16")
    rollouts = engine.generate(prompts, SamplingSpec(4, 16, 1.0, seed=0))
    with inference_state(model, torch.float32):
        ours = torch.cat([sequence_logprobs(model, r) for r in rollouts])
    theirs = torch.tensor([x for r in rollouts for x in r.logprobs])
    mean, _ = logprob_diff(ours, theirs, torch.ones_like(ours))
    assert 1e-6 < mean < 0.1


def test_refuses_empty_and_overlong_prompts(engine: EmbeddedEngine, tokenizer: Any) -> None:
    empty = Prompt("sums", 3, [], "", "", {})
    with pytest.raises(EngineError, match="prompt sums:3 has no tokens"):
        engine.generate([empty], SamplingSpec(1, 4, 1.0, 0))
    long = Prompt("sums", 4, tokenizer("x" * 120)["input_ids"], "", "", {})
    with pytest.raises(EngineError, match="prompt sums:4 has 120 tokens.*limit of 128"):
        engine.generate([long], SamplingSpec(1, 9, 1.0, 0))
    assert len(engine.generate([long], SamplingSpec(1, 8, 1.0, 0))) == 1


def test_no_prompts_give_no_rollouts(engine: EmbeddedEngine) -> None:
    assert engine.generate([], SamplingSpec(2, 4, 1.0, 0)) == []


def test_dropout_is_off_while_sampling(
    engine: EmbeddedEngine, model: Any, prompts: list[Prompt]
) -> None:
    spec = SamplingSpec(2, 8, 1.0, 0)
    before = engine.generate(prompts, spec)
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.9))
    assert engine.generate(prompts, spec) == before
