"""A broadcast to servers that are there, come back, fail or hang. Gloo stands in for NCCL
(`gloo_group`), and `fake_server` for vLLM; test_server_broadcast.py has the real one."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch

from recap_fast.config import ServerConfig
from recap_fast.rollout import transfer
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_client import ServerClient
from recap_fast.rollout.server_member import Member
from recap_fast.rollout.server_pool import ServerPool
from recap_fast.rollout.transfer import NcclTransfer, choose
from recap_fast.rollout.weight_patch import HostCopy
from tests.rollout.fake_server import FakeServer
from tests.rollout.gloo_group import join, new_unique_id
from tests.rollout.test_server_pool import until

pytestmark = pytest.mark.usefixtures("impatient")

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    found = [FakeServer(), FakeServer(), FakeServer()]
    yield found
    for server in found:
        server.die()


class Run:
    def __init__(
        self, servers: list[FakeServer], timeout: float, join: Callable[..., Any], sparse: bool
    ) -> None:
        self.transfer = NcclTransfer(
            torch.float32, CPU, timeout, new_unique_id, join, piece=50, sparse=sparse
        )
        self.pool = ServerPool(
            [Member(ServerClient(s.url, key=None, timeout=timeout)) for s in servers],
            transfer=self.transfer,
            timeout=timeout,
            start_timeout=5.0,
            recompute=False,
            has_images=False,
        )

    async def give(self, version: int) -> None:
        weights = {"a": torch.full((6, 3), float(version)), "b": torch.full((9,), float(version))}
        await self.give_these(weights, version)

    async def give_these(self, weights: dict[str, torch.Tensor], version: int) -> int:
        """Returns the bytes that were sent."""
        before = self.transfer.sent_bytes
        await self.pool.hold()
        await self.pool.update(self.transfer.write(weights.items(), version))
        return self.transfer.sent_bytes - before

    def states(self) -> list[str]:
        return [member.state for member in self.pool.members]


def run(
    servers: list[FakeServer],
    body: Callable[[Run], Awaitable[None]],
    timeout: float = 30.0,
    join: Callable[..., Any] = join,
    sparse: bool = False,
) -> None:
    async def work() -> None:
        state = Run(servers, timeout, join, sparse)

        async def check(client: ServerClient) -> None:
            await client.version()

        try:
            await state.pool.start(check)
            await asyncio.wait_for(body(state), 120)
        finally:
            await state.pool.close()
            state.transfer.close()

    asyncio.run(work())


def values(servers: list[FakeServer]) -> list[tuple[float, float]]:
    return [(s.held["a"].unique().item(), s.held["b"].unique().item()) for s in servers]


def test_one_group_serves_all_versions(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        await state.give(1)
        assert values(servers) == [(1.0, 1.0)] * 3
        await state.give(2)
        assert values(servers) == [(2.0, 2.0)] * 3

    run(servers, body)
    for server in servers:
        assert server.routes().count("/init_weight_transfer_engine") == 1
    infos = [
        body["init_info"]
        for server in servers
        for route, _, body in server.asked
        if route == "/init_weight_transfer_engine"
    ]
    assert [(info["rank"], info["world_size"]) for info in infos] == [(1, 4), (2, 4), (3, 4)]


def test_a_server_that_comes_back_is_served_alone_and_then_with_all(
    servers: list[FakeServer],
) -> None:
    async def body(state: Run) -> None:
        await state.give(1)
        state.pool._take_out(state.pool.members[1], "for the test")
        servers[1].held = {}
        await until(lambda: state.states() == ["up"] * 3, 60)
        assert values(servers) == [(1.0, 1.0)] * 3
        assert servers[0].routes().count("/update_weights") == 1, "the others went on sampling"
        await state.give(2)
        assert values(servers) == [(2.0, 2.0)] * 3

    run(servers, body)
    sizes = [
        [b["init_info"]["world_size"] for r, _, b in s.asked if r == "/init_weight_transfer_engine"]
        for s in servers
    ]
    assert sizes == [[4, 4], [4, 2, 4], [4, 4]]


def test_a_server_that_is_gone_does_not_keep_the_others(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        await state.give(1)
        servers[2].failing["/get_world_size"] = 500
        state.transfer._drop()
        await state.give(2)
        assert values(servers[:2]) == [(2.0, 2.0)] * 2
        assert state.states()[:2] == ["up", "up"]
        servers[2].failing.clear()

    run(servers, body)


@pytest.mark.parametrize(
    ("route", "stage"),
    [
        ("/update_weights", "sending the weights of step 2 to 3 servers"),
        ("/init_weight_transfer_engine", "forming a group with 3 servers"),
    ],
)
def test_one_that_fails_before_the_broadcast_ends_takes_its_round_with_it(
    route: str, stage: str, servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    """The others wait for pieces that do not come; all come back one by one."""

    async def body(state: Run) -> None:
        await state.give(1)
        servers[1].failing[route] = 500
        if "init" in route:
            state.transfer._drop()
        giving = asyncio.create_task(state.give(2))
        await until(lambda: "is taken out" in caplog.text, 60)
        servers[1].failing.clear()
        await giving
        await until(lambda: state.states() == ["up"] * 3, 90)
        assert values(servers) == [(2.0, 2.0)] * 3

    run(servers, body)
    assert re.search(rf"{stage}: .*{route} .*told to fail", caplog.text)


def test_a_trainer_without_nccl_says_so(servers: list[FakeServer]) -> None:
    def missing() -> bytes:
        raise OSError("libnccl.so.2: cannot open shared object file")

    async def body(state: Run) -> None:
        state.transfer._new_unique_id = missing
        with pytest.raises(EngineError, match=r"NCCL cannot be used here: libnccl\.so\.2"):
            await state.give(1)

    run(servers[:1], body)


class HangingGroup:
    def __init__(self, group: Any) -> None:
        self.group = group  # whose end would be noticed
        self.aborted = threading.Event()

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.aborted.wait(600)

    def abort(self) -> None:
        self.aborted.set()


def test_a_send_that_hangs_ends_with_its_stage(
    servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    groups: list[HangingGroup] = []

    def hanging(unique_id: bytes, **how: Any) -> HangingGroup:
        groups.append(HangingGroup(join(unique_id, **how)))
        return groups[-1]

    async def body(state: Run) -> None:
        with pytest.raises(EngineError, match="no server is left"):
            await state.give(1)
        assert groups[0].aborted.wait(10)

    run(servers[:1], body, timeout=3.0, join=hanging)
    assert "sending the weights of step 1 to 1 servers: not done within 3 s" in caplog.text


@pytest.mark.parametrize("stage", ["forming", "sending"])
def test_a_send_that_is_interrupted_leaves_no_group(stage: str, servers: list[FakeServer]) -> None:
    """What was begun in it goes on, and would be taken for what is sent next."""
    groups: list[HangingGroup] = []
    goes_on = threading.Event()

    def hanging(unique_id: bytes, **how: Any) -> HangingGroup:
        groups.append(HangingGroup(join(unique_id, **how)))
        if stage == "forming":
            goes_on.wait(20)
        return groups[-1]

    async def body(state: Run) -> None:
        update = asyncio.create_task(state.give(1))
        route = "/init_weight_transfer_engine" if stage == "forming" else "/update_weights"
        await until(lambda: route in servers[0].routes() and bool(groups))
        await asyncio.sleep(0.2)
        update.cancel()
        await asyncio.wait([update])
        goes_on.set()
        await asyncio.to_thread(groups[0].aborted.wait, 10)
        assert groups[0].aborted.is_set()
        assert state.transfer._group is None

    run(servers[:1], body, join=hanging)


WHOLE = 128 + 64
"""Bytes of the weights below, in float32, each with what is left free behind it."""
PATCH = 64 + 64
"""Of a position and a value, likewise."""


def one_more(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A step that changes one value."""
    after = {name: tensor.clone() for name, tensor in weights.items()}
    after["a"][4, 2] += 1
    return after


