"""One optimizer step: forward and backward over the packed batches, clipping, AdamW.

From the upload of the batches to the end of the optimizer step nothing is read back from the
device: no `.item()`, no boolean indexing, no copy. What the host wants to know is returned as
tensors, for the one copy after the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recap_fast.config import TrainConfig
from recap_fast.model.batch import PackedBatch
from recap_fast.model.policy import Policy
from recap_fast.ops import fused_linear_policy_loss, linear_logprobs
from recap_fast.rollout.mismatch import logprob_diff
from recap_fast.training.packing import PackedUpdate


@dataclass(slots=True)
class UpdateStats:
    """What an optimizer step leaves on the device. All float32; NaN: nothing to measure."""

    objective_losses: Tensor  # [K] unweighted; NaN where the update has nothing of the objective
    clip_fraction: Tensor  # [K] share of the objective's policy tokens that were trained
    entropy: Tensor  # [] mean over the policy tokens that were trained
    kl: Tensor  # [] the same; NaN without a reference
    logprob_diff_mean: Tensor  # [] mean |trainer - engine| over the policy tokens that were trained
    logprob_diff_max: Tensor  # []
    grad_norm: Tensor  # [] before clipping; NaN where nothing was trained
    skipped: Tensor  # [] 1 where the gradient was not finite and the step was skipped


def combine_stats(stats: Sequence[UpdateStats], updates: Sequence[PackedUpdate]) -> UpdateStats:
    """Figures of all updates of a step: means over tokens (or sequences), not over updates."""
    if len(stats) == 1:
        return stats[0]
    counts = torch.stack([update.counts for update in updates])  # [U, K]
    device = counts.device

    def per_update(values: Iterable[float]) -> Tensor:
        # Filled on the device: a list would be copied there, which waits.
        return torch.stack([torch.full((), float(value), device=device) for value in values])

    tokens = per_update(update.num_policy_tokens for update in updates)
    trained = per_update(bool(update.batches) for update in updates)

    def mean(name: str, weights: Tensor) -> Tensor:
        values = torch.stack([getattr(item, name) for item in stats])
        return torch.where(weights > 0, values * weights, 0.0).sum(0) / weights.sum(0)

    clip_fraction = torch.stack([item.clip_fraction for item in stats])
    largest = torch.stack([item.logprob_diff_max for item in stats])

    return UpdateStats(
        objective_losses=mean("objective_losses", counts),
        clip_fraction=mean("clip_fraction", counts.where(~clip_fraction.isnan(), 0.0)),
        entropy=mean("entropy", tokens),
        kl=mean("kl", tokens),
        logprob_diff_mean=mean("logprob_diff_mean", tokens),
        logprob_diff_max=torch.where(tokens.any(), largest.where(tokens > 0, 0.0).max(), torch.nan),
        grad_norm=mean("grad_norm", trained),
        skipped=torch.stack([item.skipped for item in stats]).sum(),
    )


def learning_rate(step: int, total: int, peak: float, warmup_fraction: float) -> float:
    """Linear warm-up to `peak`, then linear decay to 0 at `total`. `step` counts from 0."""
    warmup = max(1, round(warmup_fraction * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(1, total - warmup)


class PolicyOptimizer:
    """Turns packed updates into optimizer steps.

    Args:
        policy: the trained model; its float32 parameters are the master weights.
        reference: frozen model for the KL term, or None.
        config: its `loss`, `optimizer`, `rollout.temperature` and `training` are read.
    """

    def __init__(self, policy: Policy, reference: Policy | None, config: TrainConfig) -> None:
        self.policy = policy
        self.reference = reference
        self.loss_config = replace(config.loss, temperature=config.rollout.temperature)
        self._settings = config.optimizer
        self._is_off_policy = config.training.updates_per_rollout > 1
        self._num_objectives = len(config.objectives)
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        tower = [] if policy.vision is None else policy.vision.tower.parameters()
        self._tower = [p for p in tower if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )

    def step(self, update: PackedUpdate, objective_weights: Tensor, lr: float) -> UpdateStats:
        """Runs one update that is already on the device.

        Args:
            objective_weights: [K] float32, lambda.
            lr: this step's learning rate.
        """
        stats = self._zero_stats(update)
        clippable = torch.zeros_like(stats.clip_fraction)
        for batch in update.batches:
            self._accumulate(batch, update, objective_weights, stats, clippable)
        stats.clip_fraction /= clippable  # 0 / 0 of an objective that no token was trained on
        stats.objective_losses = torch.where(update.counts > 0, stats.objective_losses, torch.nan)
        if not update.num_policy_tokens:
            for value in (stats.entropy, stats.kl, stats.logprob_diff_mean, stats.logprob_diff_max):
                value.fill_(torch.nan)
        if self.reference is None:
            stats.kl.fill_(torch.nan)
        if update.batches:
            with self._without_idle_tower(update):
                self._apply(lr, stats)
        else:
            stats.grad_norm.fill_(torch.nan)
        return stats

    @contextmanager
    def _without_idle_tower(self, update: PackedUpdate) -> Iterator[None]:
        """Takes the gradients of a vision tower that had no images away from AdamW, whose momentum
        would move the tower on: the buffers hold zeros, which are not "no gradient"."""
        idle = [] if any(batch.images is not None for batch in update.batches) else self._tower
        buffers = [parameter.grad for parameter in idle]
        for parameter in idle:
            parameter.grad = None
        yield
        for parameter, buffer in zip(idle, buffers, strict=True):
            parameter.grad = buffer

    def _head_gradient(self) -> Tensor | None:
        """Where the loss adds the gradient of the head, [V, H] float32; None for a frozen head.

        A tied head's is the embedding's too, and autograd adds that part.
        """
        weight = self.policy.head.weight
        if weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad

    def _accumulate(
        self,
        batch: PackedBatch,
        update: PackedUpdate,
        weights: Tensor,
        stats: UpdateStats,
        clippable: Tensor,
    ) -> None:
        head = self.policy.head
        output = fused_linear_policy_loss(
            self.policy.hidden(batch),
            head.weight,
            batch.targets,
            sequence_ids=batch.sequence_ids,
            advantages=update.advantages,
            objective_weights=weights,
            token_objectives=batch.token_objectives,
            old_logprobs=batch.rollout_logprobs if self._is_off_policy else None,
            ref_logprobs=self._reference_logprobs(batch),
            rollout_logprobs=batch.rollout_logprobs,
            bias=head.bias,
            denominators=update.denominators,
            kl_denominator=update.kl_denominator,
            weight_grad=self._head_gradient(),
            config=replace(self.loss_config, logit_softcap=head.softcap),
        )
        output.loss.backward()
        is_policy = batch.token_objectives < 0
        # Sums here; the counts are known on the host and divide at the end.
        share = is_policy.sum(dtype=torch.float32) / max(1, update.num_policy_tokens)
        mean, largest = logprob_diff(output.logprobs, batch.rollout_logprobs, is_policy)
        stats.objective_losses += output.objective_losses
        present = ~torch.isnan(update.advantages.index_select(0, batch.sequence_ids))  # [N, K]
        applied = (present & is_policy[:, None]).sum(0)
        stats.clip_fraction += output.clip_fraction * applied
        clippable += applied
        stats.logprob_diff_mean += mean * share
        torch.maximum(stats.logprob_diff_max, largest, out=stats.logprob_diff_max)
        policy_tokens = max(1, update.num_policy_tokens)
        stats.entropy += torch.where(is_policy, output.entropy, 0.0).sum() / policy_tokens
        if output.kl is not None:
            stats.kl += torch.where(is_policy, output.kl, 0.0).sum() / policy_tokens

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> Tensor | None:
        if self.reference is None:
            return None
        head = self.reference.head
        hidden = self.reference.hidden(batch)
        logprobs, _ = linear_logprobs(
            hidden,
            head.weight,
            batch.targets,
            bias=head.bias,
            temperature=self.loss_config.temperature,
            logit_softcap=head.softcap,
        )
        return logprobs

    @torch.no_grad()
    def _apply(self, lr: float, stats: UpdateStats) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        stats.grad_norm.copy_(norm)
        stats.skipped.copy_(~torch.isfinite(norm))
        # AdamW's fused kernel divides by grad_scale as it reads the gradients and skips the step
        # where found_inf is 1: clipping and the check cost no pass and no sync of their own.
        scale = (norm / self._settings.max_grad_norm).clamp(min=1.0)
        vars(self.optimizer).update(grad_scale=scale, found_inf=stats.skipped)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        # Buffers stay: freed and made again beside batches of other sizes they fragment memory.
        self.optimizer.zero_grad(set_to_none=False)

    def _zero_stats(self, update: PackedUpdate) -> UpdateStats:
        device = update.advantages.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        k = self._num_objectives
        return UpdateStats(zeros(k), zeros(k), *(zeros() for _ in range(6)))

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's state by parameter name, for checkpoints; empty before the first step."""
        for name, parameter in self.policy.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", value

    def load_named_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `named_state` gave."""
        by_name = dict(self.policy.model.named_parameters())
        for key, value in state.items():
            kind, _, name = key.partition("/")
            parameter = by_name[name]
            self.optimizer.state[parameter][kind] = value.to(parameter.device)
