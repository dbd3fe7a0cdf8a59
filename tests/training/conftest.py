"""A benchmark for lm-eval that needs no network, and sources of rollouts with a stand-in engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from recap_fast.data.mix import DataStream
from recap_fast.rewards.scorer import RewardScorer
from recap_fast.training.distributed import ALONE, World
from recap_fast.training.rollout_source import AsynchronousRollouts, SynchronousRollouts
from tests.tiny import save_tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.training.ahead import Engine, make_config

TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [Paris, Rome]
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with lm-eval's definition of the task `capitals`."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"Capital {i}?", "answer": i % 2} for i in range(6)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "capitals.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own index, which takes seconds to read."""
    smaller = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", smaller)


@pytest.fixture(scope="module")
def ahead_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def scorers() -> Iterator[list[RewardScorer]]:
    found: list[RewardScorer] = []
    yield found
    for scorer in found:
        scorer.close()


@pytest.fixture
def make_source(tmp_path: Path, ahead_model: Path, scorers: list[RewardScorer]) -> Iterator[Any]:
    """Makes a source and its engine, for a depth and overrides of the configuration. The tests
    share reward workers, but those with rewards of their own."""
    sources: list[Any] = []
    own: list[RewardScorer] = []

    def build(
        depth: int,
        *more: str,
        engine: Engine | None = None,
        world: World = ALONE,
        own_scorer: bool = False,
    ) -> tuple[Any, Engine]:
        config = make_config(tmp_path, ahead_model, depth, *more)
        engine = engine or Engine()
        found = own if own_scorer else scorers
        if not found:
            found.append(RewardScorer(config.data.sources, config.objectives, config.rewards))
        stream = DataStream(config.data, tiny_tokenizer(), config.seed, None)
        kind = AsynchronousRollouts if depth else SynchronousRollouts
        sources.append(kind(config, stream, engine, found[0], world))
        return sources[-1], engine

    yield build
    for closing in (*sources, *own):
        closing.close()
