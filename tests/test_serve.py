"""`recap-fast serve` before there is a server. A real one is
attached to in tests/test_server_training.py."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from recap_fast import serve as module
from recap_fast.config import TrainConfig
from recap_fast.rollout.server_command import GUARD
from recap_fast.rollout.server_process import free_port
from recap_fast.serve import serve
from recap_fast.types import UserError
from tests.tiny import save_tiny_model, tiny_settings


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


def test_loopback_of_ipv6_needs_no_key_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("given", [None, "of-the-user"])
def test_its_routes_are_guarded_and_runs_are_told_the_key(
    given: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On loopback too, which every user of a host reaches; also where adapters come by name."""
    monkeypatch.delenv("RECAP_FAST_SERVER_KEY", raising=False)
    if given is not None:
        monkeypatch.setenv("RECAP_FAST_SERVER_KEY", given)
    started = []

    class Process:
        def __init__(self, command: list[str], environment: dict[str, str], log: None) -> None:
            started.append((command, environment))

        def wait(self) -> int:
            return 0

        def stop(self) -> None:
            pass

    monkeypatch.setattr(module, "ServerProcess", Process)
    monkeypatch.setattr(module, "check_installed", lambda **_: None)
    monkeypatch.setattr(module, "check_gpus", lambda _: None)
    settings = tiny_settings(tmp_path, save_tiny_model(tmp_path / "model"))
    settings["model"]["lora"] = {"rank": 4}
    settings["rollout"] |= {"engine": "vllm_server", "server": {"adapters": "named"}}
    assert serve(TrainConfig.model_validate(settings), "127.0.0.1", free_port()) == 0
    [(command, environment)] = started
    assert command[command.index("--middleware") + 1] == GUARD
    printed = capsys.readouterr().out
    if given is None:
        key = environment["VLLM_API_KEY"]
        assert len(key) > 30
        assert printed == f"export RECAP_FAST_SERVER_KEY={key}\n"
    else:
        assert environment["VLLM_API_KEY"] == given
        assert given not in printed
