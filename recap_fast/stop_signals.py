"""Stopping on SIGTERM, Ctrl-C or a lost terminal without losing what was done."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def collect_stop_signals(answer: str) -> Iterator[list[int]]:
    """Collects SIGTERM, SIGINT and SIGHUP in the list that it gives, instead of dying of them.

    A second SIGINT interrupts. A signal that is ignored, as SIGHUP is under nohup, stays ignored.

    Args:
        answer: what the caller does about the first one; it is logged.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning("%s: %s", signal.Signals(number).name, answer)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
