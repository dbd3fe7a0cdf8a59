"""A second engine in the same process, of a model whose head is not tied to its embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from recap_fast.rollout.mismatch import verify_sync
from recap_fast.rollout.protocol import iter_weights
from recap_fast.types import Prompt, WeightSyncError
from tests.rollout.conftest import random_llama


@pytest.fixture(scope="module")
def vllm_model() -> Any:
    return random_llama(tied=False, seed=1)


@pytest.fixture
def model(vllm_model: Any, vllm_engine: Any) -> Iterator[Any]:
    before = {name: tensor.clone() for name, tensor in iter_weights(vllm_model)}
    yield vllm_model
    vllm_model.load_state_dict(before)
    vllm_engine.sync_weights(iter_weights(vllm_model))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_sync_delivers_head_and_embedding_apart(
    vllm_engine: Any, model: Any, prompts: list[Prompt], name: str
) -> None:
    assert verify_sync(vllm_engine, model, prompts).mean < 1e-4
    with torch.no_grad():
        model.get_parameter(name).add_(0.3 * torch.randn_like(model.get_parameter(name)))
    with pytest.raises(WeightSyncError, match=rf"of 1 of \d+ weights: {name}"):
        verify_sync(vllm_engine, model, prompts)
    vllm_engine.sync_weights(iter_weights(model))
    report = verify_sync(vllm_engine, model, prompts)
    assert report.mean < 1e-4
    assert report.stale == []
