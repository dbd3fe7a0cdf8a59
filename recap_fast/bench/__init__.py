"""Runs the benchmark suites and draws their tables; compiles every kernel ahead of time.

The suites themselves are in `benchmarks/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recap_fast.lazy import hand_on

if TYPE_CHECKING:
    from recap_fast.bench.suites import print_report, run_suites

__all__ = [
    "print_report",
    "run_suites",
]

__getattr__ = hand_on(
    __name__,
    {
        "run_suites": "suites",
        "print_report": "suites",
    },
)
