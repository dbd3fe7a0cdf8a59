"""Processes of a run that only sample: what they do where servers fail, come back, or are reached
by one process and not by another. The servers are stand-ins, behind real HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_client import ServerClient
from recap_fast.rollout.server_pool import Member, ServerPool
from tests.rollout.fake_server import FakeServer
from tests.rollout.pausing_proxy import PausingProxy
from tests.rollout.test_server_pool import Run, request, until

pytestmark = pytest.mark.usefixtures("impatient")

CONTROL = (
    "pause", "resume", "join", "start_update", "receive", "finish_update", "drop_image_caches",
)  # fmt: skip


class Pair:
    """The pools of the process that leads and of another one. Each has an address for each
    server."""

    def __init__(self, leader: Run, urls: list[str], timeout: float, start_timeout: float) -> None:
        self.leader = leader
        self.follower = ServerPool(
            [Member(ServerClient(url, key=None, timeout=timeout)) for url in urls],
            transfer=None,
            timeout=timeout,
            start_timeout=start_timeout,
            recompute=False,
            has_images=False,
        )
        for member in self.follower.members:
            for name in CONTROL:
                assert hasattr(member.client, name)
                setattr(member.client, name, _refuse)

    async def give(self, version: int) -> None:
        await self.leader.give(version)
        self.follower.follow(version)

    def states(self) -> tuple[list[str], list[str]]:
        return self.leader.states(), [member.state for member in self.follower.members]


async def _refuse(*_: Any, **__: Any) -> None:
    pytest.fail("one process alone pauses servers, gives them weights and resumes them")


async def _no_check(client: ServerClient) -> None:
    await client.version()


def run(
    servers: list[FakeServer],
    body: Callable[[Pair, PausingProxy], Awaitable[None]],
    *,
    through: Literal["leader", "follower"] | None = None,
    start: Callable[[], Any] | None = None,
    timeout: float = 5.0,
    start_timeout: float = 5.0,
) -> None:
    """Args:
    through: which of both reaches the first server through a proxy.
    start: how the leader starts the servers again; None: they are somebody else's.
    """

    async def work() -> None:
        proxy = await PausingProxy(servers[0].port).start()
        direct = [server.url for server in servers]
        indirect = [proxy.url, *direct[1:]]
        leader = Run([], timeout, False)
        for url in indirect if through == "leader" else direct:
            client = ServerClient(url, key=None, timeout=timeout)
            running: Any = None if start is None else Restarted(0, [], seconds=1e6)
            leader.pool.members.append(Member(client, start, running))
        urls = indirect if through == "follower" else direct
        pair = Pair(leader, urls, timeout, start_timeout)
        try:
            await leader.start()
            await pair.follower.start(_no_check)
            await pair.give(1)
            await asyncio.wait_for(body(pair, proxy), 60)
        finally:
            proxy.go_on()
            await pair.follower.close()
            await leader.pool.close()
            await proxy.close()
            leader.sender.close()

    asyncio.run(work())


async def sampled(pool: ServerPool, count: int = 4) -> set[int]:
    """Versions of the weights that answered."""
    answers = await asyncio.gather(*(pool.sample(request(row)) for row in range(count)))
    return {version for group in answers for one in group for version in one.versions}


class Restarted:
    """A server of the run's own, as far as a pool looks at it; it takes a while to be ready."""

    def __init__(self, port: int, servers: list[FakeServer], seconds: float) -> None:
        self.log, self.exit_status = Path("server.log"), None
        self._stopped = threading.Event()

        def begin() -> None:
            if not self._stopped.wait(seconds):
                servers.append(FakeServer(port))

        threading.Thread(target=begin).start()

    def said(self) -> str:
        return ""

    def stop(self) -> None:
        self._stopped.set()


