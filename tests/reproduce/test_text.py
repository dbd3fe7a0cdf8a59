"""The text experiment: its configurations, the base's answers, and its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from recap_fast.reproduce import text
from recap_fast.reproduce.grid import Cell
from tests.reproduce.train_here import train_here
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("method", text.METHODS)
def test_every_method_is_evaluated_on_all_abilities(tmp_path, method) -> None:
    config = text.run_config(text.FULL, tmp_path / "i.jsonl", tmp_path, method, seed=3)
    assert [source.name for source in config.data.sources] == ["sums", "products", "instructions"]
    objectives = [objective.name for objective in config.objectives]
    assert objectives == ["accuracy", "product_accuracy", "ntp"]
    assert all(source.held_out == text.FULL.held_out for source in config.data.sources)
    assert config.seed == 3
    replays = method != "reasoning-only"
    assert (config.data.mixing == "uniform") == replays
    assert config.reweighting.method == ("recap" if method == "recap" else "uniform")


@pytest.mark.parametrize("method", text.SCARCE_METHODS)
def test_scarce_replay_has_the_methods_of_the_experiment_on_images(tmp_path, method) -> None:
    settings = replace(text.FULL, replay=10)
    config = text.run_config(settings, tmp_path / "i.jsonl", tmp_path, method, seed=0)
    shares = {"sums": 0.9, "products": 0.05, "instructions": 0.05}
    adaptive = config.data.mixing == "adaptive"
    assert (config.data.adaptive.shares if adaptive else config.data.mixing) == shares
    assert adaptive == (method == "together")
    uniform = method == "uniform"
    assert config.reweighting.method == ("uniform" if uniform else "recap")
    assert config.reweighting.parameters.get("window") == (None if uniform else 5)
    review = config.data.review
    assert (review and review.after) == (15 if method == "together" else None)


def test_the_base_answers_instructions(model) -> None:
    rows = text.answer_instructions(str(model), topics=2)
    questions = {
        instruction.format(topic=topic)
        for topic in text._TOPICS[:2]
        for instruction in text._INSTRUCTIONS
    }
    assert {row["question"] for row in rows} <= questions
    assert all(row["answer"] for row in rows)


def test_the_table_has_the_scores_before_and_after(tmp_path) -> None:
    cells = []
    for method in text.METHODS:
        for seed in (0, 1):
            config = text.run_config(text.QUICK, tmp_path / "i.jsonl", tmp_path, method, seed)
            cell = Cell(method, seed, config)
            cell.folder.mkdir(parents=True)
            rows = [{"step": step, **scores(step, seed)} for step in (0, 2)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (cell.folder / "metrics.jsonl").write_text(lines)
            cells.append(cell)
    results = text.collect_scores(cells)
    assert results["recap"]["sums accuracy"] == [[0.25, 0.5], [0.25, 0.75]]
    table, differences = text.render_scores(results).split("\n\n")
    lines = table.splitlines()
    assert lines[2].startswith("| before | 0.250 ± 0.000 |")
    assert [line.split(" | ")[0] for line in lines[3:]] == [f"| {m}" for m in text.METHODS]
    assert "| 0.625 ± 0.177 |" in lines[3]
    rows = differences.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| reasoning-only", "| recap"]
    assert "| 0.000 (0.000 to 0.000) |" in rows[1]


def test_differences_are_paired_by_seed_and_need_several() -> None:
    def runs(*ends: float) -> dict[str, list[list[float]]]:
        return {label: [[0.0, end] for end in ends] for label in text.SCORES}

    found = text.render_scores({"uniform": runs(0.1, 0.5), "recap": runs(0.2, 0.6)})
    assert "| recap | 0.100 (0.100 to 0.100) |" in found  # though the deviation of each is 0.28
    alone = text.render_scores({"uniform": runs(0.1), "recap": runs(0.2)})
    assert "paired" not in alone
    assert "| recap | 0.200 |" in alone


def scores(step: int, seed: int) -> dict[str, float]:
    return dict.fromkeys(text.SCORES.values(), 0.25 if step == 0 else 0.5 + seed / 4)


def test_the_experiment_runs_and_goes_on(tmp_path: Path, model, monkeypatch) -> None:
    monkeypatch.setattr(text, "METHODS", ("recap",))
    monkeypatch.setattr(text, "run_grid", train_here)
    settings = replace(text.QUICK, model=str(model), engine="transformers", max_new_tokens=4)
    (tmp_path / "instructions.jsonl").write_text(
        "".join(json.dumps({"question": f"What is {n}?", "answer": "red"}) + "\n" for n in range(9))
    )
    table = text.run_text(tmp_path, settings, jobs=1)
    assert (tmp_path / "table.md").read_text() == table
    assert "nan" not in table
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["scores"]["recap"]["instructions loss"][0]) == 3  # before, step 1, step 2
    before = (tmp_path / "recap/seed-0/metrics.jsonl").read_bytes()
    text.run_text(tmp_path, settings, jobs=1)
    assert (tmp_path / "recap/seed-0/metrics.jsonl").read_bytes() == before