def weights_at(start: float) -> dict[str, torch.Tensor]:
    return {"a": torch.arange(18.0).view(6, 3) + start, "b": torch.arange(9.0) + start}


def all_hold(servers: list[FakeServer], weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(s.held[n], weights[n]) for s in servers for n in weights)


def test_servers_are_sent_what_changed(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        weights = weights_at(0.0)
        assert await state.give_these(weights, 1) == WHOLE
        for version in (2, 3):
            weights = one_more(weights)
            assert await state.give_these(weights, version) == PATCH
            assert all_hold(servers, weights)
        assert await state.give_these(weights, 4) == 0
        assert await state.give_these(weights_at(0.5), 5) == WHOLE
        assert all_hold(servers, weights_at(0.5))

    run(servers, body, sparse=True)


def test_without_sparse_everything_is_sent(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        for version in (1, 2):
            assert await state.give_these(weights_at(0.0), version) == WHOLE

    run(servers[:1], body)
    assert servers[0].copy._tensors == {}


def test_a_server_that_lost_its_copy_is_sent_everything_and_then_what_changes(
    servers: list[FakeServer],
) -> None:
    async def body(state: Run) -> None:
        weights = weights_at(0.0)
        await state.give_these(weights, 1)
        before = state.transfer.sent_bytes
        servers[1].copy, servers[1].held = HostCopy(), {}  # as after a restart
        state.pool._take_out(state.pool.members[1], "for the test")
        await until(lambda: state.states() == ["up"] * 3, 60)
        assert state.transfer.sent_bytes - before == WHOLE
        assert all_hold(servers, weights)
        weights = one_more(weights)
        assert await state.give_these(weights, 2) == PATCH
        assert all_hold(servers, weights)

    run(servers, body, sparse=True)


def test_one_that_lost_its_copy_unnoticed_refuses_and_the_others_have_the_patch(
    servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    async def body(state: Run) -> None:
        weights = weights_at(0.0)
        await state.give_these(weights, 1)
        servers[1].copy = HostCopy()
        weights = one_more(weights)
        await state.give_these(weights, 2)
        await until(lambda: state.states() == ["up"] * 3, 60)
        assert state.transfer.sent_bytes == WHOLE + PATCH + WHOLE
        assert all_hold(servers, weights)
        weights = one_more(weights)
        assert await state.give_these(weights, 3) == PATCH
        assert all_hold(servers, weights)

    run(servers, body, sparse=True)
    assert re.search(r"has changed since version 1-\w+, and the server holds none", caplog.text)
    assert caplog.text.count("is taken out") == 1


def test_a_version_that_was_not_sent_makes_no_patch_for_the_next(
    servers: list[FakeServer],
) -> None:
    """Nor does one that could not be written to its end."""

    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", weights_at(3.0)["a"]
        raise ValueError("a gather failed")

    async def body(state: Run) -> None:
        weights = weights_at(0.0)
        await state.give_these(weights, 1)
        state.transfer.write(one_more(weights).items(), 2)
        weights = one_more(one_more(weights))
        assert await state.give_these(weights, 2) == WHOLE
        with pytest.raises(ValueError, match="a gather failed"):
            state.transfer.write(breaking(), 3)
        weights = one_more(weights)
        assert await state.give_these(weights, 3) == WHOLE
        assert all_hold(servers[:1], weights)

    run(servers[:1], body, sparse=True)


def test_a_server_that_misses_an_update_is_sent_everything(servers: list[FakeServer]) -> None:
    async def body(state: Run) -> None:
        weights = weights_at(0.0)
        await state.give_these(weights, 1)
        servers[2].failing["/start_weight_update"] = 500
        weights = one_more(weights)
        assert await state.give_these(weights, 2) == PATCH
        servers[2].failing.clear()
        await until(lambda: state.states() == ["up"] * 3, 60)
        assert state.transfer.sent_bytes == WHOLE + PATCH + WHOLE
        assert all_hold(servers, weights)

    run(servers, body, sparse=True)


def test_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = ServerConfig()
    assert choose(auto, CPU, is_local=True, neighbours=[]) == "shared_memory"
    assert choose(auto, CPU, is_local=False, neighbours=[]) == "shared_memory"
    assert choose(auto, CUDA, is_local=False, neighbours=[]) == "nccl"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    reaches = {1: True, 2: False}
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda gpu, _: reaches[gpu])
    assert choose(auto, CUDA, is_local=True, neighbours=[1]) == "ipc"
    assert choose(auto, CUDA, is_local=True, neighbours=[1, 2]) == "shared_memory"
    assert choose(auto, CUDA, is_local=True, neighbours=[1, 3]) == "shared_memory"


@pytest.mark.parametrize("named", ["ipc", "nccl", "nccl_sparse"])
def test_what_needs_a_gpu_is_refused_without(named: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerConfig(transfer=named)
    assert choose(settings, CUDA, is_local=True, neighbours=[]) == named
    with pytest.raises(EngineError, match=rf"transfer is {named}.*on cpu: --set rollout\.server"):
        choose(settings, CPU, is_local=True, neighbours=[])
    monkeypatch.setattr(transfer, "find_spec", lambda name: None)
    if named != "ipc":
        with pytest.raises(EngineError, match="needs vllm installed"):
            choose(settings, CUDA, is_local=True, neighbours=[])
