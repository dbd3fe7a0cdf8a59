"""What a run, or an evaluation, tells its engine of the processes that share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recap_fast.model.policy import load_policy
from recap_fast.training import engine
from recap_fast.training.distributed import ALONE, World
from tests.tiny import save_tiny_model, tiny_config
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_leads(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny_model(tmp_path / "model")
    config = tiny_config(tmp_path, path)
    policy = load_policy(config.model, str(path))
    given: dict[str, Any] = {}
    monkeypatch.setattr(engine, "make_engine", lambda _, **named: given.update(named))
    world = World(rank, 2, torch.device("cpu"), mesh=object(), timeout=7.0)  # type: ignore[arg-type]
    engine.start_engine(config, policy, str(path), tiny_tokenizer(), None, world, logs=tmp_path)
    assert given["leads"] == (rank == 0)
    assert given["agree"] == world.on_main
    assert (given["world_size"], given["timeout"], given["logs"]) == (2, 7.0, tmp_path)
    second = given["detached"]()
    assert second is not policy.model
    assert not any(parameter.requires_grad for parameter in second.parameters())

    engine.start_engine(config, policy, str(path), tiny_tokenizer(), None, ALONE, logs=tmp_path)
    assert given["leads"]
    assert given["detached"] is None, "the trained module itself"
