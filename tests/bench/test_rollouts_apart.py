"""What the benchmark of a trainer and a server on cores of their own makes of its runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from benchmarks.rollouts_apart import on_cores, summary
from recap_fast.simulate.check import Check
from recap_fast.simulate.pipeline import SetUp


def test_predictions_stand_beside_measurements(tmp_path: Path) -> None:
    (tmp_path / "in turns").mkdir()
    rows = [{"step": step, "tokens_per_second": 10.0 * step} for step in (1, 2, 3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in turns" / "metrics.jsonl").write_text(lines)
    check = Check(tmp_path, SetUp(1, 1, colocated=True), {"step": (2.2, 2.0), "train": (1.0, 1.5)})
    found = summary({"in turns": check}, tmp_path)["in turns"]
    assert found["tokens/s"] == 25.0, "the first step warms up"
    assert found["seconds"]["train"] == {"predicted": 1.0, "measured": 1.5}
    assert found["error of the step"] == 0.1


def test_a_side_keeps_to_its_cores() -> None:
    (core, *_) = sorted(os.sched_getaffinity(0))
    command = on_cores([core], "train")
    assert command[-3:] == ["-m", "recap_fast", "train"]
    show = [*command[:-3], "-c", "import os; print(os.sched_getaffinity(0))"]
    assert subprocess.check_output(show, text=True).strip() == str({core})
