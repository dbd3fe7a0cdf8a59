"""Two runs at one server, and what a run waits for that attaches. The servers are stand-ins, behind
real HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recap_fast.config import RolloutConfig
from recap_fast.rollout import server as engine_module
from recap_fast.rollout import server_member
from recap_fast.rollout.protocol import EngineError, SamplingStoppedError
from recap_fast.rollout.server import ServerEngine
from recap_fast.rollout.server_client import ServerClient
from recap_fast.rollout.server_command import KEY_VARIABLE
from recap_fast.rollout.server_label import OtherRunError
from recap_fast.rollout.server_member import Member
from recap_fast.rollout.server_process import free_port
from recap_fast.types import Prompt, SamplingSpec
from tests.rollout.fake_server import FakeServer
from tests.rollout.test_server_pool import Run, request, until
from tests.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("impatient")

WEIGHTS = {"a": torch.ones(2, 3), "b": torch.ones(4)}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    found = FakeServer()
    yield found
    if not found.dead:
        found.die()


def two_runs(server: FakeServer, body: Callable[[Run, Run], Awaitable[None]]) -> None:
    """Attached to one server, the second after the first has given it weights."""

    async def work() -> None:
        runs = [Run([server], 5.0, False) for _ in range(2)]
        for state, name in zip(runs, ("aaaaaaaa", "bbbbbbbb"), strict=True):
            state.pool.members[0].client.run = name
        try:
            await runs[0].start()
            await runs[0].give(1)
            await runs[1].start()
            await asyncio.wait_for(body(*runs), 60)
        finally:
            for state in runs:
                await state.pool.close()
                state.sender.close()

    asyncio.run(work())


def test_a_run_whose_server_was_taken_ends_at_its_tokens(server: FakeServer) -> None:
    async def body(first: Run, second: Run) -> None:
        assert (await first.pool.sample(request()))[0].versions == [1, 1, 1]
        await second.give(1)
        assert (await second.pool.sample(request()))[0].versions == [1, 1, 1]
        for _ in range(2):
            with pytest.raises(OtherRunError, match=r"weights of another run \('bbbbbbbb:1'"):
                await first.pool.sample(request())
        assert server.version == "bbbbbbbb:1"

    two_runs(server, body)
    salts = [b["cache_salt"] for route, _, b in server.asked if route == "/inference/v1/generate"]
    assert salts == ["version aaaaaaaa:1", "version bbbbbbbb:1", "version aaaaaaaa:1"]


def test_a_run_whose_server_was_taken_ends_at_its_update(server: FakeServer) -> None:
    async def body(first: Run, second: Run) -> None:
        await second.give(1)
        count = len(server.routes())
        with pytest.raises(OtherRunError, match="one run at a time"):
            await first.give(2)
        assert set(server.routes()[count:]) == {"/weight_info"}, "nothing is written"
        await second.give(2)
        assert (await second.pool.sample(request()))[0].versions == [2, 2, 2]

    two_runs(server, body)


def test_a_server_that_was_started_again_is_no_other_run_s(server: FakeServer) -> None:
    async def body(first: Run, _: Run) -> None:
        server.version = "default"
        await first.give(2)
        assert (await first.pool.sample(request()))[0].versions == [2, 2, 2]

    two_runs(server, body)


def engine_at(*urls: str, count: int = 1, **options: Any) -> ServerEngine:
    server = {"urls": list(urls), "count": count, "timeout": 60.0, "start_timeout": 60.0}
    return ServerEngine(
        RolloutConfig.model_validate(
            {"engine": "vllm_server", "dtype": "float32", "server": server}
        ),
        model_path="/mine",
        tokenizer=tiny_tokenizer(),
        max_model_len=128,
        seed=0,
        device=torch.device("cpu"),
        weight_shapes={name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()},
        sizes={"hidden_size": "8"},
        vocabulary=101,
        stop_ids=frozenset((0,)),
        logs=Path("unused"),
        **options,
    )


def test_each_engine_is_a_run_of_its_own_and_its_processes_agree(server: FakeServer) -> None:
    said: list[Any] = []

    def agree(make: Callable[[], Any]) -> Any:
        said.append(make())
        return said[-1]

    engine = engine_at(server.url, agree=agree)
    follower = engine_at(server.url, agree=lambda _: said[0], leads=False)
    other = engine_at(server.url)
    try:
        engine.sync_weights(WEIGHTS.items(), 3)
        assert server.version == f"{said[0]}:3"
        assert follower._pool.members[0].client.run == said[0]
        assert other._id != said[0]
    finally:
        for one in (engine, follower, other):
            one.close()


def test_a_process_that_does_not_lead_knows_of_an_update_before_it_begins(
    server: FakeServer,
) -> None:
    """It is answered from the new weights before it is told that all servers have them."""
    known: list[int] = []

    def agree(_: Callable[[], Any]) -> Any:
        if made:
            made[0]._run(asyncio.sleep(0))
            known.append(made[0]._pool._newest)
            return [None]
        return "aaaaaaaa"

    made: list[ServerEngine] = []
    made.append(engine_at(server.url, agree=agree, leads=False))
    try:
        made[0].sync_weights(WEIGHTS.items(), 3)
        made[0].sync_weights(WEIGHTS.items(), 4)
    finally:
        made[0].close()
    assert known == [3, 3, 4, 4], "what others wait for, and then the update"


def test_each_server_has_a_port_and_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = iter([15_001, 15_001, 15_000])
    monkeypatch.setattr(engine_module, "check_installed", lambda takes_images: None)
    monkeypatch.setattr(engine_module, "free_port", lambda: next(ports))
    monkeypatch.setattr(engine_module, "ServerProcess", lambda *started: started)
    made: list[Any] = []

    async def stop_here(_: ServerEngine, members: Any) -> None:
        made.extend(members)
        raise EngineError("none is started here")

    monkeypatch.setattr(ServerEngine, "_make_pool", stop_here)
    with pytest.raises(EngineError, match="none is started here"):
        engine_at(count=2)
    started: list[Any] = [member.start() for member in made]
    commands, keys = zip(*((c, env["VLLM_API_KEY"]) for c, env, _ in started), strict=True)
    assert [c[c.index("--port") + 1] for c in commands] == ["15000", "15001"]
    clients = [member.client for member in made]
    assert [client.url for client in clients] == [f"http://127.0.0.1:{p}" for p in (15000, 15001)]
    assert len(set(keys)) == 2
    sent = [client._http.headers["Authorization"] for client in clients]
    assert sent == [f"Bearer {key}" for key in keys]


def test_weights_are_read_back_from_a_server_that_is_there(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What explains a mismatch must not end the run for another reason."""
    asked: list[str] = []

    async def columns(client: ServerClient, *_: Any) -> dict[str, torch.Tensor]:
        asked.append(client.url)
        await client.own_version()
        return WEIGHTS

    monkeypatch.setattr(ServerClient, "columns", columns)
    other = FakeServer()
    engine = engine_at(server.url, other.url)
    try:
        engine.sync_weights(WEIGHTS.items(), 1)
        server.die()
        assert engine.read_columns({}, 2) == WEIGHTS
        assert asked[-1] == other.url  # the other one may have been missed already
        other.die()
        assert engine.read_columns({}, 2) == {}
    finally:
        engine.close()


