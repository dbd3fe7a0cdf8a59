"""What an engine reports between two batches, of one process and of several."""

from __future__ import annotations

from typing import Any

import pytest

from recap_fast.training import engine_metrics
from recap_fast.training.distributed import ALONE
from recap_fast.training.engine_metrics import EngineMetrics


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(engine_metrics.time, "monotonic", lambda: self.now)


def report(busy: float, reissued: int) -> dict[str, float]:
    return {"time/engine_busy": busy, "rollout/reissued_requests": reissued}


class Two:
    """A world whose other process reports the same figures again and again."""

    def __init__(self, other: dict[str, float]) -> None:
        self.other = other

    def exchange(self, work: Any) -> list[Any]:
        return [work(), ({}, self.other)]


def test_what_servers_were_not_busy_they_were_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    reports = iter([report(3.0, 0), report(1.0, 2), report(2.0, 0)])
    metrics = EngineMetrics(lambda: next(reports), ALONE)
    clock.now = 104.0
    assert metrics.take() == report(3.0, 0) | {"time/engine_idle": 1.0}
    clock.now = 110.0
    assert metrics.take() == report(1.0, 2) | {"time/engine_idle": 5.0}
    clock.now = 112.0
    assert metrics.take()["time/engine_idle"] == 0.0


def test_counts_of_several_processes_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    metrics = EngineMetrics(lambda: report(3.0, 1), Two(report(5.0, 2)))  # type: ignore[arg-type]
    clock.now = 106.0
    assert metrics.take() == report(5.0, 3) | {"time/engine_idle": 1.0}


def test_an_engine_that_reports_nothing_is_not_called_idle() -> None:
    assert EngineMetrics(dict, ALONE).take() == {}
