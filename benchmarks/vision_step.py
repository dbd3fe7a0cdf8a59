"""A whole hybrid training step with images, on random weights of Qwen2.5-VL's architecture.

The work: G prompts x R rollouts with two rewards, and S supervised rows, in one packed update.
Every prompt and every supervised row has one image. Float32 master weights, bfloat16 compute, one
AdamW update of the text model, and of the vision tower where that is trained.

FLOPs are counted as in `benchmarks.training_step`. A frozen tower has no backward pass; a trained
one's is twice its forward pass, but for the gradient of the patches, which nothing asks for.

    tower     = 2 P W_p + 2 M W_m + 4 D sum_p keys(p)    P patches, W_p: parameters that each meets
                                                         M image tokens, W_m: the merger's
                                                         keys(p): patches of its window or image
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.training_step import ModelShape, Step, model_settings, sharded_optimizer
from recap_fast.config import TrainConfig
from recap_fast.model import attention
from recap_fast.model.liger import patch_backbone
from recap_fast.model.policy import make_policy
from recap_fast.training.packing import PackedUpdate, pack_update
from recap_fast.types import ImageInput, Prompt, Rollout, SupervisedRow

MERGE = 2
"""Patches of an image token's side."""


@dataclass(frozen=True)
class TowerShape:
    """A vision tower, and the images that it gets: squares of `side` patches."""

    hidden: int
    layers: int
    full_layers: int  # with attention over the whole image, the others within windows
    heads: int
    intermediate: int
    patch: int  # pixels of its side
    window: int  # image tokens of its side
    side: int


