"""Real vLLM servers that a trainer sends weights to as it does on GPUs, but for two stand-ins: gloo
for NCCL, on both sides, and a library in C for CUDA's runtime."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import LlamaForCausalLM

from recap_fast.rollout import server_command, transfer
from recap_fast.rollout.cuda_memory import ExportedMemory
from recap_fast.rollout.mismatch import verify_sync
from recap_fast.rollout.protocol import iter_weights
from recap_fast.rollout.shared_weights import DeviceMemoryWeights, SharedMemoryWeights
from recap_fast.types import Prompt
from tests.rollout import cuda_stand_in, gloo_group
from tests.rollout.conftest import random_llama
from tests.rollout.test_server import SPEC, check_that_a_group_arrives, processes, start
from tests.rollout.test_vllm import GROUPS, mean_mismatch, perturb

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins for what is there"),
]
CPU = torch.device("cpu")


def make_transfer(kind: str, dtype: Any, device: Any, shapes: Any, timeout: float) -> Any:
    if kind != "ipc":
        how = gloo_group.new_unique_id, gloo_group.join
        sparse = kind == "nccl_sparse"
        return transfer.NcclTransfer(dtype, device, timeout, *how, piece=10_000, sparse=sparse)
    allocate = partial(ExportedMemory, device=CPU)
    return transfer.MemoryTransfer(DeviceMemoryWeights(dtype, shapes, allocate))


@pytest.fixture(
    scope="module",
    params=[
        "nccl",
        *(
            pytest.param(kind, marks=pytest.mark.variant(group=kind))
            for kind in ("nccl_sparse", "ipc")
        ),
    ],
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp(kind)
    with pytest.MonkeyPatch.context() as patch:
        library = cuda_stand_in.build(folder)
        if library is None:
            pytest.skip("no C compiler")
        patch.setenv("CUDA_STAND_IN", str(folder))
        cuda_stand_in.use(library, patch.setattr)
        patch.setattr("recap_fast.rollout.server_command.EXTENSION", gloo_group.EXTENSION)
        patch.setattr("recap_fast.rollout.server.choose", lambda *_, **__: kind)
        patch.setattr("recap_fast.rollout.server.make_transfer", make_transfer)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        assert server_command.EXTENSION == gloo_group.EXTENSION
        found = start(random_llama(tied=True), folder)
        yield found
        found.close()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return copy.deepcopy(random_llama(tied=True))


def sent(engine: Any) -> float:
    """Bytes that were broadcast since the last call."""
    return float(engine.take_metrics()["rollout/sync_bytes"])


def in_full(kind: str) -> Any:
    """Those of all weights, with what is left free behind each."""
    tensors = dict(iter_weights(random_llama(tied=True), torch.float32)).values()
    return 0 if kind == "ipc" else sum(-(-tensor.nbytes // 64) * 64 for tensor in tensors)


def change_a_few(model: LlamaForCausalLM) -> None:
    """One value in twenty, by so much that completions differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            picked = torch.rand_like(parameter) < 0.05
            parameter.add_(0.3 * picked * torch.randn_like(parameter))


def check_sent_after_a_few_changes(engine: Any, kind: str) -> None:
    share = sent(engine) / (in_full(kind) or 1)
    assert 0.05 < share < 0.2 if kind == "nccl_sparse" else share == (kind == "nccl")


def test_every_version_arrives(engine: Any, model: LlamaForCausalLM, prompts: list[Prompt]) -> None:
    for version in (4, 5):
        perturb(model, "norm", 0.5)
        perturb(model, "embed_tokens")  # which is the head too
        engine.sync_weights(iter_weights(model, engine.dtype), version)
        rollouts = engine.generate(prompts, SPEC)
        assert {v for r in rollouts for v in r.versions} == {version}
        assert mean_mismatch(model, rollouts, 1.0) < 1e-5
        assert verify_sync(engine, model, prompts, tolerance=1e-5).stale == []


def test_small_changes_arrive(
    engine: Any, kind: str, model: LlamaForCausalLM, prompts: list[Prompt]
) -> None:
    engine.sync_weights(iter_weights(model, engine.dtype), 5)
    sent(engine)
    for version in (6, 7):
        change_a_few(model)
        engine.sync_weights(iter_weights(model, engine.dtype), version)
        check_sent_after_a_few_changes(engine, kind)
        rollouts = engine.generate(prompts, SPEC)
        assert {v for r in rollouts for v in r.versions} == {version}
        assert mean_mismatch(model, rollouts, 1.0) < 1e-5
        assert verify_sync(engine, model, prompts, tolerance=1e-5).stale == []


def test_a_server_that_is_killed_comes_back_with_the_weights(
    engine: Any, kind: str, model: LlamaForCausalLM, prompts: list[Prompt]
) -> None:
    """All of them; what comes after is what has changed again, if it was before."""
    if kind == "nccl":
        pytest.skip("as nccl_sparse, which sends all of them the first time")
    perturb(model, "norm", 0.5)
    engine.sync_weights(iter_weights(model, engine.dtype), 8)
    sent(engine)
    os.kill(processes(engine)[1].pid, signal.SIGKILL)
    rollouts = engine.generate(prompts, SPEC)
    assert {v for r in rollouts for v in r.versions} == {8}
    assert mean_mismatch(model, rollouts, 1.0) < 1e-5
    assert sent(engine) == in_full(kind)
    change_a_few(model)
    engine.sync_weights(iter_weights(model, engine.dtype), 9)
    check_sent_after_a_few_changes(engine, kind)
    assert mean_mismatch(model, engine.generate(prompts, SPEC), 1.0) < 1e-5


def test_sides_that_set_nccl_differently_form_no_group(
    engine: Any, kind: str, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which NCCL would let hang. Once they agree again there is one."""
    if kind != "nccl":
        pytest.skip("as nccl, or without groups")
    engine.sync_weights(iter_weights(model, engine.dtype), 10)
    engine._transfer._drop()
    client = engine._pool.members[0].client
    with monkeypatch.context() as patch:
        patch.setenv("NCCL_CUMEM_ENABLE", "0")
        patch.setattr(engine._transfer, "_join", lambda *_, **__: MagicMock())  # does not wait
        lost = engine._run(engine._transfer.send([client], engine._pool._weights))
    said = "NCCL_CUMEM_ENABLE is unset in the server and 0 in the trainer"
    assert said in str(lost[client])
    engine.sync_weights(iter_weights(model, engine.dtype), 11)


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_of_a_tied_model_arrives(
    group: str, engine: Any, model: LlamaForCausalLM, prompts: list[Prompt]
) -> None:
    """The embedding is the head."""
    check_that_a_group_arrives(group, engine, model, prompts)


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_of_a_tied_model_arrives_through_shared_memory(
    group: str,
    engine: Any,
    kind: str,
    model: LlamaForCausalLM,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Servers take weights in any way that the trainer chooses, so this one serves for that too."""
    if kind != "nccl":
        pytest.skip("as with nccl")
    shared = transfer.MemoryTransfer(SharedMemoryWeights(engine.dtype))
    monkeypatch.setattr(engine, "_transfer", shared)
    monkeypatch.setattr(engine._pool, "_transfer", shared)
    check_that_a_group_arrives(group, engine, model, prompts)
    shared.close()
