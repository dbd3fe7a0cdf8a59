"""Evaluation on held-out rows: greedy pass@1 for rl sources, token loss for sft sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recap_fast.config import TrainConfig
from recap_fast.data.images import load_image_encoder
from recap_fast.data.mix import DataStream
from recap_fast.model.batch import PackedBatch
from recap_fast.model.policy import Head, Policy, load_policy, load_tokenizer, resolve_model
from recap_fast.model.train_mode import evaluating
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.rewards.scorer import RewardScorer
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.protocol import RolloutEngine, iter_weights
from recap_fast.training.packing import pack_update
from recap_fast.training.scored_rollouts import generate_and_score
from recap_fast.types import Prompt, SamplingSpec, SupervisedRow

_ROWS_PER_CHUNK = 1024
"""Rows of logits held at a time: 1024 x 152k float32 is 0.6 GB."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Runs the held-out rows of every source through the engine and the model."""

    config: TrainConfig
    policy: Policy
    engine: RolloutEngine
    scorer: RewardScorer
    stream: DataStream

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
        scored = generate_and_score(self.engine, self.scorer, prompts, greedy)
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
        )
        totals = torch.zeros(2, dtype=torch.float32, device=self.policy.device)
        with evaluating(self.policy.model):
            for batch in update.batches:
                totals += _loss_and_hits(self.policy, batch.to(self.policy.device))
        count = sum(len(row.token_ids) - row.num_prompt_tokens for row in rows)
        loss, hits = (totals / count).tolist()
        return loss, hits


def _loss_and_hits(policy: Policy, batch: PackedBatch) -> Tensor:
    """Sums over the batch's targets: [2], loss and first choices."""
    head = policy.head
    weight = head.weight.to(policy.compute_dtype)
    totals = torch.zeros(2, dtype=torch.float32, device=policy.device)
    chunks = zip(
        policy.hidden(batch).split(_ROWS_PER_CHUNK),
        batch.targets.split(_ROWS_PER_CHUNK),
        strict=True,
    )
    for hidden, targets in chunks:
        logits = _logits(hidden, weight, head)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        totals += torch.stack([loss, (logits.argmax(-1) == targets).sum()])
    return totals


def _logits(hidden: Tensor, weight: Tensor, head: Head) -> Tensor:
    logits = (hidden @ weight.T).float()
    if head.bias is not None:
        logits += head.bias.float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def evaluate_model(config: TrainConfig, path: str) -> dict[str, float]:
    """Evaluates one model on a configuration's held-out rows, outside of a training run.

    Args:
        path: the model: what `ModelConfig.path` takes, or a checkpoint's folder.
    """
    path = resolve_model(path)
    tokenizer = load_tokenizer(path)
    images = load_image_encoder(path, config.data)
    stream = DataStream(config.data, tokenizer, config.seed, images)
    with RewardScorer(config.data.sources, config.objectives, config.rewards) as scorer:
        policy = load_policy(config.model, path)
        policy.check_length(config.max_sequence_tokens)
        engine = make_engine(
            config.rollout,
            model=policy.model,
            model_path=path,
            tokenizer=tokenizer,
            max_model_len=config.max_rollout_tokens,
            seed=config.seed,
            device=policy.device,
            image_pixels=images.pixel_budget if images else None,
        )
        try:
            engine.sync_weights(iter_weights(policy.model))
            return Evaluator(config, policy, engine, scorer, stream).run()
        finally:
            engine.close()
