"""Whole runs on rows with images, from files to checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

from recap_fast.config import load_config
from recap_fast.model.vision import MODEL_TYPES
from recap_fast.trainer import Trainer
from recap_fast.training.evaluate import evaluate_model
from tests.tiny import MERGE, PATCH, tiny_vision_config
from tests.vision_rows import picture, vision_tokenizer, vision_tokens

SIDE = PATCH * MERGE


def save_model(folder, kind):
    tokenizer = vision_tokenizer()
    tokens = vision_tokens(tokenizer)
    config = tiny_vision_config(kind, vocab_size=len(tokenizer))
    config.image_token_id, config.video_token_id = tokens.image, tokens.video
    config.vision_start_token_id, config.vision_end_token_id = tokens.start, tokens.end
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, min_pixels=SIDE**2, max_pixels=16 * SIDE**2
    ).save_pretrained(folder)
    return folder


@pytest.fixture(params=MODEL_TYPES)
def settings(request, tmp_path):
    import yaml

    for number in range(6):
        picture(SIDE * (1 + number % 3), SIDE, seed=number).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_text("broken")
    rows = [
        {
            "question": f"Where? {i}",
            "image": f"{i}.png",
            "box": [1, 1, 6, 6],
            "text": "ab" * (i + 1),
        }
        for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"path": str(tmp_path / "rows.jsonl"), "images": "image", "held_out": 1}
    rewards = {"length": "tests.tiny_rewards:length", "iou": "iou"}
    config = {
        "run": str(tmp_path / "run"),
        "model": {
            "path": str(save_model(tmp_path / "model", request.param)),
            "dtype": "float32", "device": "cpu", "train_vision": True,
        },
        "data": {
            "sources": [
                {"name": "boxes", "kind": "rl", "answer": "box", "rewards": rewards, **common},
                {"name": "text", "kind": "sft", "answer": "text", **common},
            ],
            "batch_size": 12, "max_skipped_fraction": 0.9,
        },
        "rollout": {"engine": "transformers", "group_size": 2, "max_new_tokens": 4},
        "training": {"steps": 2, "max_tokens": 2048},
        "reweighting": {"parameters": {"window": 1}},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.thinned(3)
def test_trains_evaluates_and_goes_on(settings):
    config = load_config(settings)
    trainer = Trainer(config)
    tower = trainer.policy.vision.tower
    before = {name: parameter.clone() for name, parameter in tower.named_parameters()}
    assert trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in tower.named_parameters())
    trainer.close()
    lines = (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    last = rows[-1]
    assert {"eval/boxes/iou", "eval/text/loss", "loss/ntp", "reward/iou"} <= set(last)
    assert last["skipped/boxes/image_unreadable"] > 0
    assert last["skipped/text/image_unreadable"] > 0
    # None in a step in which no reward differed within a group.
    differences = [row.get("rollout/logprob_diff_max") for row in rows]
    assert 0 < max(filter(None, differences)) < 1e-3
    (checkpoint,) = (trainer.run_dir / "checkpoints").glob("step-*")
    assert (checkpoint / "preprocessor_config.json").exists()
    again = evaluate_model(config, str(checkpoint))
    assert again["eval/text/loss"] == pytest.approx(last["eval/text/loss"], abs=1e-4)
    longer = load_config(settings, ["training.steps=3"])
    resumed = Trainer(longer, resume=True)
    assert resumed.step == 2
    assert resumed.train()
    resumed.close()