def test_a_run_that_is_to_stop_waits_for_no_server(server: FakeServer) -> None:
    stop: list[int] = []
    engine = engine_at(server.url)
    try:
        engine.heed(stop)
        engine.sync_weights(WEIGHTS.items(), 1)
        server.die()
        # 60 s: `timeout`, for which a server of somebody else's is waited for.
        threading.Timer(1.0, stop.append, [15]).start()
        prompt = Prompt("test", 0, [1, 2, 3], "?", "", {})
        with pytest.raises(SamplingStoppedError, match="no server is there"):
            engine.generate([prompt], SamplingSpec(2, 8, 1.0, seed=0))
        stop.clear()
        threading.Timer(1.0, stop.append, [15]).start()
        with pytest.raises(SamplingStoppedError, match="did not get the last weights"):
            engine.sync_weights(WEIGHTS.items(), 2)
        with pytest.raises(SamplingStoppedError):
            engine.generate([prompt], SamplingSpec(2, 8, 1.0, seed=0))
    finally:
        engine.close()


def test_a_run_that_is_to_stop_waits_for_no_server_that_reads_its_weights(
    server: FakeServer,
) -> None:
    """One that has come back, and hangs as it takes them over."""
    stop: list[int] = []
    engine = engine_at(server.url)
    try:
        engine.heed(stop)
        engine.sync_weights(WEIGHTS.items(), 1)
        engine._pool._readers += 1
        threading.Timer(1.0, stop.append, [15]).start()
        with pytest.raises(SamplingStoppedError, match="did not get the last weights"):
            engine.sync_weights(WEIGHTS.items(), 2)
    finally:
        engine.close()


