"""Stop signals are collected, a second Ctrl-C interrupts, and the handlers are put back."""

from __future__ import annotations

import logging
import signal

import pytest

from recap_fast.training.stop_signals import collect_stop_signals


def test_signals_are_collected_and_handlers_put_back(caplog):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with caplog.at_level(logging.WARNING), collect_stop_signals("saving") as received:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGINT, signal.SIGTERM]
    assert [record.message for record in caplog.records] == ["SIGINT: saving", "SIGTERM: saving"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_lost_terminal_stops_unless_it_is_to_be_survived(before):
    previous = signal.signal(signal.SIGHUP, before)
    try:
        with collect_stop_signals("saving") as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == ([signal.SIGHUP] if before == signal.SIG_DFL else [])
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with collect_stop_signals("saving"):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
