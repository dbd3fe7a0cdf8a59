"""Our head in TRL's other trainers, called as docs/integrations.md says: their logs stay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from recap_fast.integrations.trl import use_recap_fast_head
from tests.tiny import save_tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
OUTPUTS = {
    name: tuple(re.findall(r'"(\w+)"', outputs))
    for name, outputs in re.findall(r"^\| (\w+Trainer) \| `(.*?)`", DOCS.read_text("utf-8"), re.M)
}
"""By trainer, what the page's table tells a user to ask for."""

PREFERENCES = [
    {"prompt": "ab", "chosen": " one", "rejected": " two and more"},
    {"prompt": "cde", "chosen": " three", "rejected": " no"},
]
RUNS: dict[str, tuple[Any, Any, list[dict[str, Any]], dict[str, Any]]] = {
    "SFTTrainer": (SFTTrainer, SFTConfig, [{"text": "ab one"}, {"text": "cde three"}], {}),
    "DPOTrainer": (DPOTrainer, DPOConfig, PREFERENCES, {}),
    "DPOTrainer, WPO": (DPOTrainer, DPOConfig, PREFERENCES, {"use_weighting": True}),
    "KTOTrainer": (
        KTOTrainer,
        KTOConfig,
        [
            {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
            for row in PREFERENCES
            for kind in ("chosen", "rejected")
        ],
        {},
    ),
    "RLOOTrainer": (
        RLOOTrainer,
        RLOOConfig,
        [{"prompt": "ab"}, {"prompt": "cde"}],
        {"num_generations": 2, "max_completion_length": 6},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def logged(name: str, model: Path, folder: Path, ours: bool) -> list[dict[str, float]]:
    kind, config, rows, options = RUNS[name]
    args = config(
        str(folder), max_steps=2, per_device_train_batch_size=2, logging_steps=1,
        learning_rate=1e-3, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to=[], save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    more: dict[str, Any] = {}
    if kind is RLOOTrainer:
        more["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
    torch.manual_seed(0)
    trainer = kind(
        model=str(model), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(), **more,
    )  # fmt: skip
    if ours:
        outputs = OUTPUTS[kind.__name__]
        if options.get("use_weighting"):
            outputs += ("log_sum_sq_probs",)
        temperature = getattr(trainer, "temperature", 1.0)
        for scored in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
            use_recap_fast_head(scored, temperature, outputs=outputs)
    trainer.train()
    return trainer.state.log_history


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", RUNS)
def test_what_is_logged_is_what_theirs_logs(tmp_path: Path, model: Path, name: str) -> None:
    theirs = logged(name, model, tmp_path / "theirs", ours=False)
    ours = logged(name, model, tmp_path / "ours", ours=True)
    assert len(ours) == len(theirs) >= 2
    compared = 0
    for found, wanted in zip(ours, theirs, strict=True):
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            if not re.search("time|runtime|per_second|flos|accuracies", key):
                assert found[key] == pytest.approx(value, rel=1e-3, abs=2e-5), key
                compared += 1
    assert compared > 10
