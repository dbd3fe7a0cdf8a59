"""A causal LM small enough for tests, built with random weights and a real architecture."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recap_fast import attention
from recap_fast.model import Policy

VOCAB = 331


def tiny_policy(
    *, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2
) -> Policy:
    """A two-layer Llama with grouped-query attention, float32 weights, computing in `dtype`."""
    attention.register()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attn_implementation=attention.IMPLEMENTATION,
    )
    return Policy(LlamaForCausalLM(config), dtype)
