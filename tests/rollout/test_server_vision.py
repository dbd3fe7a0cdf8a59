"""A real vLLM server with a vision-language model: its weights, and images that it has seen."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLImageProcessorPil

from recap_fast.config import ModelConfig, RolloutConfig
from recap_fast.data.images import ImageEncoder
from recap_fast.model.policy import load_policy, load_tokenizer
from recap_fast.rollout import server
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.mismatch import verify_sync
from recap_fast.rollout.protocol import iter_weights
from recap_fast.types import WeightSyncError
from tests.rollout.test_vllm import perturb
from tests.rollout.test_vllm_vision import SIZES, TEXT, draw_prompt, largest_difference
from tests.tiny import save_tiny_vision_model
from tests.vision_rows import vision_tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.is_available(), reason="its engine is not forked there"),
]

GROUPS = [
    "visual.patch_embed", "visual.blocks.0", "visual.merger", "language_model.embed_tokens",
    "layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "language_model.norm",
]  # fmt: skip
VERSIONS = count(1)
"""Each of other weights: what is cached goes by it."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The trainer's model, a server, and prompts with no image, one and two."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("server")
    path = save_tiny_vision_model(folder / "model", **TEXT)
    config = ModelConfig(path=str(path), device="cpu", dtype="float32", train_vision=True)
    model = load_policy(config.model_copy(update={"liger": False}), str(path)).model
    tokenizer = load_tokenizer(str(path))
    encoder = ImageEncoder(vision_tokens(tokenizer), Qwen2VLImageProcessorPil.from_pretrained(path))
    command = server.server_command

    def with_stand_ins(*args: Any, **options: Any) -> list[str]:
        python, flag, _, *rest = command(*args, **options)
        return [python, flag, "tests.rollout.vision_server", *rest]

    settings = {
        "engine": "vllm_server", "dtype": "float32", "cpu_kv_cache_gib": 0.05,
        "server": {"timeout": 60.0},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "server_command", with_stand_ins)
        patch.setattr(server, "check_installed", lambda **_: None)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        engine = make_engine(
            RolloutConfig.model_validate(settings),
            model=model,
            model_path=str(path),
            tokenizer=tokenizer,
            max_model_len=256,
            seed=0,
            device="cpu",
            image_pixels=encoder.pixel_budget,
            logs=folder / "logs",
        )
    prompts = [draw_prompt(row, sizes, tokenizer, encoder) for row, sizes in enumerate(SIZES)]
    yield model, engine, prompts
    engine.close()


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_of_parameters_arrives(group: str, running: Any) -> None:
    model, engine, prompts = running
    engine.sync_weights(iter_weights(model, engine.dtype), next(VERSIONS))
    perturb(model, group)
    with pytest.raises(WeightSyncError):
        verify_sync(engine, model, prompts, tolerance=1e-4)
    engine.sync_weights(iter_weights(model, engine.dtype), next(VERSIONS))
    assert verify_sync(engine, model, prompts, tolerance=1e-5).stale == []


def test_an_image_that_was_seen_before_an_update_is_looked_at_again(running: Any) -> None:
    """With its features of the old tower log-probs are others."""
    model, engine, prompts = running
    engine.sync_weights(iter_weights(model, engine.dtype), next(VERSIONS))
    assert largest_difference(model, engine, prompts) < 1e-5
    perturb(model, "visual", 0.05)
    assert largest_difference(model, engine, prompts) > 0.1
    engine.sync_weights(iter_weights(model, engine.dtype), next(VERSIONS))
    assert largest_difference(model, engine, prompts) < 1e-5
