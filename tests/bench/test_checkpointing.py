"""The benchmark of activation checkpointing runs, and compares what it says it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import checkpointing
from benchmarks.training_step import WORKLOADS
from recap_fast.model.checkpointing import LayerModes


def test_each_choice_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "CPU", WORKLOADS["small"])
    monkeypatch.setattr(checkpointing, "CLEAR_REFS", Path("/none"))  # no processes for peaks
    records = checkpointing.measure(rounds=1)
    assert [record["modes"] for record in records] == [
        "no checkpointing",
        "1 selective + 1 no checkpointing",
        "selective checkpointing",
        "1 full + 1 selective checkpointing",
        "full checkpointing",
    ]
    assert all(record["seconds"] > 0 and record["peak_mib"] is None for record in records)
    assert checkpointing.table(records).splitlines()[2].endswith("| 1.00 |")


def test_choices_lie_evenly_between_none_and_full() -> None:
    assert checkpointing.choices(8) == [
        LayerModes(0, 0, 8), LayerModes(0, 4, 4), LayerModes(0, 8, 0), LayerModes(4, 4, 0),
        LayerModes(8, 0, 0),
    ]  # fmt: skip
