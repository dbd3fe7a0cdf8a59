"""Evaluation on held-out rows: greedy pass@1 for rl sources, token loss for sft sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recap_fast.config import TrainConfig
from recap_fast.data.images import load_image_encoder
from recap_fast.data.mix import DataStream
from recap_fast.model.batch import PackedBatch
from recap_fast.model.hub import model_folder
from recap_fast.model.lora import base_of, is_adapter
from recap_fast.model.model_path import resolve_model
from recap_fast.model.policy import Policy, load_tokenizer
from recap_fast.model.shapes import load_shapes
from recap_fast.model.sharded_load import load_sharded_policy
from recap_fast.model.train_mode import evaluating
from recap_fast.ops import linear_token_statistics
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.rewards.scorer import RewardScorer
from recap_fast.rollout.factory import check_tensor_parallel
from recap_fast.rollout.protocol import RolloutEngine, iter_weights
from recap_fast.training.distributed import (
    ALONE,
    World,
    check_divisors,
    is_launched_with_others,
    start_world,
)
from recap_fast.training.engine import start_engine
from recap_fast.training.packing import pack_update
from recap_fast.training.scored_rollouts import generate_and_score
from recap_fast.types import Prompt, SamplingSpec, SupervisedRow


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Runs the held-out rows of every source through the engine and the model."""

    config: TrainConfig
    policy: Policy
    engine: RolloutEngine
    scorer: RewardScorer
    stream: DataStream
    world: World = ALONE

    def run(self) -> dict[str, float]:
        """Returns eval/<source>/<metric>: mean rewards of greedy completions under their
        objectives' names (for `accuracy` that is pass@1), or `loss` and `token_accuracy`."""
        metrics: dict[str, float] = {}
        # Source by source, so that the prepared images of one are held at a time.
        for source in self.config.data.sources:
            held_out = self.stream.held_out(source.name)
            prompts = [row for row in held_out if isinstance(row, Prompt)]
            supervised = [row for row in held_out if isinstance(row, SupervisedRow)]
            if prompts:
                metrics |= self._generate_and_score(source.name, prompts)
            if supervised:
                loss, accuracy = self._supervised(supervised)
                metrics[f"eval/{source.name}/loss"] = loss
                metrics[f"eval/{source.name}/token_accuracy"] = accuracy
        return metrics

    def _generate_and_score(self, name: str, prompts: Sequence[Prompt]) -> dict[str, float]:
        limit = self.config.evaluation.max_new_tokens or self.config.rollout.max_new_tokens
        greedy = SamplingSpec(n=1, max_new_tokens=limit, temperature=0.0, seed=0)
        scored = generate_and_score(self.engine, self.scorer, prompts, greedy, world=self.world)
        assert scored is not None, "nothing stops an evaluation"
        rollouts, rewards = scored.rollouts, scored.rewards.values
        metrics = {}
        for k, objective in enumerate(self.config.objectives):
            present = rewards[~np.isnan(rewards[:, k]), k]
            if len(present):
                metrics[f"eval/{name}/{objective.name}"] = float(present.mean())
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        metrics[f"eval/{name}/completion_tokens"] = float(np.mean(lengths))
        return metrics

    @torch.no_grad()
    def _supervised(self, rows: Sequence[SupervisedRow]) -> tuple[float, float]:
        """Mean loss per target token (nats), and share of targets that are the model's first
        choice."""
        update = pack_update(
            [],
            np.empty((0, 1), np.float32),
            rows,
            [0] * len(rows),
            config=PolicyLossConfig(),
            max_tokens=self.config.training.max_tokens,
            attention=self.policy.attention,
            vision=self.policy.vision,
            rank=self.world.rank,
            size=self.world.size,
        )
        totals = torch.zeros(2, dtype=torch.float32, device=self.policy.device)
        with evaluating(self.policy.model):
            for batch in update.batches:
                totals += _loss_and_hits(self.policy, batch.to(self.policy.device))
        totals, _ = self.world.sum_and_max(totals, totals[:0])
        count = sum(len(row.token_ids) - row.num_prompt_tokens for row in rows)
        loss, hits = (totals / count).tolist()
        return loss, hits


def _loss_and_hits(policy: Policy, batch: PackedBatch) -> Tensor:
    """Sums over the batch's targets: [2], loss and first choices."""

    def count(hidden: Tensor) -> Tensor:
        head = policy.head
        found = linear_token_statistics(
            hidden, head.weight, batch.targets, bias=head.bias, logit_softcap=head.softcap
        )
        return torch.stack([-found.logprobs.sum(), found.is_top1.sum()])

    totals: Tensor = policy.score(batch, count)
    return totals


def evaluate_model(config: TrainConfig, path: str) -> dict[str, float]:
    """Evaluates one model on a configuration's held-out rows, outside of a training run.

    Where torchrun has started several processes, the model is sharded over them, each samples and
    scores a part of the prompts, and all return the same.

    Args:
        path: the model: what `ModelConfig.path` takes, or a checkpoint's folder.
    """
    world = start_world(config) if is_launched_with_others() else ALONE
    try:
        with world.failures_named():
            return _evaluate_model(config, path, world)
    finally:
        world.close()


def _evaluate_model(config: TrainConfig, path: str, world: World) -> dict[str, float]:
    world.stage = "evaluating"
    find_model = model_folder if world.size > 1 else resolve_model
    base = world.one_by_host(lambda: find_model(base_of(path)))
    path = path if is_adapter(path) else base
    if config.rollout.tensor_parallel_size > 1:
        if world.size == 1:
            check_divisors(config, "1 process", 1)
        check_tensor_parallel(config.rollout, load_shapes(base))
    tokenizer = load_tokenizer(base)
    images = load_image_encoder(base, config.data)
    stream = DataStream(config.data, tokenizer, config.seed, images)
    with RewardScorer(config.data.sources, config.objectives, config.rewards) as scorer:
        policy = world.together(lambda: load_sharded_policy(config.model, path, world.mesh))
        policy.check_length(config.max_sequence_tokens)
        logs = Path(config.run) / "logs"
        engine = start_engine(config, policy, base, tokenizer, images, world, logs=logs)
        try:
            engine.sync_weights(iter_weights(policy.model, engine.dtype))
            return Evaluator(config, policy, engine, scorer, stream, world).run()
        finally:
            engine.close()
