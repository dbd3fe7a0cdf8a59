"""A causal LM small enough for tests, built with random weights and a real architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from recap_fast import attention
from recap_fast.config import TrainConfig, load_config
from recap_fast.model import Policy
from tests.tiny_tokenizer import tiny_tokenizer

VOCAB = 331


def tiny_llama(*, tied: bool = True, seed: int = 0, vocab: int = VOCAB) -> LlamaForCausalLM:
    """A two-layer Llama with grouped-query attention."""
    attention.register()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attn_implementation=attention.IMPLEMENTATION,
    )
    return LlamaForCausalLM(config)


def tiny_policy(*, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> Policy:
    """Float32 weights, computing in `dtype`."""
    return Policy(tiny_llama(tied=tied, seed=seed), dtype)


def save_tiny_model(folder: Path) -> Path:
    """A model folder with random weights and a character tokenizer."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_settings(folder: Path, model: Path) -> dict[str, Any]:
    """A run of 3 objectives and 4 steps, on the transformers engine, in under a second a step."""
    rewards = {
        "length": "tests.tiny_rewards:length",
        "vowels": "tests.tiny_rewards:vowels",
    }
    return {
        "run": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {
            "sources": [
                {
                    "name": "sums", "kind": "rl", "reasoning_gym": "chain_sum", "size": 100,
                    "parameters": {"min_terms": 2, "max_terms": 2}, "rewards": rewards,
                    "held_out": 4,
                },
                {
                    "name": "words", "kind": "sft", "reasoning_gym": "spell_backward",
                    "size": 100, "parameters": {"max_word_len": 5}, "held_out": 4,
                },
            ],
            "batch_size": 4,
            "mixing": {"sums": 1, "words": 1},
        },
        "rollout": {"engine": "transformers", "group_size": 4, "max_new_tokens": 8},
        "reweighting": {"parameters": {"window": 1}},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 4, "max_tokens": 2048},
        "checkpoint": {"every": 2},
        "logging": {"tensorboard": False},
    }  # fmt: skip


def tiny_config(folder: Path, model: Path, *overrides: str) -> TrainConfig:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(folder, model)))
    return load_config(path, overrides)
