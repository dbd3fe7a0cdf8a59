"""Real vLLM in this process: sampling, and weights that arrive or do not."""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from recap_fast.config import RolloutConfig
from recap_fast.rollout import mismatch, vllm
from recap_fast.rollout.embedded import inference_state
from recap_fast.rollout.mismatch import MismatchGuard, logprob_diff, verify_sync
from recap_fast.rollout.protocol import EngineError, iter_weights
from recap_fast.rollout.vllm_process import process_state_kept
from recap_fast.types import Prompt, Rollout, SamplingSpec, WeightSyncError

GROUPS = [
    "model.embed_tokens",
    "layers.1.input_layernorm",
    "layers.0.post_attention_layernorm",
    "model.norm",
    "layers.0.self_attn.q_proj",
    "layers.1.self_attn.k_proj",
    "layers.0.self_attn.v_proj",
    "layers.1.self_attn.o_proj",
    "layers.0.mlp.gate_proj",
    "layers.1.mlp.up_proj",
    "layers.0.mlp.down_proj",
]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def mean_mismatch(model: LlamaForCausalLM, rollouts: list[Rollout], temperature: float) -> float:
    with inference_state(model, torch.float32):
        ours = [mismatch.sequence_logprobs(model, rollout, temperature) for rollout in rollouts]
    theirs = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
    ours = torch.cat(ours)
    return logprob_diff(ours, theirs, torch.ones_like(ours, dtype=torch.bool))[0].item()


@pytest.fixture
def model(vllm_model: Any, vllm_engine: Any) -> Any:
    """A copy of the model that the engine holds; the engine gets the original back afterwards."""
    yield copy.deepcopy(vllm_model)
    vllm_engine.sync_weights(iter_weights(vllm_model))


def perturb(model: LlamaForCausalLM, group: str, scale: float = 0.1) -> list[str]:
    names = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if group in name:
                parameter.add_(scale * torch.randn_like(parameter))
                names.append(name)
    assert names, group
    return names


def test_rollouts_are_complete_records_in_order(
    vllm_engine: Any, model: Any, prompts: list[Prompt], tokenizer: Any
) -> None:
    rollouts = vllm_engine.generate(prompts, SamplingSpec(3, 24, 1.0, seed=5))
    assert [r.group for r in rollouts] == [g for g in range(len(prompts)) for _ in range(3)]
    assert all(r.prompt is prompts[r.group] for r in rollouts)
    reasons = {r.finish_reason for r in rollouts}
    assert reasons == {"stop", "length"}, "the test should see both endings; choose another seed"
    for r in rollouts:
        assert len(r.logprobs) == len(r.token_ids)
        assert tokenizer.eos_token_id not in r.token_ids[:-1]
        assert (r.token_ids[-1] == tokenizer.eos_token_id) == (r.finish_reason == "stop")
        assert r.finish_reason == "stop" or len(r.token_ids) == 24
        assert "<|im_end|>" not in r.text
    assert len({tuple(r.token_ids) for r in rollouts}) > len(rollouts) // 2


