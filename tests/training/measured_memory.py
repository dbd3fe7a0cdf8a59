"""What a run's model, optimizer and two steps take on a CPU, measured in a process of its own."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measuring import resident_growth
from recap_fast.config import TrainConfig
from recap_fast.model import attention
from recap_fast.model.policy import make_policy
from recap_fast.training.optimization import PolicyOptimizer
from recap_fast.training.packing import PackedUpdate, pack_update
from recap_fast.types import SupervisedRow

_M_MMAP_THRESHOLD = -3  # malloc.h


def make_config(
    *, gradient_checkpointing: str, max_tokens: int, state: str = "float32"
) -> TrainConfig:
    source = {"name": "words", "kind": "sft", "reasoning_gym": "spell_backward"}
    return TrainConfig.model_validate({
        "run": "unused",
        "model": {"path": "unused", "dtype": "float32", "device": "cpu",
                  "gradient_checkpointing": gradient_checkpointing},
        "data": {"sources": [source], "max_prompt_tokens": 64, "max_supervised_tokens": 256},
        "rollout": {"max_new_tokens": 64},
        "training": {"max_tokens": max_tokens},
        "optimizer": {"state": state},
    })  # fmt: skip


def _update(config: TrainConfig, tokens: int, length: int, vocabulary: int) -> PackedUpdate:
    """Supervised sequences of `length`, `tokens` in all, in one pass."""
    rows = [
        SupervisedRow("words", i, torch.randint(1, vocabulary, (length,)).tolist(), 1)
        for i in range(tokens // length)
    ]
    update = pack_update(
        [], torch.zeros(0, 1).numpy(), rows, [0] * len(rows),
        config=config.loss, max_tokens=config.training.max_tokens,
    )  # fmt: skip
    assert len(update.batches) == 1
    return update


def peak(fields: dict[str, Any], settings: dict[str, Any], tokens: int, length: int) -> int:
    """Bytes by which resident memory rises at most, from before the model is made to the end of its
    second step.

    Blocks above 64 KiB are given back to the system when they are freed: by itself, glibc comes to
    keep those below 32 MiB, and what lies idle between others would be counted.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    attention.register()
    config = make_config(**settings)

    def run(fields: dict[str, Any], tokens: int, length: int) -> None:
        torch.manual_seed(0)
        model_config = AutoConfig.for_model(**fields)
        model = AutoModelForCausalLM.from_config(
            model_config, attn_implementation=attention.IMPLEMENTATION
        )
        policy = make_policy(model, config.model, "measured")
        optimizer = PolicyOptimizer(policy, None, config)
        update = _update(config, tokens, length, fields["vocab_size"])
        for _ in range(2):
            optimizer.step(update, torch.ones(1), 1e-6)

    small = {"intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    run(fields | small, 32, 16)  # libraries allocate for good when they are first used
    return resident_growth(lambda: run(fields, tokens, length))
