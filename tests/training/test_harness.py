"""Benchmarks through lm-eval, on a task of our own; what lmms-eval would be asked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from recap_fast.cli import app
from recap_fast.training import harness
from recap_fast.training.harness import HarnessError, evaluate_tasks
from recap_fast.types import UserError
from tests.tiny import save_tiny_model, tiny_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


@pytest.mark.usefixtures("own_tasks_only")
def test_lm_eval_scores_a_model(tmp_path: Path, model: Path, task_folder: Path) -> None:
    config = tiny_config(tmp_path, model)
    scores = evaluate_tasks(config, str(model), ["capitals"], limit=4, task_folder=task_folder)
    assert set(scores) == {"eval/capitals/acc", "eval/capitals/acc_stderr"}
    assert scores["eval/capitals/acc"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert scores["eval/capitals/acc_stderr"] > 0 or scores["eval/capitals/acc"] in (0.0, 1.0)


@pytest.mark.slow
@pytest.mark.variant
def test_unknown_tasks_name_their_neighbours(tmp_path: Path, model: Path) -> None:
    config = tiny_config(tmp_path, model)
    with pytest.raises(HarnessError, match="knows no task 'gsm8kk'; did you mean .*gsm8k"):
        evaluate_tasks(config, str(model), ["gsm8kk"])


def test_a_missing_harness_is_named(tmp_path: Path, model: Path) -> None:
    config = tiny_config(tmp_path, model)
    with pytest.raises(HarnessError, match="pip install lmms-eval"):
        evaluate_tasks(config, str(model), ["mmmu_val"], harness="lmms-eval")


@pytest.mark.usefixtures("own_tasks_only")
def test_data_that_cannot_be_reached(tmp_path: Path, model: Path, task_folder: Path) -> None:
    (task_folder / "rows.jsonl").unlink()
    config = tiny_config(tmp_path, model)
    with pytest.raises(HarnessError, match="could not load the data of capitals"):
        evaluate_tasks(config, str(model), ["capitals"], task_folder=task_folder)


def test_what_lmms_eval_is_asked(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for lmms-eval, which needs a torchvision that CPU builds of torch cannot load."""
    asked: dict[str, Any] = {}

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        asked.update(arguments)
        return {"results": {"mmmu_val": {"alias": "mmmu_val", "mmmu_acc,none": 0.5}}}

    stand_in = {
        "lmms_eval": ModuleType("lmms_eval"),
        "lmms_eval.tasks": SimpleNamespace(
            TaskManager=lambda include_path: SimpleNamespace(all_tasks=["mmmu_val"])
        ),
        "lmms_eval.evaluator": SimpleNamespace(simple_evaluate=simple_evaluate),
    }
    for name, module in stand_in.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    config = tiny_config(tmp_path, model)
    with pytest.raises(HarnessError, match="model of type llama; it runs qwen2_vl"):
        evaluate_tasks(config, str(model), ["mmmu_val"], harness="lmms-eval")
    monkeypatch.setattr(harness, "_model_type", lambda path: "qwen2_5_vl")
    scores = evaluate_tasks(config, str(model), ["mmmu_val"], limit=2)
    assert scores == {"eval/mmmu_val/mmmu_acc": 0.5}
    assert asked["model"] == "qwen2_5_vl"
    assert asked["model_args"] == f"pretrained={model}"
    assert asked["limit"] == 2
    assert "apply_chat_template" not in asked


def test_options_of_a_harness_need_a_task(tmp_path: Path, model: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(tmp_path), "--limit", "3"])
    assert isinstance(result.exception, UserError)
    assert "need a --task" in str(result.exception)
