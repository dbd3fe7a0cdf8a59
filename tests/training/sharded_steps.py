"""Optimizer steps of tiny models, with and without images, alone or dealt over ranks.

Imported by the test, for one process, and by step_ranks.py, for a rank of several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from recap_fast.model.checkpointing import LayerModes, Mode, checkpoint_layers
from recap_fast.model.policy import Policy
from recap_fast.model.sharding import inside, whole
from recap_fast.ops import fused_linear_policy_loss
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.training.distributed import ALONE, World
from recap_fast.training.optimization import PolicyOptimizer, UpdateStats
from recap_fast.training.packing import PackedUpdate, pack_update
from tests.model.test_vision import draw_rows
from tests.no_sync import ForbidHostSync
from tests.tiny import packed_vision_model, tiny_config, tiny_llama

STEPS = (
    (0, 2, 3, (1, 2)),
    (1, 2, 2, (0, 0)),
    (1, 1, 2, (0, 1)),
    (2, 1, 2, (0, 1)),
    (3, 0, 3, (1, 1)),
)
"""By step: a seed, groups of three rollouts, supervised rows, the fewest and most images of each.
Of two ranks each has, in one of them, no policy tokens, no supervised ones, or no images, where the
other has some."""


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained.

    Attributes:
        model: "llama" or a vision-language model's type.
        gradients: of the first update, in the place of all steps' parameters.
        replicas: as `distributed.replicas`.
        settings: of the configuration, as on the command line.
    """

    name: str
    model: str = "llama"
    tied: bool = True
    dtype: str = "float32"
    train_vision: bool = False
    replicas: int = 1
    gradients: bool = False
    checkpointing: Mode = "none"
    settings: Sequence[str] = ()

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Outcome:
    """What all ranks have alike.

    Attributes:
        tensors: parameters by name, or gradients.
        stats: of each step, by name.
        rows: of this rank in each step: policy and supervised tokens, patches.
    """

    tensors: dict[str, Tensor]
    stats: list[dict[str, list[float]]]
    rows: list[list[int]]


def make_policy(case: Case) -> Policy:
    model: Any
    if case.model == "llama":
        model = tiny_llama(tied=case.tied)
    else:
        model = packed_vision_model(case.model, tied=case.tied)
    checkpoint_layers(
        model, LayerModes.uniform(case.checkpointing, len(model.get_decoder().layers))
    )
    policy = Policy(model, case.compute_dtype)
    if policy.vision is not None:
        policy.vision.tower.requires_grad_(case.train_vision)
    return policy


def make_updates(case: Case, policy: Policy, world: World) -> list[PackedUpdate]:
    """Of `STEPS`; some have several passes."""
    updates = []
    for seed, groups, supervised, images in STEPS:
        rollouts, advantages, rows = draw_rows(
            seed, groups, 3, supervised, images if policy.vision else (0, 0)
        )
        updates.append(
            pack_update(
                rollouts, advantages, rows, [2] * len(rows),
                config=PolicyLossConfig(), max_tokens=160 if policy.vision else 40,
                vision=policy.vision, rank=world.rank, size=world.size,
            )
        )  # fmt: skip
    return updates


def run_case(case: Case, folder: Path, world: World = ALONE) -> Outcome:
    """Args:
    folder: an empty one, for a configuration.
    """
    config = tiny_config(folder, folder, *case.settings)
    policy = make_policy(case)
    policy.shard(world.mesh)
    optimizer = PolicyOptimizer(policy, None, config, world)
    stats, rows = [], []
    weights = torch.tensor([0.7, 1.3, 1.0])
    updates = make_updates(case, policy, world)
    if case.gradients:
        optimizer._apply = lambda lr, stats: None  # type: ignore[method-assign]
        updates = updates[:1]
    for update in updates:
        rows.append(_rows_of(update))
        with ForbidHostSync():
            found = optimizer.step(update, weights, 1e-2)
        stats.append(_as_lists(found))
    named = dict(policy.model.named_parameters())
    tensors = {n: p.grad if case.gradients else p.detach() for n, p in named.items()}
    return Outcome({n: whole(t) for n, t in tensors.items() if t is not None}, stats, rows)


def _rows_of(update: PackedUpdate) -> list[int]:
    trained = [batch.token_objectives[batch.targets >= 0] for batch in update.batches]
    patches = [p for batch in update.batches if batch.images for p in batch.images.patches]
    return [
        sum(int((objectives < 0).sum()) for objectives in trained),
        sum(int((objectives >= 0).sum()) for objectives in trained),
        sum(len(p) for p in patches),
    ]


def _as_lists(stats: UpdateStats) -> dict[str, Any]:
    return {
        name: value.flatten().tolist()
        for name, value in ((n, getattr(stats, n)) for n in stats.__dataclass_fields__)
        if value is not None
    }


def head_gradient_error(tied: bool, mesh: DeviceMesh | None, rank: int, size: int) -> float:
    """Of the gradient that a head in bfloat16 gets from float32 states, which differ from rank to
    rank, relative to that of all ranks' in float64."""
    policy = Policy(tiny_llama(tied=tied), torch.bfloat16)
    weight = policy.head.weight.detach().bfloat16().double().requires_grad_()
    policy.shard(mesh)
    embedding, head = policy.model.get_input_embeddings(), policy.model.get_output_embeddings()
    ids = torch.arange(40)

    def states(of_rank: int) -> Tensor:
        return torch.randn(len(ids), 48, generator=torch.Generator().manual_seed(of_rank))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_policy_loss(
            hidden, weight, ids, sequence_ids=torch.zeros_like(ids), advantages=torch.ones(1, 1),
            denominators=torch.full((1,), float(len(ids) * size)),
        ).loss  # fmt: skip

    def run() -> Any:
        hidden = states(rank) + 0 * embedding(ids)  # as in a pass, it comes first
        return inside(head, lambda hidden: loss(hidden, policy.head.weight), hidden)

    inside(policy.model, run).backward()
    for of_rank in range(size):
        loss(states(of_rank).double(), weight).backward()
    gradient = whole(policy.head.weight.grad)  # type: ignore[arg-type]
    return float((gradient - weight.grad).norm() / weight.grad.norm())  # type: ignore[union-attr]
