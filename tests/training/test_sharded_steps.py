"""Steps over FSDP: several ranks train as one process does, with and without images.

What ranks compute is in sharded_steps.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from recap_fast.rollout.embedded import inference_state
from recap_fast.rollout.mismatch import sequence_logprobs
from recap_fast.training.distributed import World, _mesh
from recap_fast.training.optimization import PolicyOptimizer
from tests.model.test_vision import draw_rows
from tests.no_sync import ForbidHostSync
from tests.processes import run_ranks
from tests.tiny import tiny_config
from tests.training.sharded_steps import Case, Outcome, make_policy, make_updates, run_case

RANKS = Path(__file__).with_name("step_ranks.py")
EXACT = [
    Case("tied"),
    Case("untied, full checkpointing", tied=False, checkpointing="full"),
    Case("images, frozen tower", "qwen2_5_vl", tied=False),
    Case("images, trained tower", "qwen2_5_vl", train_vision=True),
    Case("images in deeper layers, trained tower, selective checkpointing", "qwen3_vl",
         train_vision=True, tied=False, checkpointing="selective"),
    Case("importance weights", settings=("loss.rollout_is_cap=0.003", "loss.rollout_is_mode=mask")),
]  # fmt: skip
NARROW = [
    replace(case, name=f"{case.name}, bfloat16", dtype="bfloat16", gradients=True)
    for case in EXACT[1:4]
]
REPLICATED = [replace(case, replicas=2) for case in (EXACT[1], EXACT[3], *NARROW[::2])]


class Ranks:
    """What ranks made of cases, in one start for all."""

    def __init__(self, folder: Path, processes: int, cases: list[Case]) -> None:
        self.folder, self.cases = folder, cases
        given = json.dumps([asdict(case) for case in cases])
        self.reports = run_ranks(RANKS, processes, folder, str(folder), given, timeout=400)

    def outcomes(self, case: Case) -> list[Outcome]:
        tensors = load_file(self.folder / f"{case.name}.safetensors")
        return [Outcome(tensors, **report["cases"][case.name]) for report in self.reports]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("two"), 2, EXACT + NARROW)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("four"), 4, REPLICATED)


def errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative, by parameter. No key's bias changes attention, so that its gradient is noise."""
    assert got.keys() == wanted.keys()
    return {
        name: float((got[name] - value).norm() / value.norm())
        for name, value in wanted.items()
        if not name.endswith("k_proj.bias")
    }


def assert_exact(outcomes: list[Outcome], one: Outcome) -> None:
    for outcome in outcomes:
        for ours, wanted in zip(outcome.stats, one.stats, strict=True):
            for name, values in wanted.items():
                assert ours[name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True), name
    off = errors(outcomes[0].tensors, one.tensors)
    assert {name: error for name, error in off.items() if not error < 1e-5} == {}


def assert_near(got: Outcome, case: Case, folder: Path) -> None:
    """Gradients of a bfloat16 residual stream against one in float32 under autocast: both are off
    by bfloat16's rounding, that of one process with float32 says by how much."""
    (folder / "exact").mkdir()
    exact = run_case(replace(case, dtype="float32"), folder / "exact").tensors
    ours = errors(got.tensors, exact)
    theirs = errors(run_case(case, folder).tensors, exact)
    assert max(ours.values()) < 0.06
    assert sum(ours.values()) < 2 * sum(theirs.values())


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_two_ranks_step_as_one_process(two: Ranks, case: Case, tmp_path: Path) -> None:
    assert_exact(two.outcomes(case), run_case(case, tmp_path))


@pytest.mark.slow
def test_each_rank_goes_without_each_kind_of_tokens(two: Ranks) -> None:
    """In a step in which the other has some."""
    (case,) = (case for case in EXACT if case.name == "images, trained tower")
    first, second = (outcome.rows for outcome in two.outcomes(case))
    for kind in range(3):
        lacks = {
            rank
            for ours, theirs in zip(first, second, strict=True)
            for rank, has, other in ((0, ours, theirs), (1, theirs, ours))
            if other[kind] and not has[kind]
        }
        assert lacks, ("policy tokens", "supervised tokens", "patches")[kind]


