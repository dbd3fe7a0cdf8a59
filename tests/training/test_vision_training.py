"""Training of a vision-language model from files of pictures, through every stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recap_fast.config import ModelConfig, TrainConfig, load_config
from recap_fast.model.errors import ModelError
from recap_fast.model.policy import load_policy
from recap_fast.model.vision import MODEL_TYPES
from recap_fast.report.metrics import read_metrics
from recap_fast.trainer import Trainer
from recap_fast.training.evaluate import evaluate_model
from tests.tiny import save_tiny_model, save_tiny_vision_model
from tests.vision_rows import picture

SIZES = [(40, 24), (16, 48), (33, 31), (8, 8)]


def write_rows(folder: Path, name: str, count: int) -> Path:
    """Rows with no image, one, or two, of several sizes."""
    rows = []
    for i in range(count):
        files = [f"{name}-{i}-{k}.png" for k in range(i % 3)]
        for k, file in enumerate(files):
            picture(*SIZES[(i + k) % len(SIZES)], seed=i).save(folder / file)
        question = f"{'<image>' * len(files)} what is {i}?"
        rows.append({"question": question, "answer": str(i), "image": files})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def vision_config(folder: Path, model: Path, *overrides: str) -> TrainConfig:
    rewards = {
        "length": "tests.tiny_rewards:length",
        "vowels": "tests.tiny_rewards:vowels",
    }
    sources: list[dict[str, Any]] = [
        {"name": "see", "kind": "rl", "rewards": rewards},
        {"name": "tell", "kind": "sft"},
    ]
    for source in sources:
        path = write_rows(folder, source["name"], 12)
        source |= {"path": str(path), "images": "image", "held_out": 3}
    settings = {
        "run": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32", "device": "cpu", "train_vision": True},
        "data": {"sources": sources, "batch_size": 4},
        "rollout": {"engine": "transformers", "group_size": 3, "max_new_tokens": 6},
        "reweighting": {"parameters": {"window": 1}},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 2, "max_tokens": 2048},
        "checkpoint": {"every": 1},
        "logging": {"tensorboard": False},
    }
    path = folder / "vision.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_config(path, overrides)


def run(config: TrainConfig, **options: Any) -> Trainer:
    trainer = Trainer(config, **options)
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_vision_model(tmp_path_factory.mktemp("model"))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def test_a_run_with_images(model, tmp_path):
    """Rollouts and supervised rows with images; log-probs agree to rounding; a checkpoint is a
    whole model, and a resumed run ends where an uninterrupted one does."""
    config = vision_config(tmp_path, model)
    trainer = run(config)
    steps = [row for row in read_metrics(tmp_path / "run") if "loss/ntp" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["rollout/logprob_diff_max"] < 1e-4 for row in steps)
    assert all(row["loss/ntp"] > 0 and row["grad_norm"] > 0 for row in steps)
    ends = read_metrics(tmp_path / "run")
    assert {"eval/see/length", "eval/tell/loss"} <= ends[0].keys()
    start = load_policy(config.model, str(model)).model.state_dict()
    moved = {n for n, p in weights(trainer).items() if not torch.equal(p, start[n])}
    assert any("visual.merger" in name for name in moved)
    assert any("visual.patch_embed" in name for name in moved)
    assert any("layers.0.self_attn" in name for name in moved)

    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    assert (checkpoint / "preprocessor_config.json").exists()
    found = evaluate_model(config, str(checkpoint))
    assert found["eval/tell/loss"] == pytest.approx(ends[-1]["eval/tell/loss"], rel=1e-5)

    other = tmp_path / "other"
    other.mkdir()
    run(vision_config(other, model, "training.steps=2", "checkpoint.every=1", "checkpoint.keep=2"))
    shutil.rmtree(other / "run" / "checkpoints" / "step-000002")
    resumed = run(load_config(other / "run" / "config.yaml"), resume=True)
    for name, parameter in weights(resumed).items():
        torch.testing.assert_close(parameter, trainer.policy.model.get_parameter(name), msg=name)


def test_a_frozen_tower_stays_as_it_was(model, tmp_path):
    """No gradient and no optimizer state; a reference for the KL term sees the same images."""
    config = vision_config(
        tmp_path, model, "model.train_vision=false", "training.steps=1", "loss.kl_coef=0.05",
        "model.reference=initial", "model.gradient_checkpointing=true", "evaluation.before=false",
    )  # fmt: skip
    trainer = run(config)
    start = load_policy(config.model, str(model)).model.state_dict()
    for name, parameter in trainer.policy.model.named_parameters():
        frozen = "visual" in name
        assert torch.equal(parameter, start[name]) == frozen, name
        assert (parameter in trainer.optimizer.optimizer.state) == (not frozen), name
    assert read_metrics(tmp_path / "run")[-1]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_models_load_whole_and_frozen(kind, tmp_path):
    folder = save_tiny_vision_model(tmp_path, kind)
    policy = load_policy(ModelConfig(path=str(folder), device="cpu"), str(folder))
    assert policy.vision is not None
    trained = {n.split(".")[1] for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == {"language_model"}
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())
    both = load_policy(
        ModelConfig(path=str(folder), device="cpu", train_vision=True), str(folder)
    ).model
    assert all(p.requires_grad for p in both.parameters())
    assert both.get_output_embeddings().weight is both.get_input_embeddings().weight


def test_a_text_model_has_no_vision_to_train(tmp_path):
    folder = save_tiny_model(tmp_path)
    config = ModelConfig(path=str(folder), device="cpu", train_vision=True)
    with pytest.raises(ModelError, match=r"model\.train_vision: .* of type llama"):
        load_policy(config, str(folder))
