"""The plan of a run whose engine is in processes of its own, on GPUs of their own."""

from __future__ import annotations

import pytest

from recap_fast.config import load_config
from recap_fast.model.shapes import load_shapes
from recap_fast.rollout.sent_weights import PIECE
from recap_fast.training.memory_plan import GIB, MemoryPlan, find_remedies, plan_memory
from tests.training.test_memory_plan import SMALL

SERVERS = ["rollout.engine=vllm_server"]
ELSEWHERE = "rollout.server.urls=['http://10.0.0.2:8000']"
NEAR = "rollout.server.urls=['http://127.0.0.1:8000']"


def plan(*overrides: str, gib: float = 80) -> MemoryPlan:
    config = load_config(SMALL, [*SERVERS, *overrides])
    return plan_memory(config, load_shapes(config.model.path), 1, int(gib * GIB))


def test_the_engine_takes_nothing_of_the_trainers_gpus() -> None:
    found = plan("rollout.server.transfer=shared_memory")
    names = {part.name for part in found.parts}
    assert not [name for name in names if "engine" in name or "servers" in name]
    assert found.kv_cache == 0
    assert found.stages["rollouts"] == ()
    assert [part.bytes for part in found.stages["weight sync"] if "broadcast" in part.name] == [
        PIECE
    ]


@pytest.mark.parametrize(
    ("overrides", "reads"),
    [
        ([], True),
        ([NEAR], True),
        ([ELSEWHERE], False),
        ([ELSEWHERE, "rollout.server.transfer=ipc"], True),
        (["rollout.server.transfer=nccl"], False),
        (["rollout.server.adapters=named", "model.lora.rank=4"], False),
    ],
)
def test_what_servers_read_is_whole_with_a_tied_head_twice(
    overrides: list[str], reads: bool
) -> None:
    shapes = load_shapes(load_config(SMALL).model.path)
    assert not shapes.head, "the test wants a tied one"
    parts = {part.name: part.bytes for part in plan(*overrides).parts}
    wanted = 2 * (shapes.parameters + shapes.embedding) if reads else None
    assert parts.get("weights for servers") == wanted


def test_without_room_for_it_the_hosts_memory_is_proposed() -> None:
    needed = plan().total
    config = load_config(SMALL, SERVERS)
    memory = int((needed - GIB) / 0.95)
    shapes = load_shapes(config.model.path)
    assert not plan_memory(config, shapes, 1, memory).fits
    settings = [remedy.settings for remedy in find_remedies(config, shapes, 1, memory)]
    assert ("rollout.server.transfer=shared_memory",) in settings
    assert not any("sleep" in setting for group in settings for setting in group)
    for group in settings:
        load_config(SMALL, [*SERVERS, *group])  # none is refused
