"""When the engine is asleep, and in what order it wakes: with a recorder in vLLM's place, and on a
GPU with vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recap_fast.config import ConfigError, RolloutConfig
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.mismatch import verify_sync
from recap_fast.rollout.protocol import EngineError, iter_weights
from recap_fast.rollout.vllm import VllmEngine, why_unavailable
from recap_fast.types import Prompt, SamplingSpec
from tests.rollout.conftest import random_llama
from tests.tiny import save_tiny_model, tiny_config
from tests.tiny_tokenizer import tiny_tokenizer


class RecordingLLM:
    """In the place of vllm.LLM: notes what is called, and does nothing."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.calls: list[Any] = []
        self.llm_engine = SimpleNamespace(has_unfinished_requests=lambda: False)

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", *tags))

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append((method, [name for name, _ in kwargs["weights_iterator"]]))

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return True

    def enqueue(self, requests: Any, *given: Any, **named: Any) -> list[str]:
        self.calls.append("generate")
        return []


def recorded(sleep: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[VllmEngine, RecordingLLM]:
    if (reason := why_unavailable(torch.device("cpu"))) is not None:
        pytest.skip(f"vLLM cannot run here: {reason}")
    monkeypatch.setattr("vllm.LLM", RecordingLLM)
    monkeypatch.setattr("recap_fast.rollout.vllm.device_arguments", lambda *given: {})
    engine = VllmEngine(
        RolloutConfig(engine="vllm", sleep=sleep),
        model_path="nowhere",
        tokenizer=tiny_tokenizer(),
        max_model_len=64,
        seed=0,
        device=torch.device("cuda", 0),
        weight_names=frozenset({"w"}),
        stop_ids=frozenset({1}),
    )
    llm: Any = engine._llm
    return engine, llm


WEIGHTS = [("w", torch.zeros(1))]
PROMPT = Prompt("s", 0, [5, 6], "", "", {})


def test_weights_come_before_the_cache_has_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, llm = recorded(True, monkeypatch)
    assert llm.arguments["enable_sleep_mode"] is True
    engine.sync_weights(WEIGHTS)  # the first: it is awake
    engine.generate([PROMPT], SamplingSpec(1, 4, 1.0, 0))
    engine.sleep()
    engine.sleep()  # as before an update that another one follows
    engine.sync_weights(WEIGHTS)
    engine.generate([PROMPT], SamplingSpec(1, 4, 1.0, 0))
    assert llm.calls == [
        ("reload_weights", ["w"]), "reset_prefix_cache", "generate",
        ("sleep", 2),
        ("wake_up", "weights"), ("reload_weights", ["w"]), ("wake_up", "kv_cache"),
        "reset_prefix_cache", "generate",
    ]  # fmt: skip


def test_without_the_setting_it_stays_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, llm = recorded(False, monkeypatch)
    assert llm.arguments["enable_sleep_mode"] is False
    engine.sleep()
    engine.sync_weights(WEIGHTS)
    assert llm.calls == [("reload_weights", ["w"]), "reset_prefix_cache"]


def test_the_trainer_lets_it_sleep_between_sampling_and_sync(tmp_path: Path) -> None:
    from recap_fast.trainer import Trainer

    config = tiny_config(tmp_path, save_tiny_model(tmp_path / "model"), "training.steps=2")
    trainer = Trainer(config)
    calls: list[str] = []

    def noted(name: str, plain: Any) -> Any:
        return lambda *given, **named: (calls.append(name), plain(*given, **named))[1]

    for name in ("generate", "sleep", "sync_weights"):
        setattr(trainer.engine, name, noted(name, getattr(trainer.engine, name)))
    trainer.optimizer.step = noted("update", trainer.optimizer.step)  # type: ignore[method-assign]
    trainer.train()
    trainer.close()
    step = ["generate", "sleep", "update", "sync_weights"]
    assert [name for name in calls if name != "generate"] == 2 * step[1:]
    assert calls[1 : 1 + 2 * len(step)] == 2 * step  # between two evaluations


def test_a_cpu_has_no_such_sleep(tmp_path: Path) -> None:
    if (reason := why_unavailable(torch.device("cpu"))) is not None:
        pytest.skip(f"vLLM cannot run here: {reason}")
    with pytest.raises(EngineError, match="rollout.sleep is true, and the model is on cpu"):
        make_engine(
            RolloutConfig(engine="vllm", sleep=True),
            model=random_llama(),
            model_path="nowhere",
            tokenizer=tiny_tokenizer(),
            max_model_len=64,
            seed=0,
            device="cpu",
        )


@pytest.mark.parametrize("setting", ["sleep=true", "tensor_parallel_size=2"])
def test_settings_of_vllm_are_not_for_transformers(tmp_path: Path, setting: str) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{name} is .*, which only vllm knows"):
        tiny_config(tmp_path, tmp_path, f"rollout.{setting}")


@pytest.mark.gpu
def test_memory_is_given_back_and_the_weights_return(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    if (reason := why_unavailable(device)) is not None:
        pytest.skip(f"vLLM cannot run here: {reason}")
    model = random_llama().to(device)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = make_engine(
        RolloutConfig(engine="vllm", dtype="float32", sleep=True),
        model=model,
        model_path=str(tmp_path),
        tokenizer=tiny_tokenizer(),
        max_model_len=128,
        seed=0,
        device=device,
        kv_cache_bytes=2**30,
    )
    prompts = [Prompt("s", 0, tiny_tokenizer()("1+1=")["input_ids"], "", "", {})]
    engine.sync_weights(iter_weights(model))
    spec = SamplingSpec(4, 16, 1.0, 3)
    before = engine.generate(prompts, spec)
    free = torch.cuda.mem_get_info(device)[0]
    engine.sleep()
    assert torch.cuda.mem_get_info(device)[0] - free > 0.9 * 2**30
    engine.sync_weights(iter_weights(model))
    assert engine.generate(prompts, spec) == before
    assert verify_sync(engine, model, prompts).stale == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    engine.sleep()
    engine.sync_weights(iter_weights(model))
    assert verify_sync(engine, model, prompts).stale == []
    assert engine.generate(prompts, spec) != before
    engine.close()
