"""Adapters that servers load by name. The servers are stand-ins (`fake_server`); a real one is in
test_server_named.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from recap_fast.config import LoraConfig, RolloutConfig
from recap_fast.model.lora import add_adapters, base_weights, merged_weights, saved_adapters
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_adapters import NamedAdapters
from recap_fast.rollout.server_client import ServerClient
from recap_fast.rollout.server_command import adapter_options, server_environment
from recap_fast.rollout.server_label import OtherRunError
from recap_fast.rollout.server_member import Member
from recap_fast.rollout.server_pool import ServerPool
from tests.rollout.conftest import random_llama
from tests.rollout.fake_server import FakeServer
from tests.rollout.test_server_pool import request, until

pytestmark = pytest.mark.usefixtures("impatient")

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def servers(model: Any) -> Iterator[list[FakeServer]]:
    """That have read the model's base."""
    found = [FakeServer(), FakeServer()]
    for server in found:
        server.held = {name: tensor.detach() for name, tensor in base_weights(model)}
    yield found
    for server in found:
        server.die()


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("peft")
    found = random_llama(tied=False)
    add_adapters(found, LoraConfig(rank=4, alpha=6), "base")
    return found


def redraw(model: Any, seed: int) -> None:
    """Other values of all adapters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


class Run:
    """A pool that gives adapters, as a trainer would use it."""

    def __init__(self, servers: list[FakeServer], model: Any, run: str = "aaaaaaaa") -> None:
        self.adapters = NamedAdapters(torch.float32, slots=2, run=run)
        self.adapters.note_base(base_weights(model))
        self.model = model
        self.pool = self.make_pool(servers, self.adapters)

    def make_pool(self, servers: list[FakeServer], adapters: NamedAdapters | None) -> ServerPool:
        members = [Member(ServerClient(s.url, key=None, timeout=5.0)) for s in servers]
        return ServerPool(
            members,
            transfer=None,
            timeout=5.0,
            start_timeout=5.0,
            recompute=False,
            has_images=False,
            adapters=adapters,
        )

    async def start(self) -> None:
        async def check(client: ServerClient) -> None:
            await client.version()

        await self.pool.start(check)

    async def give(self, version: int) -> str:
        redraw(self.model, version)
        self.adapters.write(self.model, version)
        return await self.pool.update_adapters()

    def states(self) -> list[str]:
        return [member.state for member in self.pool.members]


def run(servers: list[FakeServer], model: Any, body: Callable[[Run], Awaitable[None]]) -> None:
    async def work() -> None:
        state = Run(servers, model)
        try:
            await state.start()
            await asyncio.wait_for(body(state), 60)
        finally:
            await state.pool.close()
            state.adapters.close()

    asyncio.run(work())


def test_requests_are_sampled_from_the_version_that_they_name(
    servers: list[FakeServer], model: Any
) -> None:
    names = []

    async def body(state: Run) -> None:
        for version in (7, 8, 9):
            names.append(await state.give(version))
            completions = await state.pool.sample(request())
            # What the server itself says of versions is "default".
            assert [one.versions for one in completions] == [[version] * 3] * 2
        assert [list(server.adapters) for server in servers] == [names[1:]] * 2

    run(servers, model, body)
    bodies = [b for s in servers for route, _, b in s.asked if route == "/inference/v1/generate"]
    assert sorted(b["model"] for b in bodies) == names
    assert not any("cache_salt" in b for b in bodies)
    for server in servers:
        assert not {"/update_weights", "/pause"}.intersection(server.routes()), "nothing stops"


def test_requests_in_flight_end_with_the_version_that_they_began_with(
    servers: list[FakeServer], model: Any
) -> None:
    for server in servers:
        server.delay = 1.0

    async def body(state: Run) -> None:
        await state.give(7)
        asked = [asyncio.create_task(state.pool.sample(request(row))) for row in range(4)]
        await until(lambda: all("/inference/v1/generate" in s.routes() for s in servers))
        await state.give(8)
        assert not any(task.done() for task in asked)
        asked.append(asyncio.create_task(state.pool.sample(request(9))))
        answers = await asyncio.gather(*asked)
        assert [answer[0].versions[0] for answer in answers] == [7, 7, 7, 7, 8]
        assert state.pool.reissued == 0

    run(servers, model, body)


def test_a_server_that_has_lost_its_adapters_gets_them_again(
    servers: list[FakeServer], model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that somebody else has restarted at the same address."""

    async def body(state: Run) -> None:
        first, second = await state.give(7), await state.give(8)
        servers[0].adapters.clear()
        probes = servers[0].routes().count("/collective_rpc")
        asked = [asyncio.create_task(state.pool.sample(request(row))) for row in range(4)]
        for answer in await asyncio.gather(*asked):
            assert set(answer[0].versions) == {8}
        await until(lambda: state.states() == ["up", "up"])
        assert list(servers[0].adapters) == [first, second]
        assert servers[0].routes().count("/collective_rpc") == probes + 3, "base and two versions"

    run(servers, model, body)
    assert "does not exist" in caplog.text