def test_any_stop_token_ends_a_completion_and_stays_in_it(
    vllm_engine: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only what vLLM knows as EOS: the end of a chat template's turn too."""
    spec = SamplingSpec(3, 24, 1.0, seed=5)
    first = vllm_engine.generate(prompts, spec)
    stops = {r.token_ids[2] for r in first if len(r.token_ids) > 3}
    monkeypatch.setattr(vllm_engine, "_stop_ids", vllm_engine._stop_ids | stops)
    for before, after in zip(first, vllm_engine.generate(prompts, spec), strict=True):
        ends = [i for i, token in enumerate(before.token_ids) if token in vllm_engine._stop_ids]
        wanted = before.token_ids[: ends[0] + 1] if ends else before.token_ids
        assert after.token_ids == wanted
        assert after.finish_reason == ("stop" if ends else "length")


def test_seed_decides_and_global_random_state_is_untouched(
    vllm_engine: Any, model: Any, prompts: list[Prompt]
) -> None:
    spec = SamplingSpec(2, 12, 1.0, seed=1)
    state, python_state = torch.get_rng_state(), random.getstate()
    first = vllm_engine.generate(prompts, spec)
    torch.rand(3)
    again = vllm_engine.generate(prompts, spec)
    other = vllm_engine.generate(prompts, SamplingSpec(2, 12, 1.0, seed=2))
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert [r.token_ids for r in first] != [r.token_ids for r in other]
    torch.set_rng_state(state)
    vllm_engine.generate(prompts, spec)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


def test_prompts_that_do_not_fit_one_step_are_sampled(vllm_engine: Any, model: Any) -> None:
    """vLLM would take the rest of a prompt in another step, for which a CPU has no generators."""
    prompts = [
        Prompt("test", row, [(7 * i + 3 * row) % 90 + 3 for i in range(101)], "", "", {})
        for row in range(400)
    ]
    rollouts = vllm_engine.generate(prompts, SamplingSpec(1, 2, 1.0, seed=3))
    assert len(rollouts) == 400
    assert mean_mismatch(model, rollouts[::40], 1.0) < 1e-4


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_those_of_the_tempered_policy(
    vllm_engine: Any, model: Any, prompts: list[Prompt], temperature: float
) -> None:
    rollouts = vllm_engine.generate(prompts, SamplingSpec(2, 16, temperature, seed=3))
    assert mean_mismatch(model, rollouts, temperature) < 1e-4


def test_greedy_takes_the_likeliest_token(
    vllm_engine: Any, model: Any, prompts: list[Prompt]
) -> None:
    rollouts = vllm_engine.generate(prompts, SamplingSpec(2, 6, 0.0, seed=3))
    assert len(rollouts) == 2 * len(prompts)
    for r in rollouts:
        ids = torch.tensor([r.prompt.token_ids + r.token_ids])
        with inference_state(model, torch.float32):
            logits = model(ids).logits[0, len(r.prompt.token_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == r.token_ids
    assert mean_mismatch(model, rollouts, 1.0) < 1e-4


@pytest.mark.parametrize("group", GROUPS)
def test_sync_delivers_every_parameter_group(
    vllm_engine: Any, model: Any, prompts: list[Prompt], group: str
) -> None:
    spec = SamplingSpec(4, 16, 1.0, seed=7)
    perturb(model, group)
    stale = mean_mismatch(model, vllm_engine.generate(prompts, spec), 1.0)
    assert stale > 1e-3, "the perturbation must show, or the rest proves nothing"
    vllm_engine.sync_weights(iter_weights(model))
    assert mean_mismatch(model, vllm_engine.generate(prompts, spec), 1.0) < 1e-4
    report = verify_sync(vllm_engine, model, prompts)
    assert report.stale == []
    assert report.num_compared == len(dict(iter_weights(model)))


@pytest.mark.parametrize("withheld", ["lm_head.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_sync_names_a_tensor_missing_from_the_stream(
    vllm_engine: Any, model: Any, withheld: str
) -> None:
    stream = ((name, tensor) for name, tensor in iter_weights(model) if name != withheld)
    with pytest.raises(WeightSyncError, match=rf"vllm [\d.]+.*lacked {withheld}"):
        vllm_engine.sync_weights(stream)


@pytest.mark.parametrize(
    "withheld",
    [
        "model.norm.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ],
)
def test_guard_names_a_tensor_that_the_engine_lost(
    vllm_engine: Any, model: Any, prompts: list[Prompt], withheld: str
) -> None:
    """A stream complete by its names, of which one tensor does not arrive."""
    old = {name: tensor.clone() for name, tensor in iter_weights(model)}
    perturb(model, withheld, scale=0.5)
    stream = (
        (name, old[name] if name == withheld else tensor) for name, tensor in iter_weights(model)
    )
    vllm_engine.sync_weights(stream)
    mean = mean_mismatch(model, vllm_engine.generate(prompts, SamplingSpec(4, 16, 1.0, 7)), 1.0)
    config = RolloutConfig(engine="vllm", max_logprob_diff=mean / 2)
    guard = MismatchGuard(config, vllm_engine, model)
    message = rf"step 12: log-probs from vllm [\d.]+.* of 1 of \d+ weights: {withheld} \(off by"
    with pytest.raises(WeightSyncError, match=message):
        guard.check(mean, 3 * mean, step=12)
    with pytest.raises(WeightSyncError, match=rf" of 1 of \d+ weights: {withheld} \(off by"):
        verify_sync(vllm_engine, model, prompts)


def test_guard_names_the_head_that_vllm_keeps_in_silence(
    vllm_engine: Any, model: Any, prompts: list[Prompt]
) -> None:
    """Why the stream carries a tied lm_head.weight: vLLM's head has a packed copy of its own."""
    perturb(model, "embed_tokens", scale=0.5)
    vllm_engine._load((n, t) for n, t in iter_weights(model) if n != "lm_head.weight")
    mean = mean_mismatch(model, vllm_engine.generate(prompts, SamplingSpec(4, 16, 1.0, 7)), 1.0)
    guard = MismatchGuard(RolloutConfig(max_logprob_diff=mean / 2), vllm_engine, model)
    with pytest.raises(WeightSyncError, match="of 1 of 21 weights: lm_head.weight"):
        guard.check(mean, 3 * mean, step=1)
    with pytest.raises(WeightSyncError, match="of 1 of 21 weights: lm_head.weight"):
        verify_sync(vllm_engine, model, prompts)


def test_prefix_cache_does_not_outlive_a_sync(vllm_engine: Any, model: Any, tokenizer: Any) -> None:
    text = "a prompt longer than two of the engine's cache blocks, so that prefixes are kept"
    prompt = Prompt("test", 0, tokenizer(text)["input_ids"], text, "", {})
    spec = SamplingSpec(4, 8, 1.0, seed=1)
    vllm_engine.generate([prompt], spec)
    perturb(model, "layers.0.self_attn.v_proj", scale=0.5)
    vllm_engine.sync_weights(iter_weights(model))
    assert mean_mismatch(model, vllm_engine.generate([prompt], spec), 1.0) < 1e-4


def test_groups_are_handed_on_as_they_finish(
    vllm_engine: Any, model: Any, prompts: list[Prompt]
) -> None:
    """Each once and whole, whatever finishes first; the list is as without it."""
    spec = SamplingSpec(3, 24, 1.0, seed=5)
    groups: list[list[Rollout]] = []
    rollouts = vllm_engine.generate(prompts, spec, groups.append)
    assert sorted(group[0].group for group in groups) == list(range(len(prompts)))
    assert sorted(sum(groups, []), key=lambda r: r.group) == rollouts
    assert rollouts == vllm_engine.generate(prompts, spec)
    lengths = [max(len(r.token_ids) for r in group) for group in groups]
    assert lengths == sorted(lengths), "groups came in another order than they can have finished"


def test_engine_survives_an_interruption(
    vllm_engine: Any, model: Any, prompts: list[Prompt]
) -> None:
    spec = SamplingSpec(3, 24, 1.0, seed=5)
    expected = vllm_engine.generate(prompts, spec)

    def interrupt(group: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vllm_engine.generate(prompts, spec, interrupt)
    assert vllm_engine.generate(prompts, spec) == expected
    with pytest.raises(KeyboardInterrupt):
        vllm_engine.generate(prompts, spec, interrupt)
    vllm_engine.sync_weights(iter_weights(model))  # its caches are free to be dropped
    assert vllm_engine.generate(prompts, spec) == expected


def test_logprobs_are_the_same_without_flat_ones(
    vllm_engine: Any, model: Any, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SamplingSpec(2, 8, 1.0, seed=1)
    assert vllm._flat_logprobs() == {"flat_logprobs": True}
    flat = vllm_engine.generate(prompts, spec)
    monkeypatch.setattr(vllm, "_flat_logprobs", dict)
    assert vllm_engine.generate(prompts, spec) == flat


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocators_options_outlive_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As in vLLM 0.25.1, which sets max_split_size_mb and thereby resets the rest."""
    options: list[str] = []
    monkeypatch.setattr(
        torch._C, "_accelerator_setAllocatorSettings", options.append, raising=False
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    with process_state_kept():
        pass
    assert options == []
    monkeypatch.setenv(name, "expandable_segments:True")
    with process_state_kept():
        torch._C._accelerator_setAllocatorSettings("max_split_size_mb:20")
    assert options == ["max_split_size_mb:20", "expandable_segments:True"]


def test_refuses_a_prompt_without_room(vllm_engine: Any, model: Any, tokenizer: Any) -> None:
    prompt = Prompt("sums", 4, tokenizer("x" * 120)["input_ids"], "", "", {})
    with pytest.raises(EngineError, match="prompt sums:4 has 120 tokens.*limit of 128"):
        vllm_engine.generate([prompt], SamplingSpec(1, 9, 1.0, 0))


def test_engine_leaves_the_trainers_threads_alone(
    vllm_engine: Any, model: Any, prompts: list[Prompt]
) -> None:
    vllm_engine.generate(prompts, SamplingSpec(1, 4, 1.0, 0))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    changed = torch.get_num_threads()
    torch.set_num_threads(before)
    assert (changed, torch.get_num_threads()) == (before + 1, before)
    if hasattr(os, "sched_getaffinity"):
        assert len(os.sched_getaffinity(0)) == len(os.sched_getaffinity(os.getppid()))
    assert "gomp" not in os.environ.get("LD_PRELOAD", "")
