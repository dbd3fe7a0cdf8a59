"""Stopping on SIGTERM and Ctrl-C without losing what was done."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def collect_stop_signals(answer: str) -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in the list that it gives, instead of dying of them.

    A second SIGINT interrupts.

    Args:
        answer: what the caller does about the first one; it is logged.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning("%s: %s", signal.Signals(number).name, answer)

    previous = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