def test_values_that_do_not_arrive_are_seen(
    servers: list[FakeServer], model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(state: Run) -> None:
        names = [await state.give(7)]
        servers[0].loses = {LAYER}
        names.append(await state.give(8))
        assert state.states()[1] == "up"
        await until(lambda: f"in 1 of 14 layers: {LAYER}" in caplog.text)
        servers[0].loses = set()
        await until(lambda: state.states() == ["up", "up"])
        assert [servers[0].adapters[x] for x in names] == [servers[1].adapters[x] for x in names]
        assert all(LAYER in servers[0].adapters[name] for name in names)

    run(servers, model, body)


def test_another_base_is_seen(
    servers: list[FakeServer], model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    servers[0].held[f"{LAYER}.weight"] = servers[0].held[f"{LAYER}.weight"] + 1e-3

    async def body(state: Run) -> None:
        await state.give(7)
        assert state.states()[1] == "up"
        await until(lambda: f"in 1 of 21 weights: {LAYER}.weight; start it again" in caplog.text)
        assert not servers[0].adapters

    run(servers, model, body)


def test_what_of_the_base_is_not_compared_is_said(
    servers: list[FakeServer], model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for server in servers:
        server.hides = {"lm_head.weight"}
    servers[0].hides = set(servers[0].held) - {"lm_head.weight"}

    async def body(state: Run) -> None:
        await state.give(7)
        assert state.states()[1] == "up"
        await until(lambda: "shows 1 of 21 weights, too few to know" in caplog.text)
        servers[0].hides = {"lm_head.weight"}
        await until(lambda: state.states() == ["up", "up"])

    run(servers, model, body)
    assert "of the servers' 21 weights 20 are compared" in caplog.text
    assert "and not: lm_head.weight" in caplog.text


def test_an_update_that_no_server_takes_ends_the_run(servers: list[FakeServer], model: Any) -> None:
    async def body(state: Run) -> None:
        for server in servers:
            server.failing["/v1/load_lora_adapter"] = 500
        with pytest.raises(EngineError, match="no server is left"):
            await state.give(7)

    run(servers, model, body)


def test_names_of_a_dead_run_are_unloaded_and_none_comes_again(
    servers: list[FakeServer], model: Any
) -> None:
    servers[0].adapters = {"policy-7-of-a-dead-run": {}, "somebody-else": {}}
    names: list[str] = []

    async def body(state: Run) -> None:
        names.append(await state.give(7))
        names.append(await state.give(7))
        assert list(servers[0].adapters) == ["somebody-else", *names[-2:]]

    run(servers, model, body)
    run(servers, model, body)
    assert len(set(names)) == 4


def test_a_run_whose_server_was_taken_ends_and_takes_nothing_back(
    servers: list[FakeServer], model: Any
) -> None:
    async def body(first: Run) -> None:
        await first.give(1)
        second = Run(servers[:1], model, "bbbbbbbb")
        try:
            await second.start()
            names = {await second.give(1)}
            with pytest.raises(OtherRunError, match=r"policy-bbbbbbbb-1.* one run at a time"):
                await first.give(2)
            assert set(servers[0].adapters) == names
            await second.give(2)
        finally:
            await second.pool.close()
            second.adapters.close()

    run(servers[:1], model, body)


def test_those_who_only_sample_wait_for_the_newest_name(
    servers: list[FakeServer], model: Any
) -> None:
    async def body(state: Run) -> None:
        name = await state.give(7)
        follower = state.make_pool(servers[:1], None)
        try:
            follower.follow(7, name)
            assert (await follower.sample(request()))[0].versions == [7, 7, 7]
            held = servers[0].adapters.pop(name)
            asked = asyncio.create_task(follower.sample(request()))
            await until(lambda: follower.members[0].state == "out")
            await asyncio.sleep(1.0)
            assert follower.members[0].state == "out"
            servers[0].adapters[name] = held
            assert (await asked)[0].versions == [7, 7, 7]
        finally:
            await follower.close()

    run(servers[1:] + servers[:1], model, body)


def test_what_a_dead_run_has_left_goes_also_at_the_second_try(
    servers: list[FakeServer], model: Any
) -> None:
    server = servers[0]
    server.adapters["policy-0badf00d-41-ff"] = {}

    async def body(state: Run) -> None:
        server.failing["/v1/unload_lora_adapter"] = 500
        update = asyncio.create_task(state.give(1))
        await until(lambda: state.states() == ["lost"])
        await asyncio.gather(update, return_exceptions=True)
        server.failing.clear()
        await until(lambda: state.states() == ["up"])
        newest = state.adapters.newest
        assert newest is not None
        assert list(server.adapters) == [newest.name]

    run(servers[:1], model, body)


def test_a_version_is_a_folder_of_peft_s_that_nobody_else_reads(model: Any) -> None:
    adapters = NamedAdapters(torch.bfloat16, slots=2, run="aaaaaaaa")
    redraw(model, 1)
    found = [adapters.write(model, version) for version in range(5)]
    root = found[0].folder.parent
    assert root.stat().st_mode & 0o777 == 0o700
    # Two that are live, and one that a server may have to read again for what is under way.
    assert sorted(root.iterdir()) == sorted(one.folder for one in found[2:])
    saved = load_file(found[-1].folder / "adapter_model.safetensors")
    assert saved.keys() == saved_adapters(model).keys()
    for name, tensor in saved_adapters(model).items():
        assert torch.equal(saved[name], tensor.to(torch.bfloat16)), name
    adapters.close()
    assert not root.exists()


def test_the_base_is_known_without_its_adapters(model: Any) -> None:
    redraw(model, 1)
    base, merged = dict(base_weights(model)), dict(merged_weights(model))
    assert base.keys() == merged.keys()
    plain = dict(random_llama(tied=False).named_parameters())
    for name, tensor in base.items():
        assert torch.equal(tensor, plain[name]), name
    assert sum(not torch.equal(base[name], merged[name]) for name in base) == 14


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "vllm"}, "set engine to vllm_server"),
        ({"tensor_parallel_size": 2}, "where it is whole"),
        ({"async": {"depth": 1, "on_update": "recompute"}}, "requests keep their version"),
    ],
)
def test_what_named_adapters_cannot_do_is_refused(changes: Any, said: str) -> None:
    settings = {"engine": "vllm_server", "server": {"adapters": "named"}}
    assert RolloutConfig.model_validate(settings).server.adapters == "named"
    with pytest.raises(ValidationError, match=said):
        RolloutConfig.model_validate(settings | changes)


def test_a_server_sets_memory_aside_for_all_that_is_under_way() -> None:
    settings = {
        "engine": "vllm_server",
        "server": {"adapters": "named"},
        "async": {"depth": 1, "max_staleness": 3},
    }
    config = RolloutConfig.model_validate(settings)
    assert adapter_options(config, 12) == {
        "max-lora-rank": 16, "max-loras": 5, "max-cpu-loras": 5,
    }  # fmt: skip
    with pytest.raises(EngineError, match=r"model\.lora\.rank is 600"):
        adapter_options(config, 600)


def test_only_a_guarded_server_loads_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    monkeypatch.setenv(variable, "1")
    assert variable not in server_environment("key", None)
    assert server_environment("key", None, takes_adapters=True)[variable] == "1"
    with pytest.raises(AssertionError):
        server_environment(None, None, takes_adapters=True)
