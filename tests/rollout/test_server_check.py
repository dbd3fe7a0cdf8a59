"""What a run that attaches to a server is told before it writes anything there. The server is a
stand-in, behind real HTTP, but for the last test; tests/rollout/test_server.py asks one of ours."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recap_fast.rollout import server_check
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_check import check_server
from recap_fast.rollout.server_client import ServerClient
from recap_fast.rollout.server_label import OtherRunError
from recap_fast.rollout.server_process import ServerProcess, free_port
from recap_fast.rollout.server_worker import model_sizes
from tests.rollout.conftest import random_llama
from tests.rollout.fake_server import FakeServer
from tests.tiny_tokenizer import tiny_tokenizer

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


@pytest.mark.slow
@pytest.mark.variant
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({}, r"control routes are missing: .*recap-fast serve CONFIG"),
        ({"VLLM_SERVER_DEV_MODE": "1"}, r"worker extension.*recap-fast serve CONFIG"),
    ],
)
def test_a_server_as_vllm_starts_it_is_refused(
    mode: dict[str, str], message: str, tmp_path: Path
) -> None:
    """The real one, without what `recap-fast serve` adds."""
    pytest.importorskip("vllm")
    model = random_llama()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    port = free_port()
    options = {
        "model": tmp_path / "model", "host": "127.0.0.1", "port": port, "dtype": "float32",
        "max-model-len": 128, "kv-cache-memory-bytes": 2**25,
    }  # fmt: skip
    server = ServerProcess(
        [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager",
            *(text for name, value in options.items() for text in (f"--{name}", str(value))),
        ],
        {**os.environ, "VLLM_NO_USAGE_STATS": "1", **mode},
        tmp_path / "log",
    )  # fmt: skip

    async def run() -> None:
        client = ServerClient(f"http://127.0.0.1:{port}", key=None, timeout=30.0, run="0badf00d")
        try:
            while await client.health(5.0) != 200:
                assert server.exit_status is None, server.said()
                await asyncio.sleep(0.2)
            await check_server(
                client,
                model_path=str(tmp_path / "model"),
                sizes=model_sizes(model.config),
                dtype=torch.float32,
                max_model_len=128,
            )
        finally:
            await client.close()

    try:
        with pytest.raises(EngineError, match=message):
            asyncio.run(run())
    finally:
        server.stop()