@dataclass(frozen=True)
class VisionWorkload:
    """One step's work."""

    name: str
    text: ModelShape
    tower: TowerShape
    prompts: int
    group: int
    supervised: int
    text_tokens: int  # of a prompt, beside its image
    completion_tokens: int
    target_tokens: int
    max_tokens: int  # packed tokens in one pass
    gradient_checkpointing: bool

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group

    @property
    def image_tokens(self) -> int:
        return (self.tower.side // MERGE) ** 2

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + self.image_tokens + 2  # vision start and end


WORKLOADS = {
    "small": VisionWorkload(
        "tiny", ModelShape(128, 2, 4, 2, 256, 331), TowerShape(64, 2, 1, 2, 96, 4, 2, 12),
        prompts=2, group=4, supervised=2, text_tokens=8, completion_tokens=16, target_tokens=8,
        max_tokens=256, gradient_checkpointing=False,
    ),
    "cpu": VisionWorkload(
        "3M", ModelShape(192, 5, 6, 2, 512, 331), TowerShape(128, 4, 2, 4, 256, 4, 4, 16),
        prompts=8, group=8, supervised=8, text_tokens=40, completion_tokens=24, target_tokens=16,
        max_tokens=8192, gradient_checkpointing=False,
    ),
    "gpu": VisionWorkload(
        "Qwen2.5-VL-3B", ModelShape(2048, 36, 16, 2, 11008, 151936),
        TowerShape(1280, 32, 4, 16, 3420, 14, 4, 36),  # 504 x 504 pixels, 324 image tokens
        prompts=16, group=4, supervised=16, text_tokens=64, completion_tokens=512,
        target_tokens=256, max_tokens=16384, gradient_checkpointing=True,
    ),
}  # fmt: skip
"""By the word given to --shapes."""


def build_model(workload: VisionWorkload, device: torch.device, seed: int = 0) -> Any:
    """Qwen2_5_VLForConditionalGeneration with random float32 weights, made on the device."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    attention.register()
    torch.manual_seed(seed)
    text, tower = workload.text, workload.tower
    pairs = text.hidden // text.heads // 2  # of a head's values that are rotated together
    sections = [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]
    every = tower.layers // tower.full_layers
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": text.vocab,
            "hidden_size": text.hidden,
            "intermediate_size": text.intermediate,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": sections,
            },
        },
        vision_config={
            "depth": tower.layers,
            "hidden_size": tower.hidden,
            "intermediate_size": tower.intermediate,
            "num_heads": tower.heads,
            "out_hidden_size": text.hidden,
            "patch_size": tower.patch,
            "spatial_merge_size": MERGE,
            "window_size": tower.window * MERGE * tower.patch,
            "fullatt_block_indexes": list(range(every - 1, tower.layers, every)),
        },
        image_token_id=text.vocab - 1,
        video_token_id=text.vocab - 2,
        vision_start_token_id=text.vocab - 3,
        vision_end_token_id=text.vocab - 4,
        tie_word_embeddings=True,
        attn_implementation={"": attention.IMPLEMENTATION, "text_config": attention.IMPLEMENTATION},
    )  # fmt: skip
    with device:
        return Qwen2_5_VLForConditionalGeneration(config).train()


def make_rows(
    workload: VisionWorkload, seed: int = 0
) -> tuple[list[Rollout], np.ndarray, list[SupervisedRow]]:
    """Random rollouts, advantages [S, 3] float32 (two rewards), and supervised rows."""
    random = np.random.default_rng(seed)
    vocab, tower = workload.text.vocab, workload.tower

    def tokens(count: int) -> list[int]:
        return random.integers(vocab - 4, size=count).tolist()

    def image() -> ImageInput:
        values = 3 * 2 * tower.patch**2
        patches = torch.from_numpy(random.standard_normal((tower.side**2, values), np.float32))
        pixels = tower.side * tower.patch
        return ImageInput(Image.new("RGB", (pixels, pixels)), patches, (1, tower.side, tower.side))

    def prompt_tokens() -> list[int]:
        pictured = [vocab - 3, *[vocab - 1] * workload.image_tokens, vocab - 4]
        return pictured + tokens(workload.text_tokens)

    rollouts = []
    for group in range(workload.prompts):
        prompt = Prompt("random", group, prompt_tokens(), "", "", {}, (image(),))
        for _ in range(workload.group):
            completion = tokens(workload.completion_tokens)
            logprobs = [-math.log(vocab)] * len(completion)
            rollouts.append(Rollout(prompt, group, completion, logprobs, "length", ""))
    rows = [
        SupervisedRow(
            "replay", row, prompt_tokens() + tokens(workload.target_tokens),
            workload.prompt_tokens, (image(),),
        )
        for row in range(workload.supervised)
    ]  # fmt: skip
    advantages = np.full((len(rollouts), 3), np.nan, np.float32)
    advantages[:, :2] = random.standard_normal((len(rollouts), 2))
    return rollouts, advantages, rows


def make_config(
    workload: VisionWorkload,
    device: torch.device,
    *,
    liger: bool = True,
    train_vision: bool = False,
) -> TrainConfig:
    """Two rewarded objectives and a supervised one; no data is loaded from it."""
    rewards = {"accuracy": "accuracy", "format": "accuracy"}
    source = {"reasoning_gym": "chain_sum"}
    return TrainConfig.model_validate(
        {
            "run": "unused",
            "model": model_settings(workload, device, liger=liger, train_vision=train_vision),
            "data": {
                "sources": [
                    source | {"name": "random", "kind": "rl", "rewards": rewards},
                    source | {"name": "replay", "kind": "sft"},
                ],
                "max_prompt_tokens": workload.prompt_tokens,
                "max_supervised_tokens": workload.prompt_tokens + workload.target_tokens,
            },
            "rollout": {"max_new_tokens": workload.completion_tokens},
            "training": {
                "max_tokens": max(
                    workload.max_tokens, workload.prompt_tokens + workload.completion_tokens
                )
            },
        }
    )


def vision_step(
    workload: VisionWorkload,
    device: torch.device,
    *,
    train_vision: bool = False,
    liger: bool = True,
) -> tuple[Step, PackedUpdate]:
    """recap-fast's optimizer step from packed batches, images included, that lie on the device.

    The model is made and patched as the trainer's is, see `training_step.recap_optimizer`.
    """
    config = make_config(workload, device, liger=liger, train_vision=train_vision)
    patch_backbone(config.model, "qwen2_5_vl", device)
    policy = make_policy(build_model(workload, device), config.model, workload.name)
    optimizer = sharded_optimizer(policy, config)
    rollouts, advantages, rows = make_rows(workload)
    update = pack_update(
        rollouts, advantages, rows, [2] * len(rows),
        config=config.loss, max_tokens=config.training.max_tokens,
        attention=policy.attention, vision=policy.vision,
    ).to(device)  # fmt: skip
    weights = torch.ones(3, device=device)
    return lambda: optimizer.step(update, weights, 1e-6), update


def model_flops(
    workload: VisionWorkload, update: PackedUpdate, *, train_vision: bool = False
) -> float:
    """Floating-point operations of the step, see the module's text."""
    return _text_flops(workload, update) + _tower_flops(workload, train_vision)


def _text_flops(workload: VisionWorkload, update: PackedUpdate) -> float:
    shape = workload.text
    kv = shape.hidden // shape.heads * shape.kv_heads
    by_layer = shape.hidden * (2 * shape.hidden + 2 * kv + 3 * shape.intermediate)
    prompt, own = workload.prompt_tokens, workload.completion_tokens - 1
    row = prompt + workload.target_tokens - 1
    # A group's prompt is computed once; each completion attends to it and to itself.
    keys = workload.prompts * prompt * (prompt + 1) / 2
    keys += workload.rollouts * (own * prompt + own * (own + 1) / 2)
    keys += workload.supervised * row * (row + 1) / 2
    forward = 2 * update.num_packed_tokens * shape.layers * by_layer
    forward += 4 * shape.layers * shape.hidden * keys
    predicted = sum(len(batch.targets) for batch in update.batches)
    return 3 * forward + 6 * predicted * shape.hidden * shape.vocab


def _tower_flops(workload: VisionWorkload, trained: bool) -> float:
    tower, text = workload.tower, workload.text
    width, patches = tower.hidden, tower.side**2
    by_layer = width * (4 * width + 3 * tower.intermediate)
    embedding = 2 * patches * 3 * 2 * tower.patch**2 * width
    merged = MERGE**2 * width
    merger = merged * (merged + text.hidden)
    # Windows that stick out over the image's edge hold fewer patches.
    tokens = tower.side // MERGE
    lengths = [min(tower.window, tokens - start) for start in range(0, tokens, tower.window)]
    windows = sum((a * b * MERGE**2) ** 2 for a in lengths for b in lengths)
    keys = tower.full_layers * patches**2 + (tower.layers - tower.full_layers) * windows
    rest = 2 * patches * tower.layers * by_layer
    rest += 2 * workload.image_tokens * merger + 4 * width * keys
    image = 2 * embedding + 3 * rest if trained else embedding + rest
    return (workload.prompts + workload.supervised) * image
