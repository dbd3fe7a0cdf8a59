"""The base of the digit scenes: its tokenizer, its architecture, and that it can be built."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from recap_fast.config import ModelConfig
from recap_fast.data.digit_scenes import HEIGHT, TASKS, WIDTH, SceneRows
from recap_fast.data.images import load_image_encoder
from recap_fast.data.mix import DataStream
from recap_fast.data.prompts import TEMPLATES
from recap_fast.model.errors import ModelError
from recap_fast.model.policy import load_policy, load_tokenizer
from recap_fast.reproduce import digits
from recap_fast.reproduce.digits import (
    BaseSettings,
    base_scores,
    build_tokenizer,
    ensure_base,
    pretraining_config,
    save_untrained,
)
from recap_fast.reproduce.experiment import ExperimentSettings, run_config
from recap_fast.trainer import Trainer
from tests.reproduce.train_here import train_here

SILENT = Console(quiet=True)
TINY = BaseSettings(
    text_width=64,
    text_layers=1,
    vision_width=32,
    vision_layers=2,
    reading_steps=1,
    steps=2,
    batch_size=11,
)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    save_untrained(TINY, folder)
    return folder


def test_the_tokenizer_keeps_words_and_numbers_whole_and_any_text_as_it_is():
    tokenizer = build_tokenizer()

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]

    assert pieces("<answer>[4, 10, 64, 32]</answer>") == [
        "<answer>", "[4", ", 10", ", 64", ", 32", "]", "</answer>",
    ]  # fmt: skip
    assert pieces("<think> 3 9 : 9 - 3 = 6 </think>") == [
        "<think>", " 3", " 9", " :", " 9", " -", " 3", " =", " 6", " </think>",
    ]  # fmt: skip
    for text in ("naïve 1234567 — \t\n\n x", "[7,8]", "<b>?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for task in TASKS:
        row = SceneRows(task, size=9, held_out=0, seed=5)[8]
        prompt = TEMPLATES["thinking"].replace("{question}", row["question"])
        words = len(prompt.split()) + prompt.count("?") + prompt.count(".")
        assert len(tokenizer(prompt)["input_ids"]) <= words + 1


def test_the_tokenizer_is_the_same_after_loading(untrained):
    text = TEMPLATES["box"].replace("{question}", "Where is the 7 on the left?") + " [4, 10]"
    assert load_tokenizer(str(untrained))(text)["input_ids"] == build_tokenizer()(text)["input_ids"]


def test_a_canvas_is_32_image_tokens_of_a_qwen2_5_vl(untrained, tmp_path):
    config = pretraining_config(TINY, untrained, tmp_path / "run")
    encoder = load_image_encoder(str(untrained), config.data)
    stream = DataStream(config.data, load_tokenizer(str(untrained)), 0, encoder)
    rows = stream.next_step().supervised
    assert len(rows) == TINY.batch_size
    assert {row.source for row in rows} == {source.name for source in config.data.sources}
    for row in rows:
        assert row.token_ids.count(encoder.tokens.image) == 32
        assert row.images[0].image.size == (WIDTH, HEIGHT)
    model = load_policy(ModelConfig(path=str(untrained), device="cpu"), str(untrained)).model
    assert model.config.model_type == "qwen2_5_vl"


def test_a_base_is_built_once_scored_and_trainable(tmp_path, monkeypatch):
    monkeypatch.setenv("RECAP_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digits, "run_grid", train_here)
    experiment = ExperimentSettings(
        base=TINY, steps=1, batch_size=3, group_size=2, held_out=2, evaluate_every=0
    )

    def evaluation(model):
        return run_config(experiment, model, tmp_path, "uniform", 0)

    base = ensure_base(TINY, evaluation, SILENT)
    assert base.parent == tmp_path / "cache"
    assert {"eval/range/accuracy", "eval/locate/iou", "eval/transcribe/loss", "seconds"} <= set(
        base_scores(base)
    )
    assert not base.with_suffix(".building").exists()
    written = (base / "scores.json").stat().st_mtime_ns
    assert ensure_base(TINY, evaluation, SILENT) == base
    assert (base / "scores.json").stat().st_mtime_ns == written
    assert replace(TINY, steps=3).folder != base

    trainer = Trainer(run_config(experiment, base, tmp_path, "recap", 0))
    try:
        assert trainer.train()
    finally:
        trainer.close()


def test_scores_of_what_is_no_base(tmp_path):
    with pytest.raises(ModelError, match="not a base"):
        base_scores(tmp_path)
