"""Tiny models on disk, prompts for them, and the one vLLM engine of the test process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recap_fast.config import RolloutConfig
from recap_fast.rollout import server_pool
from recap_fast.types import Prompt
from tests.rollout.fake_server import FakeServer
from tests.tiny_tokenizer import tiny_tokenizer

TEXTS = ["1+1=", "spell cat backwards", "a", "what is 12 + 30?"]


def random_llama(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """Head size 32, which vLLM's attention supports on a CPU; every weight random, norms too."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.train()


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def prompts(tokenizer: Any) -> list[Prompt]:
    return [
        Prompt("test", row, tokenizer(text)["input_ids"], text, "", {})
        for row, text in enumerate(TEXTS)
    ]


@pytest.fixture
def long_prompt() -> Prompt:
    """Of more than two of a server's cache blocks, so that its prefix is kept."""
    return Prompt("test", 0, [(7 * i) % 90 + 3 for i in range(80)], "", "", {})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool leaves a server after about two seconds of silence."""
    monkeypatch.setattr(server_pool, "_WATCHED_EVERY", 0.1)
    monkeypatch.setattr(server_pool, "_HEALTH_WAIT", 1.0)


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    found = [FakeServer(), FakeServer()]
    yield found
    for server in found:
        server.die()


def start_vllm(model: LlamaForCausalLM, folder: Path) -> Any:
    """An engine in float32: only there is a lost weight told apart from rounding to 1e-4."""
    from recap_fast.rollout.factory import make_engine
    from recap_fast.rollout.vllm import why_unavailable

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_unavailable(device)
    if reason is not None:
        pytest.skip(f"vLLM cannot run here: {reason}")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return make_engine(
        RolloutConfig(engine="vllm", dtype="float32", cpu_kv_cache_gib=0.05),
        model=model,
        model_path=str(folder),
        tokenizer=tiny_tokenizer(),
        max_model_len=128,
        seed=0,
        device=device,
    )


@pytest.fixture(scope="module")
def vllm_model() -> LlamaForCausalLM:
    return random_llama(tied=True)


@pytest.fixture(scope="module")
def vllm_engine(
    vllm_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """One engine for all of a module's tests: a process can have one open at a time."""
    engine = start_vllm(vllm_model, tmp_path_factory.mktemp("tied-llama"))
    yield engine
    engine.close()