def test_an_address_where_nobody_listens_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_member, "_ABSENT", 1.0)
    url = f"http://127.0.0.1:{free_port()}"
    problem = rf"{url} cannot be reached: connection refused; is `recap-fast serve` running there"
    with pytest.raises(EngineError, match=problem):
        engine_at(url)
    assert caplog.text.count("cannot be reached: connection refused") == 1


def test_an_attached_server_that_is_late_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    found: list[FakeServer] = []
    threading.Timer(1.0, lambda: found.append(FakeServer(port))).start()
    engine_at(f"http://127.0.0.1:{port}").close()
    found[0].die()
    assert "Waiting for up to 30 s" in caplog.text


def test_an_attached_server_that_starts_is_waited_for_longer(
    monkeypatch: pytest.MonkeyPatch, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It listens, and does not answer yet."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server_member, "_ABSENT", 0.2)
    server.failing["/health"] = 503
    threading.Timer(1.5, server.failing.clear).start()
    engine_at(server.url).close()
    assert f"waiting for the server at {server.url} to be ready" in caplog.text


def test_where_a_starting_server_writes_is_said_at_once_and_again(
    monkeypatch: pytest.MonkeyPatch, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server_member, "_TOLD_EVERY", 0.3)
    server.failing["/health"] = 503

    def said() -> list[str]:
        return [one for one in caplog.messages if one.startswith("waiting for")]

    class Starting:
        log, exit_status = Path("logs/server-0.log"), None

    async def work() -> None:
        client = ServerClient(server.url, key=None, timeout=5.0)
        member = Member(client, process=Starting())  # type: ignore[arg-type]
        waiting = asyncio.create_task(server_member.wait_ready(member, 30.0, 1.0))
        await until(lambda: len(said()) >= 2)
        server.failing.clear()
        await waiting
        await client.close()

    asyncio.run(work())
    first, second = said()[:2]
    what = f"waiting for the server at {server.url} to be ready"
    assert first == f"{what}; see its log, {Starting.log}"
    assert "to be ready, for" in second
    assert str(Starting.log) in second


def test_what_else_listens_there_is_seen_at_once(server: FakeServer) -> None:
    server.failing["/health"] = 404
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"answers /health with 404, .* rollout\.server\.urls"):
        engine_at(server.url)
    assert time.monotonic() - started < 30, "and not after start_timeout"


def test_who_is_asked_for_its_health_is_not_told_the_key(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "secret"
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    engine = engine_at(server.url)
    engine.close()
    assert "/health" in {route for route, _, _ in server.asked}
    assert "/version" in server.keys_at
    assert "/health" not in server.keys_at
