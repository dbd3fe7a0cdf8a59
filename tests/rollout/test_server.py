"""A real vLLM server on loopback: its completions, its weights, and its death."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from recap_fast.config import LoraConfig, RolloutConfig
from recap_fast.model.lora import add_adapters
from recap_fast.rollout import server_pool
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.mismatch import sequence_logprobs, verify_sync
from recap_fast.rollout.protocol import EngineError, iter_weights
from recap_fast.rollout.server_check import check_server
from recap_fast.rollout.server_client import ServerClient
from recap_fast.rollout.server_worker import model_sizes
from recap_fast.types import Prompt, Rollout, SamplingSpec, WeightSyncError
from tests.rollout.conftest import random_llama, start_vllm
from tests.rollout.test_server_adapters import redraw
from tests.rollout.test_vllm import GROUPS, PROJECTIONS, mean_mismatch, perturb
from tests.tiny_tokenizer import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPEC = SamplingSpec(3, 24, 1.0, seed=5)
REUSED = "vllm:prefix_cache_hits_total"
"""vLLM's count of tokens whose keys and values it had."""


def start(model: LlamaForCausalLM, folder: Path, count: int = 1) -> Any:
    pytest.importorskip("vllm")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    config = {
        "engine": "vllm_server", "dtype": "float32", "cpu_kv_cache_gib": 0.05,
        "server": {"timeout": 60.0, "count": count},
    }  # fmt: skip
    return make_engine(
        RolloutConfig.model_validate(config),
        model=model,
        model_path=str(folder / "model"),
        tokenizer=tiny_tokenizer(),
        max_model_len=128,
        seed=0,
        device="cuda" if torch.cuda.is_available() else "cpu",
        logs=folder / "logs",
    )


def processes(engine: Any, server: int = 0) -> list[psutil.Process]:
    keeper = psutil.Process(engine._pool.members[server].process._keeper.pid)
    return [keeper, *keeper.children(recursive=True)]


def sampled(engine: Any) -> list[float]:
    """Tokens that each server has sampled since its start."""
    return [engine._run(member.client.sampled_tokens()) for member in engine._pool.members]


