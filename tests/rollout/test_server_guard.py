"""Which requests reach a server: those with its key."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from recap_fast.rollout.server_guard import KeyGuard

KEY = "k" * 32


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> KeyGuard:
    monkeypatch.setenv("VLLM_API_KEY", KEY)

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return KeyGuard(inner)


def status(
    guard: KeyGuard, path: str, headers: list[tuple[bytes, bytes]], kind: str = "http", **more: Any
) -> Any:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": headers, "method": "POST", **more}
    asyncio.run(guard(scope, None, send))
    return sent[0].get("status", sent[0]["type"])


ROUTES = [
    "/pause", "/update_weights", "/collective_rpc", "/inference/v1/generate", "/version",
    "/metrics", "/health/../pause", "//pause", "/HEALTH",
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_wants_the_key(route: str, guard: KeyGuard) -> None:
    assert status(guard, route, []) == 401
    assert status(guard, route, [(b"authorization", b"Bearer wrong")]) == 401
    assert status(guard, route, [(b"authorization", KEY.encode())]) == 401
    assert status(guard, route, [(b"authorization", f"Bearer {KEY}".encode())]) == 200
    assert status(guard, route, [(b"Authorization", f"Bearer {KEY}".encode())]) == 200


def test_two_keys_are_none(guard: KeyGuard) -> None:
    right = (b"authorization", f"Bearer {KEY}".encode())
    assert status(guard, "/pause", [(b"authorization", b"Bearer x"), right]) == 401


def test_a_key_of_other_bytes_is_refused(guard: KeyGuard) -> None:
    assert status(guard, "/pause", [(b"authorization", b"Bearer \xff\xfe")]) == 401


def test_preflight_requests_are_no_exception(guard: KeyGuard) -> None:
    assert status(guard, "/pause", [], method="OPTIONS") == 401


def test_health_is_open(guard: KeyGuard) -> None:
    assert status(guard, "/health", []) == 200
    assert status(guard, "/mounted/health", [], root_path="/mounted") == 200


def test_sockets_are_closed(guard: KeyGuard) -> None:
    assert status(guard, "/v1/realtime", [], kind="websocket") == "websocket.close"


def test_no_key_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RuntimeError, match="VLLM_API_KEY"):
        KeyGuard(None)  # type: ignore[arg-type]
