"""vLLM with vision-language models: real engines, tiny models, pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Qwen2VLImageProcessorPil

from recap_fast.config import ModelConfig, RolloutConfig
from recap_fast.data.images import ImageEncoder
from recap_fast.model.policy import load_policy, load_tokenizer
from recap_fast.model.vision import MODEL_TYPES
from recap_fast.report.metrics import read_metrics
from recap_fast.rollout.embedded import inference_state
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.mismatch import sequence_logprobs, verify_sync, weight_differences
from recap_fast.rollout.protocol import EngineError, iter_weights
from recap_fast.rollout.vllm import why_unavailable
from recap_fast.types import Prompt, SamplingSpec
from tests.rollout.vllm_vision import vllm_takes_images
from tests.tiny import save_tiny_vision_model
from tests.training.test_vision_training import run, vision_config
from tests.vision_rows import picture, vision_tokens

# Head size 32, which vLLM's attention supports on a CPU.
TEXT = {
    "hidden_size": 128,
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6],
    },
}  # fmt: skip
SIZES: list[list[tuple[int, int]]] = [[], [(24, 40)], [(16, 16), (48, 24)], [(24, 40)]]


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param((kind, "cpu"), id=kind) for kind in MODEL_TYPES),
        pytest.param(("qwen2_5_vl", "cuda"), marks=pytest.mark.gpu, id="gpu"),
    ],
)
def running(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The trainer's model, an engine, and prompts with no image, one and two."""
    kind, device = request.param
    reason = why_unavailable(torch.device(device))
    if reason is not None:
        pytest.skip(f"vLLM cannot run here: {reason}")
    folder = save_tiny_vision_model(tmp_path_factory.mktemp(kind), kind, **TEXT)
    dtype = "float32" if device == "cpu" else "bfloat16"
    # Liger would patch transformers for the process, and other tests run this model on the CPU.
    config = ModelConfig(
        path=str(folder), device=device, dtype=dtype, train_vision=True, liger=False
    )
    model = load_policy(config, str(folder)).model
    tokenizer = load_tokenizer(str(folder))
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    encoder = ImageEncoder(vision_tokens(tokenizer), processor)
    with vllm_takes_images(kind, folder):
        engine = make_engine(
            RolloutConfig(engine="vllm", dtype=dtype, cpu_kv_cache_gib=0.05),
            model=model,
            model_path=str(folder),
            tokenizer=tokenizer,
            max_model_len=128,
            seed=0,
            device=device,
            image_pixels=encoder.pixel_budget,
        )
        prompts = [draw_prompt(row, sizes, tokenizer, encoder) for row, sizes in enumerate(SIZES)]
        yield model, engine, prompts
        engine.close()


@pytest.mark.slow
def test_a_run_through_vllm(tmp_path):
    """Two steps that train the tower: were one of them not synced, log-probs would differ."""
    if why_unavailable(torch.device("cpu")) is not None:
        pytest.skip("no vLLM for a CPU here")
    folder = save_tiny_vision_model(tmp_path / "model", **TEXT)
    config = vision_config(
        tmp_path, folder, "rollout.engine=vllm", "rollout.dtype=float32",
        "rollout.cpu_kv_cache_gib=0.05", "data.max_prompt_tokens=120", "checkpoint.every=0",
        "training.steps=2", "optimizer.learning_rate=0.01", "optimizer.warmup_fraction=0",
        "evaluation.before=false", "evaluation.after=false",
    )  # fmt: skip
    with vllm_takes_images("qwen2_5_vl", folder):
        run(config)
    steps = [row for row in read_metrics(tmp_path / "run") if "grad_norm" in row]
    assert len(steps) == 2
    assert all(row["rollout/logprob_diff_max"] < 1e-4 for row in steps)
    assert steps[0]["loss/ntp"] > steps[-1]["loss/ntp"]


def test_without_torchvision_images_go_to_transformers(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("recap_fast.rollout.vllm._has_torchvision", lambda: False)
    folder = save_tiny_vision_model(tmp_path)
    model = load_policy(ModelConfig(path=str(folder), device="cpu"), str(folder)).model
    settings = {"model": model, "model_path": str(folder), "max_model_len": 128, "seed": 0,
                "tokenizer": load_tokenizer(str(folder)), "device": "cpu"}  # fmt: skip
    if why_unavailable(torch.device("cpu")) is not None:
        pytest.skip("no vLLM for a CPU here")
    assert make_engine(RolloutConfig(), **settings).name == "transformers"
    assert "need torchvision, which is not installed" in caplog.text
    with pytest.raises(EngineError, match="vision-language models need torchvision"):
        make_engine(RolloutConfig(engine="vllm"), **settings)


def draw_prompt(row: int, sizes: Any, tokenizer: Any, encoder: ImageEncoder) -> Prompt:
    images = tuple(encoder.encode(picture(*size, seed=row)) for size in sizes)
    ids = tokenizer("look ")["input_ids"]
    tokens = encoder.tokens
    for image in images:
        ids += [tokens.start, *[tokens.image] * encoder.num_tokens(image), tokens.end]
        ids += tokenizer(" and")["input_ids"]
    return Prompt("pictures", row, ids, "", None, {}, images)


def largest_difference(model: Any, engine: Any, prompts: list[Prompt]) -> float:
    rollouts = engine.generate(prompts, SamplingSpec(3, 8, 1.0, seed=0))
    with inference_state(model, engine.dtype):
        ours = torch.cat([sequence_logprobs(model, r) for r in rollouts]).cpu()
    return (ours - torch.tensor([p for r in rollouts for p in r.logprobs])).abs().max().item()


@pytest.mark.thinned(4)
def test_engine_and_trainer_agree_before_and_after_the_tower_changes(running):
    """A changed vision tower shows at once, and a sync ends it: no image's features survive."""
    model, engine, prompts = running
    exact = engine.dtype == torch.float32
    tolerance = 1e-5 if exact else 0.3
    engine.sync_weights(iter_weights(model))
    assert verify_sync(engine, model, prompts).stale == []
    differences = weight_differences(engine, iter_weights(model))
    for part in ("language_model.layers.0", "visual.blocks.0", "visual.merger"):
        assert any(part in name for name in differences), part
    assert largest_difference(model, engine, prompts) < tolerance
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "visual" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    if exact:
        assert largest_difference(model, engine, prompts) > 0.1
    engine.sync_weights(iter_weights(model))
    assert largest_difference(model, engine, prompts) < tolerance
