"""Writes a run's metrics while it goes on, and draws its report.

Everything is read back from the run folder, so a report can be made at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on

if TYPE_CHECKING:
    from recap_fast.report.metrics import MetricsWriter, ProgressView, read_metrics
    from recap_fast.report.page import write_report

__all__ = [
    "MetricsWriter",
    "ProgressView",
    "read_metrics",
    "write_report",
]

__getattr__ = hand_on(
    __name__,
    {
        "MetricsWriter": "metrics",
        "ProgressView": "metrics",
        "read_metrics": "metrics",
        "write_report": "page",
    },
)
