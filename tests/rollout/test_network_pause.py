"""A network that stops for a while between a pool and its servers: nothing is lost or answered
twice, and nobody hangs. The servers are stand-ins, behind real HTTP and a real TCP proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_client import ServerClient
from recap_fast.rollout.server_pool import Member
from tests.rollout.fake_server import FakeServer
from tests.rollout.pausing_proxy import PausingProxy
from tests.rollout.test_server_pool import Run, request, until

pytestmark = pytest.mark.usefixtures("impatient")

GENERATE = "/inference/v1/generate"
REQUESTS = 8


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    found = [FakeServer(), FakeServer()]
    for server in found:
        server.delay = 0.2
    yield found
    for server in found:
        server.die()


def run(
    servers: list[FakeServer],
    body: Callable[[Run, PausingProxy], Awaitable[None]],
    timeout: float = 6.0,
) -> None:
    """With a proxy in front of the first server."""

    async def work() -> None:
        proxy = await PausingProxy(servers[0].port).start()
        state = Run(servers[1:], timeout, False)
        state.pool.members.insert(0, Member(ServerClient(proxy.url, key=None, timeout=timeout)))
        try:
            await state.start()
            await state.give(1)
            await asyncio.wait_for(body(state, proxy), 60)
        finally:
            proxy.go_on()
            await state.pool.close()
            await proxy.close()
            state.sender.close()

    asyncio.run(work())


def ask(state: Run, first: int = 0) -> list[asyncio.Task[Any]]:
    return [
        asyncio.create_task(state.pool.sample(request(row)))
        for row in range(first, first + REQUESTS)
    ]


async def check_answers(asked: list[asyncio.Task[Any]], version: int, first: int = 0) -> None:
    """Each has two completions, and they are its own: the server counts from the request's seed."""
    answers = await asyncio.gather(*asked)
    for row, completions in enumerate(answers, start=first):
        assert [one.token_ids[0] for one in completions] == [5 + row] * 2
        assert [one.versions for one in completions] == [[version] * 3] * 2


def asked_of(servers: list[FakeServer]) -> int:
    return sum(server.routes().count(GENERATE) for server in servers)


def test_a_short_pause_delays_and_does_no_more(servers: list[FakeServer]) -> None:
    async def body(state: Run, proxy: PausingProxy) -> None:
        asked = ask(state)
        await until(lambda: GENERATE in servers[0].routes())
        proxy.pause()
        await asyncio.sleep(0.7)
        assert not all(task.done() for task in asked)
        proxy.go_on()
        await check_answers(asked, 1)
        assert state.states() == ["up", "up"]
        assert state.pool.reissued == 0

    run(servers, body)
    assert asked_of(servers) == REQUESTS


def test_what_a_long_pause_holds_back_is_asked_elsewhere(
    servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    async def body(state: Run, proxy: PausingProxy) -> None:
        asked = ask(state)
        await until(lambda: GENERATE in servers[0].routes())
        proxy.pause()
        await check_answers(asked, 1)  # while the network still stands
        assert state.states()[0] == "out"
        assert state.pool.reissued >= 1
        proxy.go_on()  # what was answered meanwhile arrives, and nobody waits for it
        await until(lambda: state.states() == ["up", "up"])
        await state.give(2)
        await check_answers(ask(state, first=20), 2, first=20)

    run(servers, body)
    assert "is taken out: it does not answer" in caplog.text
    assert servers[0].version == servers[1].version == ":2"
    assert not servers[0].paused


def test_requests_wait_for_the_only_server(servers: list[FakeServer]) -> None:
    """Longer than it takes to leave it, shorter than it is looked for."""

    async def body(state: Run, proxy: PausingProxy) -> None:
        asked = ask(state)
        await until(lambda: GENERATE in servers[0].routes())
        proxy.pause()
        await until(lambda: state.states() == ["out"])
        proxy.go_on()
        await check_answers(asked, 1)
        assert state.pool.reissued == REQUESTS

    run(servers[:1], body)


@pytest.mark.slow
def test_a_network_that_stays_away_ends_the_run(servers: list[FakeServer]) -> None:
    async def body(state: Run, proxy: PausingProxy) -> None:
        proxy.pause()
        for task in ask(state):
            with pytest.raises(EngineError, match="no server is left"):
                await task

    run(servers[:1], body, timeout=2.0)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("route", ["/pause", "/update_weights", "/resume"])
def test_an_update_does_not_wait_for_a_network_for_ever(
    route: str, servers: list[FakeServer]
) -> None:
    """It comes back with the newest weights, wherever in the update it was cut off."""
    answer, proxies = servers[0]._answer, []

    def cut(asked: str, body: Any) -> Any:
        if asked == route and proxies:
            proxies.pop().pause()
        return answer(asked, body)

    async def body(state: Run, proxy: PausingProxy) -> None:
        asked = ask(state)
        proxies.append(proxy)
        await state.give(2)
        assert state.states() == ["out", "up"]
        await check_answers(ask(state, first=20), 2, first=20)
        proxy.go_on()
        await until(lambda: state.states() == ["up", "up"])
        assert len(await asyncio.gather(*asked)) == REQUESTS

    servers[0]._answer = cut  # type: ignore[method-assign]
    run(servers, body, timeout=2.0)
    assert servers[0].version == ":2"
    assert not servers[0].paused
    assert servers[0].held["b"].tolist() == [2.0] * 4