@pytest.mark.slow
@pytest.mark.parametrize("case", NARROW, ids=lambda case: case.name)
def test_bfloat16_weights_give_gradients_as_good_as_autocast(
    two: Ranks, case: Case, tmp_path: Path
) -> None:
    assert_near(two.outcomes(case)[0], case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_heads_gradient_is_summed_over_ranks_unrounded(two: Ranks, tied: bool) -> None:
    """In bfloat16, as FSDP would have it, the error is ten thousand times as large."""
    for report in two.reports:
        found = report["head_errors"]
        name = "tied" if tied else "untied"
        assert found[f"{name}, float32"] < 1e-6
        assert found[f"{name}, bfloat16"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", REPLICATED, ids=lambda case: case.name)
def test_four_ranks_in_two_replicas(four: Ranks, case: Case, tmp_path: Path) -> None:
    if case.gradients:
        assert_near(four.outcomes(case)[0], case, tmp_path)
    else:
        assert_exact(four.outcomes(case), run_case(case, tmp_path))


@pytest.fixture
def alone() -> Iterator[World]:
    """One process that shards with itself, as on one GPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"), _mesh("cpu", 1, 1))
    dist.destroy_process_group()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", [EXACT[1], EXACT[3], NARROW[2]], ids=lambda case: case.name)
def test_one_rank_takes_the_path_of_several(alone: World, case: Case, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    outcome = run_case(case, tmp_path / "alone", alone)
    if case.gradients:
        assert_near(outcome, case, tmp_path)
    else:
        assert_exact([outcome], run_case(case, tmp_path))


@pytest.mark.parametrize("train_vision", [False, True], ids=["frozen", "trained"])
def test_a_tower_computes_in_the_narrow_dtype(alone: World, train_vision: bool) -> None:
    """A frozen one in float32 too, which is no part of the shards: kernels for packed attention
    take nothing else."""
    case = Case("tower", "qwen2_5_vl", dtype="bfloat16", train_vision=train_vision)
    policy = make_policy(case)
    policy.shard(alone.mesh)
    assert policy.vision is not None
    seen = []
    for name, module in policy.vision.tower.named_modules():
        if name.endswith("qkv"):
            module.register_forward_hook(lambda _, given, made: seen.append(made.dtype))
    batch = make_updates(case, policy, alone)[0].batches[0]
    policy.score(batch, lambda hidden: hidden.sum())
    assert seen == [torch.bfloat16] * 3


@pytest.mark.parametrize("train_vision", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_log_probs_beside_images_are_those_of_whole_weights(
    alone: World, tied: bool, train_vision: bool
) -> None:
    """As a sync of weights is checked with, outside of training."""
    case = Case("logits", "qwen2_5_vl", tied=tied, train_vision=train_vision)
    rollouts, _, _ = draw_rows(0, 2, 1, 0, (1, 2))
    found = []
    for mesh in (None, alone.mesh):
        policy = make_policy(case)
        policy.shard(mesh)
        with inference_state(policy.model, torch.float32):
            found.append([sequence_logprobs(policy.model, rollout) for rollout in rollouts])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_units_ask_for_the_weights_of_the_next(alone: World, tied: bool) -> None:
    """While a unit runs, those of the one after it have been asked for."""
    case = Case("prefetching", tied=tied)
    policy = make_policy(case)
    policy.shard(alone.mesh)
    model: Any = policy.model
    layers = list(model.model.layers)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    order = [embedding, *layers] if tied else [*layers, head]
    asked = []
    for unit, following in pairwise(order):
        (group,) = following._get_fsdp_state()._fsdp_param_groups

        def note(*_: Any, group: Any = group) -> None:
            asked.append(group.is_unsharded or group._all_gather_result is not None)

        unit.register_forward_pre_hook(note)
    batch = make_updates(case, policy, alone)[0].batches[0]
    policy.score(batch, lambda hidden: hidden.sum())
    assert asked == [True] * len(layers)


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_sharded_step_never_waits_on_cuda(tmp_path: Path, tied: bool) -> None:
    device = torch.device("cuda", 0)
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        case = Case("cuda", tied=tied, dtype="bfloat16", checkpointing="selective")
        policy = make_policy(case)
        policy.model.to(device)
        world = World(0, 1, device, _mesh("cuda", 1, 1))
        policy.shard(world.mesh)
        optimizer = PolicyOptimizer(policy, None, tiny_config(tmp_path, tmp_path), world)
        updates = [update.to(device) for update in make_updates(case, policy, world)]
        weights = torch.ones(3, device=device)
        optimizer.step(updates[0], weights, 1e-3)  # lazy initialisation
        torch.cuda.synchronize()
        with ForbidHostSync(device):
            stats = [optimizer.step(update, weights, 1e-3) for update in updates]
        assert all(found.grad_norm.item() > 0 for found in stats)
    finally:
        dist.destroy_process_group()
