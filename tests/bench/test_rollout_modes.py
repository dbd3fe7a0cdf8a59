"""What the benchmark of rollout modes makes of a run's metrics."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rollout_modes import MODES, summarise
from recap_fast.config import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_medians_over_steps() -> None:
    rows = [
        {"time/total": seconds, "time/rollout": 1.0, "tokens_per_second": 10.0}
        for seconds in (3.0, 1.0, 2.0)
    ]
    assert summarise(rows) == {"step s": 2.0, "waiting s": 1.0, "tokens/s": 10.0}


def test_every_mode_is_a_configuration() -> None:
    for settings in MODES.values():
        overrides = [*settings, "loss.rollout_is_cap=2.0"]
        load_config(ROOT / "examples" / "smollm2-cpu.yaml", overrides)
