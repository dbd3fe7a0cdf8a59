"""What vLLM is told when it starts in several processes, in vLLM's own words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recap_fast.config import RolloutConfig
from recap_fast.model.shapes import load_shapes
from recap_fast.rollout.factory import check_tensor_parallel, make_engine
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.vllm import process_arguments, why_unavailable
from tests.rollout.conftest import random_llama
from tests.tiny_tokenizer import tiny_tokenizer

CUDA, CPU = torch.device("cuda", 1), torch.device("cpu")


@pytest.fixture(autouse=True)
def _needs_vllm() -> None:
    if (reason := why_unavailable(CPU)) is not None:
        pytest.skip(f"vLLM cannot run here: {reason}")


def shared(size: int) -> RolloutConfig:
    return RolloutConfig(engine="vllm", tensor_parallel_size=size)


def test_one_process_is_told_nothing() -> None:
    assert process_arguments(RolloutConfig(), CUDA, 1, 600) == {}


@pytest.mark.parametrize("size", [1, 2])
def test_the_launcher_places_engines_on_their_own_gpus(tmp_path: Path, size: int) -> None:
    """With an engine each too: vLLM's default executor would put all onto the first GPU."""
    from vllm.engine.arg_utils import EngineArgs

    found: dict[str, Any] = process_arguments(shared(size), CUDA, 4, 599.5)
    arguments = EngineArgs(model=str(tmp_path), **found)
    assert arguments.tensor_parallel_size == size
    assert arguments.distributed_executor_backend == "external_launcher"
    assert arguments.distributed_timeout_seconds == 600
    assert arguments.cpu_distributed_timeout_seconds == 600


def test_on_a_cpu_the_launchers_executor_takes_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that differ by process are what makes vLLM's CPU communicator leave shared memory."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    executor = process_arguments(shared(2), CPU, 2, 600)["distributed_executor_backend"]
    assert issubclass(executor, ExecutorWithExternalLauncher)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    method, rank, local_rank = executor._distributed_args(object.__new__(executor))
    assert (rank, local_rank) == (3, 1)
    monkeypatch.setattr("os.getpid", lambda: 7)
    assert executor._distributed_args(object.__new__(executor))[0] != method


@pytest.mark.parametrize(
    ("size", "message"),
    [(8, "does not divide the model's 28 attention heads"), (3, "28 attention heads")],
)
def test_models_that_cannot_be_cut(size: int, message: str) -> None:
    shapes = load_shapes("Qwen/Qwen2.5-7B")
    with pytest.raises(EngineError, match=message):
        check_tensor_parallel(shared(size), shapes)
    for fits in (1, 2, 4):
        check_tensor_parallel(shared(fits), shapes)
    with pytest.raises(EngineError, match="4 heads of keys and values"):
        check_tensor_parallel(shared(14), replace(shapes, intermediate=14))


def test_transformers_does_not_stand_in_for_a_shared_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recap_fast.rollout.vllm.why_unavailable", lambda *given, **named: "no")
    with pytest.raises(EngineError, match="tensor_parallel_size is 2, which needs vllm"):
        make_engine(
            RolloutConfig(tensor_parallel_size=2),
            model=random_llama(),
            model_path="nowhere",
            tokenizer=tiny_tokenizer(),
            max_model_len=64,
            seed=0,
            device="cpu",
        )