def wait_for_all(engine: Any) -> None:
    until = time.monotonic() + 300
    while any(member.state != "up" for member in engine._pool.members):
        assert time.monotonic() < until, engine._pool.members
        time.sleep(0.1)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two."""
    found = start(random_llama(tied=False), tmp_path_factory.mktemp("server"), count=2)
    yield found
    kept = processes(found, 0) + processes(found, 1)
    found.close()
    assert not [p for p in kept if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def engine(servers: Any) -> Any:
    """With both servers, also where a test before has cost one its weights."""
    if servers._pool._version is not None:  # before the first weights none is up
        wait_for_all(servers)
    return servers


@pytest.fixture
def model() -> LlamaForCausalLM:
    return copy.deepcopy(random_llama(tied=False))


def test_completions_are_those_of_the_weights_that_it_was_given(
    engine: Any, model: LlamaForCausalLM, prompts: list[Prompt], tokenizer: Any
) -> None:
    engine.sync_weights(iter_weights(model, engine.dtype), 4)
    finished: list[int] = []
    before = sampled(engine)
    rollouts = engine.generate(prompts, SPEC, lambda group: finished.append(group[0].group))
    shares = [now - then for now, then in zip(sampled(engine), before, strict=True)]
    assert sum(shares) == sum(len(r.token_ids) for r in rollouts)
    assert all(shares), "both have sampled some"
    assert [r.group for r in rollouts] == [g for g in range(len(prompts)) for _ in range(3)]
    assert sorted(finished) == list(range(len(prompts)))
    for r in rollouts:
        assert len(r.token_ids) == len(r.logprobs) == len(r.versions) <= 24
        assert set(r.versions) == {4}
        assert (r.token_ids[-1] == tokenizer.eos_token_id) == (r.finish_reason == "stop")
    assert mean_mismatch(model, rollouts, 1.0) < 1e-5
    assert verify_sync(engine, model, prompts).stale == []


def test_the_same_request_has_the_same_answer(
    engine: Any, model: LlamaForCausalLM, prompts: list[Prompt]
) -> None:
    engine.sync_weights(iter_weights(model, engine.dtype), 1)
    first, second = (engine.generate(prompts, SPEC) for _ in range(2))
    assert [r.token_ids for r in first] == [r.token_ids for r in second]
    other = engine.generate(prompts, SamplingSpec(3, 24, 1.0, seed=6))
    assert [r.token_ids for r in first] != [r.token_ids for r in other]


def test_an_engine_in_process_samples_the_same(
    engine: Any, model: LlamaForCausalLM, prompts: list[Prompt], tmp_path: Path
) -> None:
    """Of the same weights and seeds, though the two put their requests together otherwise."""
    engine.sync_weights(iter_weights(model, engine.dtype), 1)
    served = engine.generate(prompts * 3, SamplingSpec(4, 64, 1.0, seed=5))
    inside = start_vllm(copy.deepcopy(model), tmp_path)
    try:
        inside.sync_weights(iter_weights(model, inside.dtype), 1)
        here = inside.generate(prompts * 3, SamplingSpec(4, 64, 1.0, seed=5))
    finally:
        inside.close()
    assert [r.token_ids for r in served] == [r.token_ids for r in here]
    assert sum(len(r.token_ids) for r in here) > 1000
    for ours, theirs in zip(here, served, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)


def check_that_a_group_arrives(
    group: str, engine: Any, model: LlamaForCausalLM, prompts: list[Prompt]
) -> None:
    engine.sync_weights(iter_weights(model, engine.dtype), 1)
    perturb(model, group)
    with pytest.raises(WeightSyncError):
        verify_sync(engine, model, prompts, tolerance=1e-4)
    engine.sync_weights(iter_weights(model, engine.dtype), 2)
    assert verify_sync(engine, model, prompts, tolerance=1e-5).stale == []


@pytest.mark.parametrize("group", [*GROUPS, "lm_head"])
def test_every_group_of_parameters_arrives(
    group: str, engine: Any, model: LlamaForCausalLM, prompts: list[Prompt]
) -> None:
    check_that_a_group_arrives(group, engine, model, prompts)


@pytest.fixture(scope="module")
def adapted() -> LlamaForCausalLM:
    pytest.importorskip("peft")
    found = random_llama(tied=False)
    add_adapters(found, LoraConfig(rank=4, alpha=6), "base")
    redraw(found, 0)
    return found


@pytest.mark.thinned(3)
@pytest.mark.parametrize("group", PROJECTIONS)
def test_every_group_of_merged_adapters_arrives(
    group: str, engine: Any, adapted: LlamaForCausalLM, prompts: list[Prompt]
) -> None:
    """For servers a model like any other."""
    engine.sync_weights(iter_weights(adapted, engine.dtype), 1)
    perturb(adapted, f"{group}.lora_B", 0.3)
    with pytest.raises(WeightSyncError):
        verify_sync(engine, adapted, prompts, tolerance=1e-4)
    engine.sync_weights(iter_weights(adapted, engine.dtype), 2)
    report = verify_sync(engine, adapted, prompts, tolerance=1e-5)
    assert report.stale == []
    assert report.num_compared == 21


def check_that_no_prefix_outlives(
    engine: Any, prompt: Prompt, old: LlamaForCausalLM, new: LlamaForCausalLM, update: Any
) -> None:
    """Between two versions of the weights; the prompt's keys and values are kept within one."""
    client = engine._pool.members[0].client

    def reused() -> float:
        text = engine._run(client._ask("GET", "/metrics", "counting", is_text=True))
        lines = [line for line in text.splitlines() if line.startswith(REUSED)]
        return sum(float(line.split()[-1]) for line in lines)

    for _ in range(2):
        before = reused()
        assert mean_mismatch(old, engine.generate([prompt], SPEC), 1.0) < 1e-5
    assert reused() > before, "the prompt is of more than a block, or the rest proves nothing"
    update()
    rollouts = engine.generate([prompt], SPEC)
    assert mean_mismatch(old, rollouts, 1.0) > 1e-3
    assert mean_mismatch(new, rollouts, 1.0) < 1e-5


