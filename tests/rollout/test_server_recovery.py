"""How a pool of servers comes out of what should not happen: updates that nobody has finished,
requests that fail in the midst of one, and what no server's answer can explain. The servers are
stand-ins, behind real HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from recap_fast.rollout import server_pool
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_client import ServerClient, ServerTrouble
from recap_fast.rollout.server_member import Member
from recap_fast.rollout.server_process import free_port
from tests.rollout.fake_server import FakeServer
from tests.rollout.test_server_pool import Run, Started, request, run, until

pytestmark = pytest.mark.usefixtures("impatient")


class Own(Started):
    """A server of ours that notes what the pool took it for when it was stopped."""

    def __init__(self, port: int, stopped: list[str]) -> None:
        super().__init__(port, killed=False)
        self.member: Member | None = None
        self._stopped = stopped

    def stop(self) -> None:
        assert self.member is not None
        self._stopped.append(self.member.state)
        super().stop()


def run_own(body: Callable[[Run, Member], Awaitable[None]]) -> list[str]:
    """With a server of ours, which has the weights of step 1. Returns the states in which it was
    stopped."""
    stopped: list[str] = []

    async def work() -> None:
        port = free_port()
        state = Run([], 5.0, False)
        client = ServerClient(f"http://127.0.0.1:{port}", key=None, timeout=5.0)

        def start() -> Any:
            process = Own(port, stopped)
            process.member = member
            return process

        member = Member(client, start)
        member.process = start()
        state.pool.members.append(member)
        try:
            await state.start()
            await state.give(1)
            await asyncio.wait_for(body(state, member), 60)
        finally:
            await state.pool.close()
            state.sender.close()

    asyncio.run(work())
    return stopped


def test_an_update_that_a_dead_run_has_left_open_is_ended(servers: list[FakeServer]) -> None:
    servers[0].updating, servers[0].version = True, "0badf00d:41"

    async def body(state: Run) -> None:
        assert (await state.pool.sample(request()))[0].versions == [1, 1, 1]
        await state.give(2)

    run(servers[:1], body)
    ends = [b for _, _, b in servers[0].asked if b and b.get("method") == "recap_fast_end_update"]
    assert len(ends) == 1, "once it has an update of this run's, there is nothing to end"


def test_a_run_may_fail_at_first_to_take_a_server_over(
    servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then what a dead run has left there is still no other run's."""
    servers[0].version = "0badf00d:41"
    pause, failures = ServerClient.pause, [ServerTrouble("no answer within 60 s")]

    async def fails_once(self: ServerClient, **options: Any) -> None:
        if failures:
            raise failures.pop()
        await pause(self, **options)

    monkeypatch.setattr(ServerClient, "pause", fails_once)

    async def body(state: Run) -> None:
        assert (await state.pool.sample(request()))[0].versions == [1, 1, 1]

    run(servers[:1], body)
    assert not failures


def test_a_request_that_fails_in_an_update_has_the_server_started_again_once() -> None:
    async def body(state: Run, member: Member) -> None:
        send = state.sender.send

        async def fails_meanwhile(*what: Any) -> Any:
            state.pool._take_out(member, "a request failed")
            return await send(*what)

        state.sender.send = fails_meanwhile  # type: ignore[method-assign]
        updating = asyncio.create_task(state.give(2))
        await until(lambda: member.state == "out")
        state.sender.send = send  # type: ignore[method-assign]
        await updating
        for row in range(3):
            assert (await state.pool.sample(request(row)))[0].versions == [2, 2, 2]
        assert member.failures == 0

    assert run_own(body) == ["out", "up"], "stopped while it is out, and at the end"


@pytest.mark.parametrize("dies", ["HTTP process", "engine"])
def test_a_server_of_ours_is_left_at_the_first_look_after_its_death(
    dies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keeper, who may not have noticed, still runs."""
    monkeypatch.setattr(server_pool, "_WATCHED_EVERY", 60.0)

    async def body(state: Run, member: Member) -> None:
        assert isinstance(member.process, Own)
        server = member.process.server
        assert server is not None
        await state.pool._look_at(member)
        assert member.state == "up"
        if dies == "engine":
            server.failing["/health"] = 503
        else:
            await asyncio.to_thread(server.die)
        await state.pool._look_at(member)
        assert member.state == "out"
        await until(lambda: member.state == "up")

    assert run_own(body) == ["out", "up"]


@pytest.mark.parametrize("whose", ["ours", "somebody else's"])
def test_what_is_no_certain_death_is_looked_at_twice(
    whose: str, servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours may be slow; before another's, something may answer in its place."""
    monkeypatch.setattr(server_pool, "_WATCHED_EVERY", 60.0)

    async def body(state: Run, member: Member) -> None:
        for expected in ("up", "out"):
            await state.pool._look_at(member)
            assert member.state == expected

    async def attached(state: Run) -> None:
        servers[0].failing["/health"] = 503
        await body(state, state.pool.members[0])

    async def ours(state: Run, member: Member) -> None:
        assert isinstance(member.process, Own)
        assert member.process.server is not None
        member.process.server.failing["/health"] = 500
        await body(state, member)

    if whose == "ours":
        run_own(ours)
    else:
        run(servers[:1], attached)


def test_a_server_that_cannot_be_started_is_given_up_with_the_reason() -> None:
    async def body(state: Run, member: Member) -> None:
        def start() -> Any:
            raise OSError(28, "No space left on device")

        member.start = start
        assert isinstance(member.process, Own)
        member.process.stop()
        with pytest.raises(EngineError, match="OSError: .* No space left on device"):
            await state.pool.sample(request())
        assert member.state == "lost"

    run_own(body)


def test_a_weight_that_nobody_knows_is_named(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        servers[0].held["unknown.weight"] = servers[0].held["a"]
        with pytest.raises(EngineError, match=r"1 of 3 weights: unknown\.weight"):
            await state.give(2)

    run(servers[:1], body)


@pytest.mark.parametrize("samples", [True, False])
def test_who_samples_is_given_the_time(samples: bool, servers: list[FakeServer]) -> None:
    """A request that takes longer than `timeout`, as one of very many tokens may."""

    async def body(state: Run) -> None:
        servers[0].delay = 3.0
        waiting = asyncio.create_task(state.pool.sample(request()))
        while not waiting.done():
            servers[0].sampled += samples
            await asyncio.sleep(0.05)
            if state.states() != ["up"]:
                servers[0].delay = 0.0
        assert (await waiting)[0].versions == [1, 1, 1]
        assert state.pool.reissued == (0 if samples else 1)

    run(servers[:1], body, timeout=1.0)


def test_looking_after_servers_goes_on_after_an_error(
    servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(state: Run) -> None:
        look, errors = state.pool._look_at, [OSError(24, "Too many open files")]

        async def fails_once(member: Member) -> None:
            if errors:
                raise errors.pop()
            await look(member)

        monkeypatch.setattr(state.pool, "_look_at", fails_once)
        await until(lambda: not errors)
        servers[0].die()
        await until(lambda: state.states()[0] != "up")

    with caplog.at_level(logging.ERROR):
        run(servers, body)
    assert "Too many open files" in caplog.text
