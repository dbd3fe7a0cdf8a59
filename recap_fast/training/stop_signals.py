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

    A second SIGINT interrupts. SIGHUP stays ignored where it is, as under nohup.

    Args:
        answer: what the caller does about the first one; it is logged.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning("%s: %s", signal.Signals(number).name, answer)

    heeded = [signal.SIGTERM, signal.SIGINT]  # also where a shell's & ignores SIGINT
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        heeded.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
