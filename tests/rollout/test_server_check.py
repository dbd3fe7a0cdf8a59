"""What a run that attaches to a server is told before it writes anything there. The server is a
stand-in, behind real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from recap_fast.rollout import server_check
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_check import check_server
from recap_fast.rollout.server_client import ServerClient
from recap_fast.rollout.server_label import OtherRunError
from tests.rollout.fake_server import FakeServer

SIZES = {"hidden_size": "8", "vocab_size": "32"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(server_check, "_LEAVING", 1.0)
    found = FakeServer()
    found.model |= SIZES
    yield found
    found.die()


def check(server: FakeServer, max_model_len: int = 128) -> None:
    async def run() -> None:
        client = ServerClient(server.url, key=None, timeout=2.0, run="0badf00d")
        try:
            await check_server(
                client,
                model_path="/mine",
                sizes=SIZES,
                dtype=torch.float32,
                max_model_len=max_model_len,
            )
        finally:
            await client.close()

    asyncio.run(run())
    only_asked = {"/version", "/weight_info", "/v1/models", "/collective_rpc", "/load"}
    assert set(server.routes()) <= only_asked


@pytest.mark.parametrize("label", ["default", "deadbeef:7"])
def test_a_server_that_nobody_uses_is_taken(label: str, server: FakeServer) -> None:
    server.version = label
    check(server)


def test_a_server_that_samples_for_another_run_is_refused(server: FakeServer) -> None:
    server.version, server.busy = "deadbeef:7", 3
    with pytest.raises(OtherRunError, match=r"sampling for another run: 3 requests.*'deadbeef:7'"):
        check(server)


@pytest.mark.parametrize("name", list(SIZES))
def test_another_model_is_refused(name: str, server: FakeServer) -> None:
    server.model[name] = "77"
    with pytest.raises(EngineError, match="serves another model") as caught:
        check(server)
    for part in (f"{name} 77 (here {SIZES[name]})", "fake has", "/mine", "recap-fast serve CONFIG"):
        assert part in str(caught.value)


def test_another_model_is_named_before_its_length(server: FakeServer) -> None:
    server.model["hidden_size"] = "77"
    with pytest.raises(EngineError, match="serves another model"):
        check(server, max_model_len=1000)


def test_a_server_of_another_dtype_is_refused(server: FakeServer) -> None:
    """Its digests would never be those of what it was sent."""
    server.model["dtype"] = "float32"
    check(server)
    server.model["dtype"] = "bfloat16"
    with pytest.raises(EngineError, match=r"in bfloat16, .* in float32 \(rollout\.dtype\)"):
        check(server)


@pytest.mark.parametrize("backend", [None, "nccl"])
def test_a_server_without_our_transfer_is_refused(backend: str | None, server: FakeServer) -> None:
    del server.model["backend"]
    if backend:
        server.model["backend"] = backend
    with pytest.raises(EngineError, match=r"wanted recap_fast: .*recap-fast serve CONFIG"):
        check(server)


def test_a_server_without_our_methods_is_refused(server: FakeServer) -> None:
    server.failing["/collective_rpc"] = 500
    with pytest.raises(EngineError, match=r"worker extension.*recap-fast serve CONFIG"):
        check(server)


def test_a_server_without_control_routes_is_refused(server: FakeServer) -> None:
    server.failing["/weight_info"] = 404
    with pytest.raises(EngineError, match=r"control routes are missing: .*recap-fast serve CONFIG"):
        check(server)


def test_an_old_release_is_refused(server: FakeServer) -> None:
    server.release = "0.25.1"
    with pytest.raises(EngineError, match=r"is vllm 0\.25\.1: wanted 0\.32 or newer"):
        check(server)


def test_a_shorter_server_is_refused(server: FakeServer) -> None:
    with pytest.raises(EngineError, match=r"takes 128 tokens.*--max-model-len 129"):
        check(server, max_model_len=129)