def test_a_zero_may_have_a_sign(engine: Any, model: LlamaForCausalLM) -> None:
    """Linear layers are read back by products, in which -0.0 is 0.0."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight[3, 0] = -0.0
    engine.sync_weights(iter_weights(model, engine.dtype), 1)
    assert [member.state for member in engine._pool.members] == ["up", "up"]


def test_no_prefix_of_the_old_weights_is_used(
    engine: Any, model: LlamaForCausalLM, long_prompt: Prompt
) -> None:
    engine.sync_weights(iter_weights(model, engine.dtype), 1)
    old = copy.deepcopy(model)
    perturb(model, "layers.0.self_attn.v_proj", 0.5)

    def update() -> None:
        engine.sync_weights(iter_weights(model, engine.dtype), 2)

    check_that_no_prefix_outlives(engine, long_prompt, old, model, update)


def test_weights_are_its_own_once_it_has_taken_them_over(
    engine: Any, model: LlamaForCausalLM, prompts: list[Prompt]
) -> None:
    """The memory that they came in is written again, before the next update."""
    engine.sync_weights(iter_weights(model, engine.dtype), 1)
    zeros = [(name, torch.zeros_like(tensor)) for name, tensor in iter_weights(model)]
    engine._transfer.write(zeros, 2)
    assert verify_sync(engine, model, prompts, tolerance=1e-5).stale == []


def test_an_incomplete_stream_is_refused_and_named(
    engine: Any, model: LlamaForCausalLM, prompts: list[Prompt]
) -> None:
    engine.sync_weights(iter_weights(model, engine.dtype), 1)
    stream = [(n, t) for n, t in iter_weights(model) if "layers.1.mlp.up_proj" not in n]
    with pytest.raises(WeightSyncError, match=r"lacked model\.layers\.1\.mlp\.up_proj\.weight"):
        engine.sync_weights(stream, 2)
    engine.sync_weights(iter_weights(model, engine.dtype), 3)
    assert engine.generate(prompts, SPEC)[0].versions[0] == 3


def in_flight(engine: Any, prompts: list[Prompt], count: int) -> list[Any]:
    """Long requests, some of which the server has sampled some tokens of: one is complete."""
    spec = SamplingSpec(4, 100, 1.0, seed=1)
    futures = [engine.submit(prompts[i % len(prompts)], spec, i) for i in range(count)]
    wait(futures, timeout=120, return_when=FIRST_COMPLETED)
    return futures


def across_an_update(
    engine: Any, old: LlamaForCausalLM, new: LlamaForCausalLM, prompts: list[Prompt]
) -> list[Rollout]:
    """Completions in whose midst the version of the weights became 2. Requests come and go faster
    than an update on a busy machine: some tries may find none under way."""
    for _ in range(10):
        engine.sync_weights(iter_weights(old, engine.dtype), 1)
        futures = in_flight(engine, prompts, 60)
        engine.sync_weights(iter_weights(new, engine.dtype), 2)
        rollouts = [r for future in futures for r in future.result(timeout=300)]
        assert all(list(r.versions) == sorted(r.versions) for r in rollouts)
        if mixed := [r for r in rollouts if set(r.versions) == {1, 2}]:
            return mixed
    pytest.fail("the test should see rollouts that two versions of the weights have sampled")


def test_requests_in_flight_survive_an_update_and_say_so(
    engine: Any, model: LlamaForCausalLM, prompts: list[Prompt]
) -> None:
    old = copy.deepcopy(model)
    perturb(model, "norm", 0.5)
    mixed = across_an_update(engine, old, model, prompts)
    # Tokens of version 1 have log-probs of the old weights, whatever came after them.
    for r in mixed[:4]:
        count = list(r.versions).count(1)
        part = Rollout(r.prompt, 0, r.token_ids[:count], r.logprobs[:count], "length", "")
        assert mean_mismatch(old, [part], 1.0) < 1e-5
    assert mean_mismatch(model, engine.generate(prompts, SPEC), 1.0) < 1e-5


def test_requests_in_flight_recompute_where_that_is_asked_for(
    engine: Any, model: LlamaForCausalLM, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._pool, "_recompute", True)
    old = copy.deepcopy(model)
    perturb(model, "norm", 0.5)
    mixed = across_an_update(engine, old, model, prompts)
    for r in mixed[:4]:  # with keys and values of the new weights for all that came before
        count = list(r.versions).count(1)
        ours = sequence_logprobs(model, r)[count:]
        assert (ours - torch.tensor(r.logprobs)[count:]).abs().mean() < 1e-4


@pytest.mark.parametrize(
    "victim",  # test_server_named.py kills the HTTP process of an only server
    ["engine", pytest.param("keeper", marks=pytest.mark.variant)],
)
def test_the_other_answers_for_a_server_that_is_killed_until_it_is_back(
    victim: str,
    engine: Any,
    model: LlamaForCausalLM,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    perturb(model, "norm", 0.5)
    engine.sync_weights(iter_weights(model, engine.dtype), 3)
    member, reissued = engine._pool.members[0], engine._pool.reissued
    before, other = processes(engine), processes(engine, 1)
    assert not shared_memory(before), "no processes that talk through what their death leaves"
    if not torch.cuda.is_available():  # else it is spawned, which takes a fourth process
        assert len(before) == 3, "keeper, HTTP process, and the engine that this has forked"
    start, is_answered = member.start, threading.Event()
    monkeypatch.setattr(member, "start", lambda: is_answered.wait(300) and start())
    futures = in_flight(engine, prompts, 60)
    (engine_process,) = [p for p in before if "EngineCor" in p.name()]
    dying = engine_process if victim == "engine" else before[0]
    os.kill(dying.pid, signal.SIGKILL)
    rollouts = [r for future in futures for r in future.result(timeout=300)]
    assert len(rollouts) == 60 * 4
    assert {version for r in rollouts for version in r.versions} == {3}
    assert mean_mismatch(model, rollouts[-8:], 1.0) < 1e-5
    # A server whose keeper is gone is asked to end, and may have answered everything by then.
    assert victim == "keeper" or engine._pool.reissued > reissued
    gone, alive = psutil.wait_procs(before, timeout=30)
    assert not alive
    is_answered.set()
    while member.state == "up":  # it may not be known yet that the last request was answered
        time.sleep(0.1)
    wait_for_all(engine)
    assert processes(engine, 1) == other
    assert not {p.pid for p in before} & {p.pid for p in processes(engine)}
    assert sampled(engine)[0] == 0
    reissued = engine._pool.reissued
    again = engine.generate(prompts, SPEC)
    assert engine._pool.reissued == reissued, "of what came back the first answer was taken"
    assert sampled(engine)[0] > 0
    assert {version for r in again for version in r.versions} == {3}
    assert mean_mismatch(model, again, 1.0) < 1e-5, "it came back with the weights"


def shared_memory(processes: list[psutil.Process]) -> set[Path]:
    """Named segments that processes use."""
    used = set()
    for process in processes:
        used |= {Path(each.path) for each in process.memory_maps() if "/psm_" in each.path}
    return used


def test_a_server_that_stops_answering_is_restarted(
    engine: Any, model: LlamaForCausalLM, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._pool, "_timeout", 15.0)
    monkeypatch.setattr(server_pool, "_HEALTH_WAIT", 3.0)
    engine.sync_weights(iter_weights(model, engine.dtype), 1)
    before = processes(engine)
    futures = in_flight(engine, prompts, 12)
    for process in before[1:]:
        os.kill(process.pid, signal.SIGSTOP)
    rollouts = [r for future in futures for r in future.result(timeout=300)]
    assert len(rollouts) == 12 * 4
    psutil.wait_procs(before, timeout=60)  # so it is known, whether or not it had requests
    wait_for_all(engine)
    assert not {p.pid for p in before} & {p.pid for p in processes(engine)}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"sizes": {"hidden_size": "65"}}, r"another model.*hidden_size 64 \(here 65\)"),
        ({"dtype": torch.bfloat16}, r"computes in float32, .* in bfloat16 \(rollout\.dtype\)"),
        ({"max_model_len": 129}, r"takes 128 tokens.*--max-model-len 129"),
    ],
)
def test_a_run_that_it_cannot_serve_is_told_why(
    wanted: dict[str, Any], message: str, engine: Any, model: LlamaForCausalLM
) -> None:
    ours = {
        "model_path": "/mine", "sizes": model_sizes(model.config), "dtype": torch.float32,
        "max_model_len": 128,
    }  # fmt: skip
    client = engine._pool.members[0].client
    engine._run(check_server(client, **ours))
    with pytest.raises(EngineError, match=message):
        engine._run(check_server(client, **(ours | wanted)))


def test_a_wrong_key_is_refused(engine: Any) -> None:
    async def ask() -> None:
        client = ServerClient(engine._pool.members[0].client.url, key="another", timeout=10.0)
        try:
            await client.weight_version()
        finally:
            await client.close()

    with pytest.raises(EngineError, match=r"RECAP_FAST_SERVER_KEY"):
        engine._run(ask())


def test_a_server_that_cannot_start_says_why(tmp_path: Path, model: LlamaForCausalLM) -> None:
    config = RolloutConfig.model_validate(
        {"engine": "vllm_server", "dtype": "float32", "cpu_kv_cache_gib": 0.05}
    )
    (tmp_path / "model").mkdir()
    with pytest.raises(EngineError, match=r"ended with status 1 .*server-0\.log, ends with") as e:
        make_engine(
            config, model=model, model_path=str(tmp_path / "model"), tokenizer=tiny_tokenizer(),
            max_model_len=128, seed=0, device="cpu", logs=tmp_path / "logs",
        )  # fmt: skip
    assert "Invalid repository ID or local directory" in str(e.value)
