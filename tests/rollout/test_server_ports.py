"""The run's own servers where somebody else takes their ports. They are stand-ins, behind real
HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recap_fast.rollout import server as engine_module
from recap_fast.rollout import server_pool
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_process import free_port
from tests.rollout.fake_server import FakeServer
from tests.rollout.test_server_pool import request
from tests.rollout.test_server_runs import WEIGHTS, engine_at

pytestmark = pytest.mark.usefixtures("impatient")


class Machine:
    """On which a run's servers start, and others take ports.

    Attributes:
        started: the run's servers, in order, as far as a pool looks at them.
        grabbed: how many of the next ones lose their port while they start.
    """

    def __init__(self) -> None:
        self.started: list[Started] = []
        self.others: list[FakeServer] = []
        self.grabbed = 0

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> Started:
        port = int(command[command.index("--port") + 1])
        if self.grabbed:
            self.grabbed -= 1
            self.take(port)
        self.started.append(Started(port, environment["VLLM_API_KEY"], log))
        return self.started[-1]

    def take(self, port: int) -> None:
        """Another server, of somebody else's, listens there from now on."""
        self.others.append(FakeServer(port))
        self.others[-1].key = "another"


class Started:
    def __init__(self, port: int, key: str, log: Path) -> None:
        self.port, self.log = port, log
        self.exit_status: int | None = None
        self.server: FakeServer | None = None
        try:
            self.server = FakeServer(port)
            self.server.key = key
        except OSError:
            self.exit_status = 1

    def said(self) -> str:
        return "OSError: Address already in use"

    def end(self, status: int) -> None:
        if self.server is not None and not self.server.dead:
            self.server.die()
        if self.exit_status is None:
            self.exit_status = status

    def stop(self) -> None:
        self.end(0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    found = Machine()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine_module, "check_installed", lambda takes_images: None)
    monkeypatch.setattr(engine_module, "ServerProcess", found.start)
    monkeypatch.setattr(server_pool, "_GOING", 0.5)
    yield found
    for other in found.others:
        other.die()
    assert not [one for one in found.started if one.server and not one.server.dead]
    assert not [*tmp_path.rglob("*.port")]


def sample(engine: Any) -> list[int]:
    """Versions of the weights that answered."""
    completions = engine._run(engine._pool.sample(request(n=1)))
    return completions[0].versions  # type: ignore[no-any-return]


def test_a_port_that_is_taken_before_the_start_is_left(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = [free_port(), free_port()]
    machine.take(ports[0])
    free = iter(ports)
    monkeypatch.setattr(engine_module, "free_port", lambda: next(free))
    engine = engine_at()
    try:
        engine.sync_weights(WEIGHTS.items(), 1)
        assert sample(engine) == [1, 1, 1]
        assert [one.port for one in machine.started] == ports[1:]
    finally:
        engine.close()
    assert not machine.others[0].asked


def test_a_port_that_is_taken_as_the_server_starts_is_left(machine: Machine) -> None:
    machine.grabbed = 1  # by one that answers as if it were ready
    engine = engine_at()
    try:
        engine.sync_weights(WEIGHTS.items(), 1)
        assert sample(engine) == [1, 1, 1]
        assert len(machine.started) == 2
        assert machine.started[0].port != machine.started[1].port
    finally:
        engine.close()


def test_a_server_that_ends_by_itself_ends_the_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its port is its own: it would end again."""
    start = machine.start

    def fails(*how: Any) -> Started:
        start(*how).end(1)
        return machine.started[-1]

    monkeypatch.setattr(engine_module, "ServerProcess", fails)
    with pytest.raises(EngineError, match="ended with status 1 before it was ready"):
        engine_at()
    assert len(machine.started) == 1


@pytest.mark.parametrize("status", [1, 247], ids=["ended", "killed"])
def test_a_port_that_is_taken_while_the_server_is_away_is_left_by_all_processes(
    status: int, machine: Machine
) -> None:
    said: list[Any] = []

    def agree(make: Callable[[], Any]) -> Any:
        said.append(make())
        return said[-1]

    leader = engine_at(agree=agree)
    told = iter(said)
    follower = engine_at(agree=lambda _: next(told), leads=False)
    try:
        for version in (1, 2):
            leader.sync_weights(WEIGHTS.items(), version)
            follower.sync_weights(WEIGHTS.items(), version)
            assert sample(leader) == sample(follower) == [version] * 3
            if version == 1:
                if status == 1:  # the other process sees nothing of it until it asks for something
                    follower._loop.call_soon_threadsafe(follower._pool._watch.cancel)
                first = machine.started[0]
                first.end(status)
                machine.take(first.port)
                until = time.monotonic() + 20
                while len(machine.started) == 1:
                    assert time.monotonic() < until
                    time.sleep(0.05)
                for _ in range(4):  # after which no connection to the old server is left
                    follower._run(follower._pool.members[0].client.is_healthy(5.0))
                # What both have asked for meanwhile is answered at the new port.
                assert sample(follower) == sample(leader) == [1, 1, 1]
        assert len(machine.started) == 2
        assert leader._pool.members[0].client.url == follower._pool.members[0].client.url
        assert str(first.port) not in follower._pool.members[0].client.url
    finally:
        follower.close()
        leader.close()
