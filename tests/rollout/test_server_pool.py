"""Servers that fail, behind real HTTP. They are stand-ins (`fake_server`); the real ones are in
test_server.py."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_client import ServerClient
from recap_fast.rollout.server_member import Member
from recap_fast.rollout.server_pool import ServerPool
from recap_fast.rollout.server_process import free_port
from recap_fast.rollout.server_request import Request
from recap_fast.rollout.shared_weights import SharedMemoryWeights
from recap_fast.rollout.transfer import MemoryTransfer
from recap_fast.types import Prompt
from tests.rollout.fake_server import FakeServer

pytestmark = pytest.mark.usefixtures("impatient")

GENERATE = "/inference/v1/generate"


def request(row: int = 0, n: int = 2, max_new_tokens: int = 8) -> Request:
    prompt = Prompt("test", row, [1, 2, 3], "?", "", {})
    return Request(prompt, prompt.token_ids, n, max_new_tokens, 1.0, row, (0,), 101)


class Run:
    """A pool with weights, as a trainer would use it."""

    def __init__(
        self, servers: list[FakeServer], timeout: float, recompute: bool, connections: int = 1024
    ) -> None:
        self.sender = MemoryTransfer(SharedMemoryWeights(torch.float32))
        members = [
            Member(ServerClient(s.url, key=None, timeout=timeout, connections=connections))
            for s in servers
        ]
        self.pool = ServerPool(
            members,
            transfer=self.sender,
            timeout=timeout,
            start_timeout=5.0,
            recompute=recompute,
            has_images=False,
        )

    async def start(self) -> None:
        async def check(client: ServerClient) -> None:
            await client.version()

        await self.pool.start(check)

    async def give(self, version: int) -> None:
        await self.pool.hold()
        weights = {"a": torch.full((2, 3), float(version)), "b": torch.full((4,), float(version))}
        await self.pool.update(self.sender.write(weights.items(), version))

    def states(self) -> list[str]:
        return [member.state for member in self.pool.members]


def run(
    servers: list[FakeServer],
    body: Callable[[Run], Awaitable[None]],
    *,
    timeout: float = 5.0,
    recompute: bool = False,
    connections: int = 1024,
) -> None:
    async def work() -> None:
        state = Run(servers, timeout, recompute, connections)
        try:
            await state.start()
            await state.give(1)
            await asyncio.wait_for(body(state), 60)
        finally:
            await state.pool.close()
            state.sender.close()

    asyncio.run(work())


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def test_completions_say_which_weights_sampled_them(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        completions = await state.pool.sample(request(n=3))
        assert [one.versions for one in completions] == [[1, 1, 1]] * 3
        await state.give(2)
        assert (await state.pool.sample(request()))[0].versions == [2, 2, 2]

    run(servers, body)
    bodies = [b for s in servers for route, _, b in s.asked if route == "/inference/v1/generate"]
    assert [b["cache_salt"] for b in bodies] == ["version :1", "version :2"]


def test_an_update_is_paused_loaded_checked_and_resumed(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        await state.give(2)

    run(servers[:1], body)
    one = [
        "/pause", "/start_weight_update", "/update_weights", "/finish_weight_update",
        "/weight_info", "/collective_rpc", "/resume",
    ]  # fmt: skip
    first = [one[0], "/collective_rpc", *one[1:]]  # ends what a run before may have left open
    assert servers[0].routes() == ["/version", *first, "/weight_info", *one]
    pauses = [parameters for route, parameters, _ in servers[0].asked if route == "/pause"]
    # Nothing is worth keeping of the weights that the server started with.
    assert pauses == [
        {"mode": ["keep"], "clear_cache": ["true"]},
        {"mode": ["keep"], "clear_cache": ["false"]},
    ]
    assert servers[0].held["b"].tolist() == [2.0] * 4


def test_requests_in_flight_recompute_where_that_is_asked_for(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        await state.give(2)

    run(servers[:1], body, recompute=True)
    pauses = [parameters for route, parameters, _ in servers[0].asked if route == "/pause"]
    assert [p["clear_cache"] for p in pauses] == [["true"], ["true"]]


def test_a_server_that_a_dead_run_has_left_paused_is_taken_over(servers: list[FakeServer]) -> None:
    """In the middle of an update, of which nothing may be sampled."""
    servers[0].paused, servers[0].version, servers[0].held = (
        True,
        "0badf00d:41",
        {"a": torch.zeros(2, 3)},
    )

    async def body(state: Run) -> None:
        assert not servers[0].paused
        assert servers[0].held["a"][0, 0] == 1
        assert (await state.pool.sample(request()))[0].versions == [1, 1, 1]

    run(servers[:1], body)
    routes = servers[0].routes()
    assert routes.index("/pause") < routes.index("/update_weights") < routes.index("/resume")
    assert routes.index("/resume") < routes.index("/inference/v1/generate")


def test_load_is_spread_by_tokens_under_way(servers: list[FakeServer]) -> None:
    for server in servers:
        server.delay = 0.5

    async def body(state: Run) -> None:
        sizes = [64, 8, 8, 8, 8]
        await asyncio.gather(
            *(
                state.pool.sample(request(row, max_new_tokens=size))
                for row, size in enumerate(sizes)
            )
        )

    run(servers, body)
    counts = sorted(server.routes().count(GENERATE) for server in servers)
    assert counts == [1, 4]


def test_more_requests_than_a_server_has_connections_wait(servers: list[FakeServer]) -> None:
    """And nothing else does: it is looked after, and takes an update, meanwhile."""
    servers[0].delay = 2.5

    async def body(state: Run) -> None:
        asked = [asyncio.create_task(state.pool.sample(request(row))) for row in range(6)]
        await until(lambda: servers[0].routes().count(GENERATE) == 2)
        await state.give(2)
        assert servers[0].version == ":2"
        assert not any(task.done() for task in asked), "the update has waited for no request"
        await until(lambda: any(task.done() for task in asked))
        servers[0].delay = 0.0
        assert len(await asyncio.gather(*asked)) == 6
        assert state.pool.reissued == 0
        assert state.states() == ["up"]

    run(servers[:1], body, connections=2)
    assert servers[0].routes().count(GENERATE) == 6


@pytest.mark.parametrize("behaviour", ["nonsense", "error", "old"])
def test_a_server_that_answers_wrongly_is_brought_back(
    behaviour: str, servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    async def body(state: Run) -> None:
        servers[0].behaviour = behaviour
        asked = [asyncio.create_task(state.pool.sample(request(row))) for row in range(4)]
        await until(lambda: "is taken out" in caplog.text)
        servers[0].behaviour = "well"
        for completions in await asyncio.gather(*asked):
            assert completions[0].versions == [1, 1, 1]
        assert state.pool.reissued >= 1
        await until(lambda: state.states() == ["up", "up"])

    run(servers, body)
    assert servers[0].routes().count("/update_weights") == 2, "it came back with weights"
    assert f"the server at {servers[0].url} is taken out" in caplog.text
    assert f"the server at {servers[0].url} is back" in caplog.text


def saying(server: FakeServer, **what: Any) -> None:
    """Has a server's answers say that of their tokens, well-formed."""
    generate = server._generate

    def generate_otherwise(body: Any) -> tuple[int, Any]:
        status, content = generate(body)
        for choice in content["choices"]:
            if ids := what.get("token_ids"):
                choice["token_ids"] = ids
                choice["logprobs"]["content"] = [{"token_id": t, "logprob": -1.0} for t in ids]
            if version := what.get("version"):
                choice["weight_versions"] = [{"version": version, "start": 0, "end": 3}]
        return status, content

    server._generate = generate_otherwise  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        (
            {"token_ids": [10**9, 3, 4]},
            "token ids between 3 and 1000000000, of a vocabulary of 101",
        ),
        ({"token_ids": [5, 101, 6]}, "token ids between 5 and 101"),
        ({"token_ids": [-7, 3, 4]}, "token ids between -7 and 4"),
        ({"token_ids": [6.7, 3, 4]}, "token ids that are not whole numbers: [6.7, 3, 4]"),
        ({"token_ids": [True, 3, 4]}, "token ids that are not whole numbers: [True, 3, 4]"),
        ({"version": ":99"}, "from the weights of step 99, and the newest are those of step 1"),
    ],
    ids=["far beyond", "just beyond", "negative", "a float", "a bool", "a version nobody gave"],
)
def test_well_formed_nonsense_is_asked_of_another(
    what: dict[str, Any], problem: str, servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    saying(servers[0], **what)

    async def body(state: Run) -> None:
        for row in range(4):
            for one in await state.pool.sample(request(row)):
                assert one.token_ids == [5 + row, 6 + row, 7 + row]
                assert one.versions == [1, 1, 1]
        assert state.pool.reissued >= 1

    run(servers, body)
    assert f"the server at {servers[0].url} is taken out" in caplog.text
    assert problem in caplog.text


def test_a_server_may_sample_from_weights_that_others_still_wait_for(
    servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update ends with the last of them."""
    answer, over = servers[1]._answer, threading.Event()

    def slow(route: str, body: Any) -> Any:
        if route == "/update_weights":
            over.wait(30)
        return answer(route, body)

    async def body(state: Run) -> None:
        monkeypatch.setattr(servers[1], "_answer", slow)
        updating = asyncio.create_task(state.give(2))
        await until(lambda: servers[0].version == ":2" and not servers[0].paused)
        assert (await state.pool.sample(request()))[0].versions == [2, 2, 2]
        assert not updating.done()
        over.set()
        await updating
        assert state.pool.reissued == 0
        assert state.states() == ["up", "up"]

    run(servers, body)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_server_that_refuses_what_another_takes_is_brought_back(
    status: int, servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    async def body(state: Run) -> None:
        servers[0].failing[GENERATE] = status
        servers[1].delay = 0.3
        asked = [asyncio.create_task(state.pool.sample(request(row))) for row in range(4)]
        await until(lambda: "is taken out" in caplog.text)
        servers[0].failing.clear()
        assert len(await asyncio.gather(*asked)) == 4
        await until(lambda: state.states() == ["up", "up"])
        assert state.pool.reissued >= 2

    run(servers, body)
    assert servers[0].routes().count("/update_weights") == 2
    assert servers[1].routes().count("/update_weights") == 1
    assert f"{GENERATE} answered {status}: told to fail" in caplog.text


def test_a_request_that_all_servers_refuse_ends_the_run_and_no_server(
    servers: list[FakeServer],
) -> None:
    async def body(state: Run) -> None:
        for server in servers:
            server.failing[GENERATE] = 400
        for count in (2, 1):
            with pytest.raises(EngineError, match="test:0: .* answered 400: told to fail"):
                await state.pool.sample(request())
            assert state.states() == ["up"] * count
            del state.pool.members[1:]

    run(servers, body)


def test_a_server_that_is_away_is_asked_before_a_refusal_counts(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        servers[0].failing[GENERATE] = 404
        servers[1].failing["/health"] = 503
        await until(lambda: state.states() == ["up", "out"])
        asked = asyncio.create_task(state.pool.sample(request()))
        await until(lambda: GENERATE in servers[0].routes())
        await asyncio.sleep(0.2)
        assert not asked.done()
        servers[1].failing.clear()
        assert len(await asked) == 2
        assert state.states() == ["out", "up"]

    run(servers, body)


def test_a_server_that_is_slow_to_answer_keeps_no_other_from_being_looked_after(
    servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(state: Run) -> None:
        slow, look = state.pool.members[0], state.pool._look_at

        async def look_at(member: Member) -> None:
            await (asyncio.sleep(60) if member is slow else look(member))

        monkeypatch.setattr(state.pool, "_look_at", look_at)
        await asyncio.sleep(0.2)
        servers[1].failing["/health"] = 503
        await until(lambda: state.states() == ["up", "out"])

    run(servers, body)


def test_a_server_that_hangs_is_left_within_the_timeout(servers: list[FakeServer]) -> None:
    servers[0].behaviour = "hang"

    async def body(state: Run) -> None:
        started = time.monotonic()
        answers = await asyncio.gather(*(state.pool.sample(request(row)) for row in range(4)))
        assert len(answers) == 4
        assert 1.0 < time.monotonic() - started < 10.0

    run(servers, body, timeout=1.0)


def test_what_a_dead_server_was_asked_is_asked_of_another(servers: list[FakeServer]) -> None:
    servers[0].behaviour = "hang"

    async def body(state: Run) -> None:
        asked = [asyncio.create_task(state.pool.sample(request(row))) for row in range(4)]
        await until(lambda: "/inference/v1/generate" in servers[0].routes())
        await asyncio.to_thread(servers[0].die)
        assert len(await asyncio.gather(*asked)) == 4
        await until(lambda: state.states() == ["lost", "up"])

    run(servers, body, timeout=2.0)


def test_a_lost_server_may_join_again(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        port = servers[0].port
        await asyncio.to_thread(servers[0].die)
        await until(lambda: state.states()[0] == "lost")
        await state.give(2)
        servers.append(FakeServer(port))
        await until(lambda: state.states() == ["up", "up"])
        assert servers[-1].version == ":2"
        assert servers[-1].held["a"][0, 0] == 2

    run(list(servers), body, timeout=1.0)


def test_a_server_that_fails_at_every_update_is_tried_less_and_less(
    servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    """Each time all weights are read for it. It is healthy throughout."""

    async def body(state: Run) -> None:
        member = state.pool.members[0]
        servers[0].failing["/update_weights"] = 500
        await state.give(2)
        before = servers[0].routes().count("/update_weights")
        await asyncio.sleep(3.0)
        # After 0.1 s, 0.2 s, 0.4 s, 0.8 s, ...
        assert 2 <= servers[0].routes().count("/update_weights") - before <= 6
        assert caplog.text.count("is given up") == 1
        assert "is given up: giving it the weights of step 2" in caplog.text
        servers[0].failing.clear()
        await until(lambda: state.states() == ["up", "up"])
        assert servers[0].version == ":2"
        assert member.rest > 0.0, "it may still fail at the first request"
        assert (await state.pool.sample(request()))[0].versions == [2, 2, 2]
        assert member.rest == 0.0

        servers[0].failing["/update_weights"] = 500
        await state.give(3)
        await until(lambda: state.states() == ["lost", "up"])
        assert caplog.text.count("is given up") == 2
        servers[0].failing.clear()
        await until(lambda: state.states() == ["up", "up"])
        await state.give(4)
        assert member.rest == 0.0

    run(servers, body)


def test_the_run_ends_when_no_server_is_left(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        asked = asyncio.create_task(state.pool.sample(request()))
        for server in servers:
            await asyncio.to_thread(server.die)
        await until(lambda: state.states() == ["lost", "lost"])
        await asyncio.gather(asked, return_exceptions=True)
        with pytest.raises(EngineError, match="no server is left"):
            await state.pool.sample(request(1))

    run(servers, body, timeout=1.0)


def test_a_request_that_breaks_every_server_ends_the_run(servers: list[FakeServer]) -> None:
    for server in servers:
        server.behaviour = "nonsense"

    async def body(state: Run) -> None:
        with pytest.raises(EngineError, match="answered no JSON|no server is left"):
            await state.pool.sample(request())

    run(servers, body)


def test_a_weight_that_does_not_arrive_is_seen(
    servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    async def body(state: Run) -> None:
        servers[0].loses = {"b"}
        await state.give(2)
        await until(lambda: "does not hold the values that it was sent" in caplog.text)
        assert servers[0].paused, "nobody samples from half of an update"
        servers[0].loses = set()
        await until(lambda: state.states() == ["up", "up"])
        assert not servers[0].paused
        assert servers[0].held["b"].tolist() == [2.0] * 4

    run(servers, body)
    assert "of 1 of 2 weights: b" in caplog.text


def test_a_server_that_shows_too_few_of_its_weights_is_not_believed(
    servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    async def body(state: Run) -> None:
        servers[0].hides = {"b"}
        await state.give(2)
        assert state.states()[1] == "up"
        await until(lambda: "shows 1 of 2 weights, too few to know what it has: b" in caplog.text)
        assert servers[0].paused
        servers[0].hides = set()
        await until(lambda: state.states() == ["up", "up"])

    run(servers, body)
    assert "are compared after an update" not in caplog.text, "all are"


@pytest.mark.parametrize("hidden", [["b", "a"], ["c", "b", "a"]], ids=["most", "all"])
def test_servers_that_show_too_few_of_their_weights_end_the_run(
    hidden: list[str], servers: list[FakeServer]
) -> None:
    weights = {name: torch.ones(2, 3) for name in "abc"}
    servers[0].hides = set(hidden)

    async def work() -> None:
        state = Run(servers[:1], 1.0, False)
        try:
            await state.start()
            await state.pool.hold()
            with pytest.raises(EngineError, match=f"shows {3 - len(hidden)} of 3 weights, too few"):
                await state.pool.update(state.sender.write(weights.items(), 1))
        finally:
            await state.pool.close()
            state.sender.close()

    asyncio.run(work())


def test_an_update_that_no_server_takes_ends_the_run(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        for server in servers:
            server.failing["/update_weights"] = 500
        with pytest.raises(EngineError, match="no server is left"):
            await state.give(2)

    run(servers, body, timeout=1.0)


@pytest.mark.parametrize(
    ("hang", "route", "stage"),
    [(60.0, "/pause", "pausing"), (0.25, "", "(pausing|finishing|checking)")],
    ids=["one route hangs", "each route is slow"],
)
def test_an_update_has_one_deadline(
    hang: float, route: str, stage: str, servers: list[FakeServer],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Also where as many requests are under way as there may be."""
    servers[0].behaviour = "hang"
    answer, over = servers[0]._answer, threading.Event()

    def slow(asked: str, body: Any) -> Any:
        if asked == route or (not route and asked not in ("/health", GENERATE)):
            over.wait(hang)
        return answer(asked, body)

    async def body(state: Run) -> None:
        asked = [asyncio.create_task(state.pool.sample(request(row))) for row in range(8)]
        await until(lambda: servers[0].routes().count(GENERATE) == 2)
        monkeypatch.setattr(servers[0], "_answer", slow)
        started = time.monotonic()
        await state.give(2)
        assert time.monotonic() - started < 2.0
        assert state.states() == ["out", "up"]
        over.set()
        servers[0].behaviour = "well"
        assert len(await asyncio.gather(*asked)) == 8

    run(servers, body, timeout=1.0, connections=2)
    problem = f"the server at {servers[0].url} did not end its update within 1 s: {stage}"
    assert re.search(problem, caplog.text)


def test_weights_are_not_rewritten_while_a_server_reads_them(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        async with state.pool._read():
            held = asyncio.create_task(state.pool.hold())
            await asyncio.sleep(0.1)
            assert not held.done()
        await held
        reading = asyncio.create_task(_read_once(state.pool))
        await asyncio.sleep(0.1)
        assert not reading.done()
        await state.pool.let_go()
        with pytest.raises(EngineError, match="no weights to give"):
            await reading

    run(servers, body)


async def _read_once(pool: ServerPool) -> Any:
    async with pool._read() as weights:
        return weights


def test_no_request_before_weights(servers: list[FakeServer]) -> None:
    async def work() -> None:
        state = Run(servers, 5.0, False)
        try:
            await state.start()
            state.pool.members[0].state = "up"
            with pytest.raises(EngineError, match="before they got weights"):
                await state.pool.sample(request())
        finally:
            await state.pool.close()
            state.sender.close()

    asyncio.run(work())


class Started:
    """A server of ours, as far as a pool looks at it: one that was killed, or a stand-in that
    runs."""

    def __init__(self, port: int, killed: bool) -> None:
        self.log = Path("server.log")
        self.server = None if killed else FakeServer(port)
        self.exit_status = 247 if killed else None

    def said(self) -> str:
        return "Killed"

    def stop(self) -> None:
        if self.server is not None and not self.server.dead:
            self.server.die()
        self.exit_status = 0


@pytest.mark.parametrize("kills", [1, 2, 3])
def test_a_server_that_is_killed_as_it_starts_is_started_again(kills: int) -> None:
    port = free_port()
    outcomes = [False, *[True] * kills]

    def start() -> Any:
        return Started(port, killed=outcomes.pop(0) if outcomes else False)

    async def work() -> None:
        state = Run([], 5.0, False)
        client = ServerClient(f"http://127.0.0.1:{port}", key=None, timeout=5.0)
        member = Member(client, start, start())
        state.pool.members.append(member)
        try:
            await state.start()
            await state.give(1)
            assert member.process is not None
            member.process.stop()
            state.pool._take_out(member, "killed")
            await until(lambda: member.state == ("lost" if kills == 3 else "up"))
        finally:
            await state.pool.close()
            state.sender.close()

    asyncio.run(work())


@pytest.mark.parametrize("first", ["killed", "hangs"])
def test_a_server_that_does_not_come_to_its_first_start_is_started_again(first: str) -> None:
    port = free_port()
    outcomes = [first, "starts"]

    def start() -> Any:
        outcome = outcomes.pop(0)
        started = Started(port, killed=outcome != "starts")
        if outcome == "hangs":
            started.exit_status = None
        return started

    async def work() -> None:
        state = Run([], 5.0, False)
        state.pool._start_timeout = 2.0
        client = ServerClient(f"http://127.0.0.1:{port}", key=None, timeout=5.0)
        state.pool.members.append(Member(client, start, start()))
        try:
            await state.start()
            await state.give(1)
            assert (await state.pool.sample(request()))[0].versions == [1, 1, 1]
        finally:
            await state.pool.close()
            state.sender.close()

    asyncio.run(work())