def test_a_follower_waits_for_what_the_leader_starts_again(servers: list[FakeServer]) -> None:
    """Longer than `timeout`: a server takes its time to start."""
    old = servers[0]
    old.behaviour = "hang"

    async def body(pair: Pair, _: PausingProxy) -> None:
        await pair.give(7)
        asked = asyncio.create_task(sampled(pair.follower))
        await until(lambda: "/inference/v1/generate" in old.routes())
        await asyncio.to_thread(old.die)
        assert await asked == {7}
        await until(lambda: pair.states() == (["up"], ["up"]))
        assert pair.follower.reissued >= 4
        assert servers[-1] is not old
        await pair.give(8)
        assert await sampled(pair.follower) == await sampled(pair.leader.pool) == {8}

    run(
        servers[:1], body, start=lambda: Restarted(old.port, servers, seconds=3.0),
        timeout=1.0, start_timeout=20.0,
    )  # fmt: skip


@pytest.mark.parametrize("label", ["default", ":1", "0badf00d:3"])
def test_a_follower_does_not_sample_from_older_weights(
    label: str, servers: list[FakeServer]
) -> None:
    """A server that is back before the leader has given it the newest ones."""
    port = servers[0].port

    async def body(pair: Pair, _: PausingProxy) -> None:
        await pair.give(2)
        await asyncio.to_thread(servers[0].die)
        # The leader is busy elsewhere: it neither looks nor gives.
        await pair.leader.pool.close()
        await until(lambda: pair.states()[1] == ["out"])
        servers.append(FakeServer(port))
        servers[-1].version = label
        asked = asyncio.create_task(sampled(pair.follower))
        await until(lambda: servers[-1].routes().count("/weight_info") >= 2)
        assert not asked.done()
        assert "/inference/v1/generate" not in servers[-1].routes()
        pair.follower.announce(3)
        servers[-1].version = ":3"  # the leader has gone on meanwhile: newer ones will do
        assert await asked == {3}
        assert pair.states()[1] == ["up"]

    run(servers[:1], body)


def test_a_follower_gives_up_a_server_that_gets_no_weights(
    servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    async def body(pair: Pair, _: PausingProxy) -> None:
        pair.follower.follow(2)  # and nobody gives them
        with pytest.raises(
            EngineError, match=r"no server is left: .*given none of step 2 within 1 s"
        ):
            await pair.follower.sample(request())
        assert "has weights ':1' and was given none of step 2 within 1 s" in caplog.text
        assert pair.states() == (["up"], ["lost"])
        await pair.give(2)
        await until(lambda: pair.states()[1] == ["up"])
        assert await sampled(pair.follower) == {2}

    run(servers[:1], body, timeout=1.0, start_timeout=1.0)


def test_a_server_that_the_leader_alone_has_lost(servers: list[FakeServer]) -> None:
    """It keeps its old weights, from which the others must not sample."""

    async def body(pair: Pair, proxy: PausingProxy) -> None:
        assert await sampled(pair.follower) == {1}
        proxy.pause()
        await until(lambda: pair.states()[0] == ["lost", "up"])
        assert pair.states()[1] == ["up", "up"]
        await pair.give(2)
        assert servers[0].version == ":1"
        assert await sampled(pair.follower, 8) == {2}
        assert pair.states()[1][0] != "up"
        proxy.go_on()
        await until(lambda: pair.states() == (["up", "up"], ["up", "up"]))
        assert servers[0].version == ":2"
        assert await sampled(pair.follower, 8) == {2}

    run(servers, body, through="leader", timeout=1.0)


def test_a_server_that_a_follower_alone_has_lost(servers: list[FakeServer]) -> None:
    async def body(pair: Pair, proxy: PausingProxy) -> None:
        proxy.pause()
        await until(lambda: pair.states()[1][0] == "lost")
        assert await sampled(pair.follower) == {1}
        assert pair.states()[0] == ["up", "up"]
        await pair.give(2)
        assert servers[0].version == ":2"
        assert await sampled(pair.follower) == {2}
        proxy.go_on()
        await until(lambda: pair.states() == (["up", "up"], ["up", "up"]))
        assert await sampled(pair.follower, 8) == {2}

    run(servers, body, through="follower", timeout=1.0, start_timeout=1.0)
