"""Weights, gradients and optimizer state on the host: the same numbers, and where it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from recap_fast.cli import app
from recap_fast.config import ConfigError, save_config
from recap_fast.trainer import Trainer
from recap_fast.training.distributed import start_world
from tests.processes import run_ranks
from tests.tiny import save_tiny_model, tiny_config

RANKS = Path(__file__).with_name("offload_ranks.py")


@pytest.mark.slow
def test_offloaded_processes_train_to_the_bit_as_others(tmp_path: Path) -> None:
    """Steps of several passes, one of them skipped, with each kind of optimizer state."""
    (tmp_path / "model").mkdir()
    for found in run_ranks(RANKS, 2, tmp_path, str(tmp_path / "model"), "float32 bfloat16 8bit"):
        assert found["kinds"] == ["CPUOffloadPolicy"]
        assert found["equal"] == [True] * 3
        assert found["filled"]


def test_a_cpu_is_not_offloaded(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, "model.offload=true")
    with pytest.raises(ConfigError, match=r"model\.offload: the device is a CPU"):
        start_world(config)
    save_config(config, tmp_path / "full.yaml")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "full.yaml")])
    assert isinstance(result.exception, ConfigError)  # `main` prints it and exits 2
    assert not Path(config.run).exists()


@pytest.mark.gpu
@pytest.mark.parametrize("state", ["float32", "bfloat16", "8bit"])
def test_a_run_on_a_gpu_is_the_same_with_its_state_on_the_host(tmp_path: Path, state: str) -> None:
    model = save_tiny_model(tmp_path / "model")
    weights = []
    for offload in ("false", "true"):
        folder = tmp_path / offload
        folder.mkdir()
        config = tiny_config(
            folder, model, "model.device=cuda", f"model.offload={offload}",
            f"optimizer.state={state}", "evaluation.before=false", "evaluation.after=false",
        )  # fmt: skip
        trainer = Trainer(config)
        assert trainer.policy.device.type == "cuda"
        assert trainer.train()
        parameters = trainer.optimizer.parameters
        if offload == "true":
            locals_ = [p.to_local() for p in parameters]  # type: ignore[attr-defined]
            assert all(p.device.type == "cpu" and p.is_pinned() for p in locals_ if p.numel())
            assert all(t.device.type == "cpu" for _, t in trainer.optimizer.named_state())
        weights.append([p.detach().full_tensor().cpu() for p in parameters])  # type: ignore[attr-defined]
        trainer.close()
    for plain, offloaded in zip(*weights, strict=True):
        # Norm and step are computed by other code.
        torch.testing.assert_close(offloaded, plain, rtol=1e-3, atol=1e-5)
