"""What a part of on_gpu.sh is given, and how it says that it cannot run here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class SkipPartError(Exception):
    """A part that cannot run here; its text says why."""


@dataclass(frozen=True)
class Context:
    """What a part is told."""

    work: Path  # folder for files of its own
    rehearse: bool  # tiny shapes, any device

    @property
    def shapes(self) -> str:
        """Word for the size of problem, as the benchmark suites know it."""
        return "small" if self.rehearse else "gpu"
