"""A real vLLM server that loads adapters by name: their values, requests in flight, its death."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from recap_fast.config import LoraConfig, RolloutConfig
from recap_fast.model.lora import add_adapters
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.mismatch import verify_sync
from recap_fast.types import Prompt, SamplingSpec, WeightSyncError
from tests.rollout.conftest import random_llama
from tests.rollout.test_server import check_that_no_prefix_outlives, in_flight, processes
from tests.rollout.test_server_adapters import redraw
from tests.rollout.test_vllm import PROJECTIONS, mean_mismatch, perturb
from tests.tiny_tokenizer import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SPEC = SamplingSpec(3, 24, 1.0, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With adapters, and the folder of its base."""
    pytest.importorskip("peft")
    found = random_llama(tied=False)
    folder = tmp_path_factory.mktemp("model")
    found.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    add_adapters(found, LoraConfig(rank=4, alpha=6), str(folder))
    redraw(found, 0)
    return found, folder


@pytest.fixture(scope="module")
def engine(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("vllm")
    config = {
        "engine": "vllm_server", "dtype": "float32", "cpu_kv_cache_gib": 0.05,
        "server": {"timeout": 60.0, "adapters": "named"},
    }  # fmt: skip
    found = make_engine(
        RolloutConfig.model_validate(config),
        model=model[0],
        model_path=str(model[1]),
        tokenizer=tiny_tokenizer(),
        max_model_len=128,
        seed=0,
        device="cuda" if torch.cuda.is_available() else "cpu",
        logs=tmp_path_factory.mktemp("logs"),
    )
    yield found
    kept, folder = processes(found), found._adapters._root
    found.close()
    assert not [p for p in kept if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not folder.exists()


def give(engine: Any, version: int) -> None:
    engine.sync_weights(iter(()), version)


def loaded(engine: Any) -> list[str]:
    return engine._run(engine._pool.members[0].client.adapters())


@pytest.mark.parametrize("group", PROJECTIONS)
def test_every_group_of_adapters_arrives(
    group: str, engine: Any, model: Any, prompts: list[Prompt]
) -> None:
    give(engine, 1)
    report = verify_sync(engine, model[0], prompts, tolerance=1e-5)
    assert report.stale == []
    assert report.num_compared == 7, "the base's weights that have no adapters beside them"
    perturb(model[0], f"{group}.lora_B", 0.3)
    with pytest.raises(WeightSyncError):
        verify_sync(engine, model[0], prompts, tolerance=1e-4)
    give(engine, 2)
    assert verify_sync(engine, model[0], prompts, tolerance=1e-5).stale == []


def test_requests_in_flight_end_with_their_own_version(
    engine: Any, model: Any, prompts: list[Prompt]
) -> None:
    for attempt in range(10):  # requests may be gone before an update comes
        give(engine, 2 * attempt + 1)
        old = copy.deepcopy(model[0])
        redraw(model[0], 5 + attempt)
        futures = in_flight(engine, prompts, 24)
        give(engine, 2 * attempt + 2)
        if left := [future for future in futures if not future.done()]:
            break
    else:
        pytest.fail("the test should see requests that an update has met")
    # Of the same prompts, and asked while those of before are still sampled.
    fresh = engine.generate(prompts, SPEC)
    rollouts = [r for future in left for r in future.result(timeout=300)]
    assert {v for r in rollouts for v in r.versions} == {2 * attempt + 1}
    assert {v for r in fresh for v in r.versions} == {2 * attempt + 2}
    assert mean_mismatch(old, rollouts[:16], 1.0) < 1e-5
    assert mean_mismatch(model[0], fresh, 1.0) < 1e-5


def test_no_prefix_of_the_old_version_is_used(engine: Any, model: Any, long_prompt: Prompt) -> None:
    give(engine, 1)
    old = copy.deepcopy(model[0])
    perturb(model[0], "layers.0.self_attn.v_proj.lora_B", 0.5)
    check_that_no_prefix_outlives(engine, long_prompt, old, model[0], lambda: give(engine, 2))


def test_old_names_are_unloaded_and_none_comes_again(engine: Any, model: Any) -> None:
    seen: set[str] = set()
    for version in (1, 1, 2, 3):
        before = loaded(engine)
        give(engine, version)
        now = loaded(engine)
        assert len(now) == 2
        assert now[0] == before[-1]
        assert now[1] not in seen
        seen |= {*before, *now}


def test_a_server_that_is_killed_gets_its_adapters_again(
    engine: Any, model: Any, prompts: list[Prompt]
) -> None:
    redraw(model[0], 9)
    give(engine, 3)
    names, before = loaded(engine), processes(engine)
    futures = in_flight(engine, prompts, 12)
    os.kill(before[1].pid, signal.SIGKILL)
    rollouts = [r for future in futures for r in future.result(timeout=300)]
    assert len(rollouts) == 12 * 4
    # They may all have ended before it died: these cannot be answered until it is back.
    rollouts += engine.generate(prompts, SPEC)
    assert {v for r in rollouts for v in r.versions} == {3}
    assert mean_mismatch(model[0], rollouts[-8:], 1.0) < 1e-5
    assert loaded(engine) == names
    assert verify_sync(engine, model[0], prompts, tolerance=1e-5).stale == []


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_nobody_without_the_key_loads_adapters(verb: str, engine: Any, tmp_path: Path) -> None:
    url = engine._pool.members[0].client.url
    body = {"lora_name": "theirs", "lora_path": str(tmp_path)}
    answer = httpx.post(f"{url}/v1/{verb}_lora_adapter", json=body, trust_env=False)
    assert answer.status_code == 401
    assert not [name for name in loaded(engine) if not name.startswith("policy-")]
