"""`recap-fast serve` before there is a server. A real one is
attached to in tests/test_server_training.py."""

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest

from recap_fast import serve as module
from recap_fast.rollout.server_process import free_port
from recap_fast.serve import serve
from recap_fast.types import UserError


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def refuse(*_: Any) -> None:
        pytest.fail("the model is not looked at")

    monkeypatch.setattr(module, "resolve_model", refuse)
    config: Any = None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on port {port} of 127\.0\.0\.1: Addr"):
            serve(config, "127.0.0.1", port)
    assert not caplog.messages


def test_a_host_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECAP_FAST_SERVER_KEY", "secret")
    config: Any = None
    with pytest.raises(UserError, match=r"cannot listen on port 8000 of 192\.0\.2\.1: "):
        serve(config, "192.0.2.1", 8000)


def test_loopback_of_ipv6_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes as far as the model."""

    def stop(*_: Any) -> None:
        raise UserError("the model")

    monkeypatch.delenv("RECAP_FAST_SERVER_KEY", raising=False)
    monkeypatch.setattr(module, "_check_free", stop)
    config: Any = None
    with pytest.raises(UserError, match="the model"):
        serve(config, "::1", 8000)
    with pytest.raises(UserError, match="the model"):
        serve(config, "[::1]", 8000)
    for empty in (None, ""):
        if empty is not None:
            monkeypatch.setenv("RECAP_FAST_SERVER_KEY", empty)
        with pytest.raises(UserError, match="--host :: lets others reach"):
            serve(config, "::", 8000)


def test_a_port_that_is_free_is_none_of_these() -> None:
    module._check_free("127.0.0.1", free_port())
