"""One optimizer step: forward and backward over the packed batches, clipping, AdamW.

From the upload of the batches to the end of the optimizer step nothing is read back from the
device: no `.item()`, no boolean indexing, no copy. What the host wants to know is returned as
tensors, for the one copy after the step. With `model.offload` the host waits for the gradients: it
is there that the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recap_fast.config import TrainConfig
from recap_fast.model.batch import PackedBatch
from recap_fast.model.policy import Policy
from recap_fast.model.reference import BasePolicy
from recap_fast.model.sharding import Sliceable, is_sharded, part_of, whole
from recap_fast.ops import (
    PolicyLossConfig,
    PolicyLossOutput,
    fused_linear_policy_loss,
    gradient_norms,
    linear_logprobs,
)
from recap_fast.rollout.mismatch import logprob_diff
from recap_fast.training.checkpoint import CheckpointError
from recap_fast.training.compact_adamw import make_optimizer, new_state
from recap_fast.training.distributed import ALONE, World
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
    gradient_norms: Tensor | None = None
    """[K] of the gradients at the hidden states, unweighted; NaN where objectives cancel. None
    beside an entropy bonus."""
    parameter_norms: Tensor | None = None
    """[K] of the gradients in the parameters before the step, where those were measured."""
    importance: Tensor | None = None
    """[4] of the policy tokens that were trained: their number, the sums of the importance weights
    and of their squares, and how many were truncated or masked. None without a cap."""


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
    importance = [item.importance for item in stats if item.importance is not None]

    return UpdateStats(
        objective_losses=mean("objective_losses", counts),
        clip_fraction=mean("clip_fraction", counts.where(~clip_fraction.isnan(), 0.0)),
        entropy=mean("entropy", tokens),
        kl=mean("kl", tokens),
        logprob_diff_mean=mean("logprob_diff_mean", tokens),
        logprob_diff_max=torch.where(tokens.any(), largest.where(tokens > 0, 0.0).max(), torch.nan),
        grad_norm=mean("grad_norm", trained),
        gradient_norms=_mean_norms([item.gradient_norms for item in stats]),
        skipped=torch.stack([item.skipped for item in stats]).sum(),
        importance=None if not importance else torch.stack(importance).sum(0),
    )


def _mean_norms(norms: Sequence[Tensor | None]) -> Tensor | None:
    """[K] mean over the updates in which the objective had a gradient; NaN where none had one."""
    found = [values for values in norms if values is not None]
    if not found:
        return None
    table = torch.stack(found)
    return table.where(table > 0, 0.0).sum(0) / (table > 0).sum(0)


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
        config: its `loss`, `optimizer`, `seed`, `rollout.temperature` and `training` are read.
        world: the processes that take the steps together.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | BasePolicy | None,
        config: TrainConfig,
        world: World = ALONE,
    ) -> None:
        self._world = world
        self.policy = policy
        self.reference = reference
        self.loss_config = replace(config.loss, temperature=config.rollout.temperature)
        self._settings = config.optimizer
        self._weighs_rollouts = config.loss.rollout_is_cap is not None
        # An importance weight, where there is one, is the whole ratio to the policy that sampled.
        self._has_old = config.training.updates_per_rollout > 1 and not self._weighs_rollouts
        self._num_objectives = len(config.objectives)
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        tower = [] if policy.vision is None else policy.vision.tower.parameters()
        self._tower = [p for p in tower if p.requires_grad]
        self._is_offloaded = self.parameters[0].device.type != policy.device.type
        self.optimizer = make_optimizer(self.parameters, config.optimizer, config.seed)

    def step(self, update: PackedUpdate, objective_weights: Tensor, lr: float) -> UpdateStats:
        """Runs one update that is already on the device.

        Args:
            objective_weights: [K] float32, lambda.
            lr: this step's learning rate.
        """
        stats = self._zero_stats(update)
        clippable = torch.zeros_like(stats.clip_fraction)
        pulls = self._zero_pulls(clippable)
        for batch in update.batches:
            output = self._backpropagate(batch, update, objective_weights, self.loss_config)
            self._add_up(output, batch, update, stats, clippable)
            if output.objective_gradients is not None and output.objective_squares is not None:
                pulls += torch.cat([output.objective_gradients, output.objective_squares], dim=1)
        stats, clippable, pulls = self._of_all_processes(stats, clippable, pulls)
        if len(pulls):  # judged by all batches: in one alone objectives often cancel
            stats.gradient_norms = gradient_norms(pulls[:, :-2], pulls[:, -2:])
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

    def measure_gradients(self, update: PackedUpdate) -> Tensor:
        """The norm of each objective's gradient in the parameters, without KL and entropy.

        [K] float32 on the device. A forward and backward pass for each; nothing else changes.
        """
        alone = replace(self.loss_config, kl_coef=0.0, entropy_coef=0.0)
        norms = []
        for weights in self._num_objectives * torch.eye(
            self._num_objectives, device=update.advantages.device
        ):
            for batch in update.batches:
                self._backpropagate(batch, update, weights, alone)
            norms.append(self._gradient_norm())
            self.optimizer.zero_grad(set_to_none=self._is_offloaded)
        return torch.stack(norms)

    @contextmanager
    def _without_idle_tower(self, update: PackedUpdate) -> Iterator[None]:
        """Takes the gradients of a vision tower that had no images away from AdamW, whose momentum
        would move the tower on: the buffers hold zeros, which are not "no gradient"."""
        idle = [] if update.has_images else self._tower
        buffers = [parameter.grad for parameter in idle]
        for parameter in idle:
            parameter.grad = None
        yield
        for parameter, buffer in zip(idle, buffers, strict=True):
            parameter.grad = buffer

    def _head_gradient(self) -> Tensor | None:
        """Where the loss adds the gradient of the head, [V, H] float32; None for a frozen head, and
        for one in shards, which FSDP sums.

        A tied head's is the embedding's too, and autograd adds that part.
        """
        if is_sharded(self.policy.model):
            return None
        weight = self.policy.head.weight
        if weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad

    def _backpropagate(
        self, batch: PackedBatch, update: PackedUpdate, weights: Tensor, config: PolicyLossConfig
    ) -> PolicyLossOutput:
        ref_logprobs = self._reference_logprobs(batch)

        def loss(hidden: Tensor) -> tuple[Tensor, PolicyLossOutput]:
            head = self.policy.head
            output = fused_linear_policy_loss(
                hidden,
                head.weight,
                batch.targets,
                sequence_ids=batch.sequence_ids,
                advantages=update.advantages,
                objective_weights=weights,
                token_objectives=batch.token_objectives,
                old_logprobs=batch.rollout_logprobs if self._has_old else None,
                ref_logprobs=ref_logprobs,
                rollout_logprobs=batch.rollout_logprobs,
                bias=head.bias,
                denominators=update.denominators,
                kl_denominator=update.kl_denominator,
                weight_grad=self._head_gradient(),
                config=replace(config, logit_softcap=head.softcap),
                objective_gradients=config.entropy_coef == 0,
            )
            return output.loss, output

        found: tuple[Tensor, PolicyLossOutput] = self.policy.score(batch, loss)
        total, output = found
        total.backward()
        return output

    def _add_up(
        self,
        output: PolicyLossOutput,
        batch: PackedBatch,
        update: PackedUpdate,
        stats: UpdateStats,
        clippable: Tensor,
    ) -> None:
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
        if stats.importance is not None:
            stats.importance += _importance_sums(output, is_policy)
        if output.kl is not None:
            stats.kl += torch.where(is_policy, output.kl, 0.0).sum() / policy_tokens

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> Tensor | None:
        if self.reference is None:
            return None
        reference = self.reference

        def logprobs(hidden: Tensor) -> Tensor:
            head = reference.head
            found, _ = linear_logprobs(
                hidden,
                head.weight,
                batch.targets,
                bias=head.bias,
                temperature=self.loss_config.temperature,
                logit_softcap=head.softcap,
            )
            return found

        found: Tensor = reference.score(batch, logprobs)
        return found

    @torch.no_grad()
    def _apply(self, lr: float, stats: UpdateStats) -> None:
        norm = self._gradient_norm()
        skipped = (~torch.isfinite(norm)).to(torch.float32)
        stats.grad_norm.copy_(norm)
        stats.skipped.copy_(skipped)
        # AdamW's kernel divides by grad_scale as it reads the gradients and skips the step where
        # found_inf is 1: clipping and the check cost no pass and no sync of their own.
        scale = (norm / self._settings.max_grad_norm).clamp(min=1.0)
        vars(self.optimizer).update(grad_scale=scale, found_inf=skipped)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        # Buffers stay: freed and made again beside batches of other sizes they fragment memory.
        # Not on the host: FSDP adds to what is there in step with the GPU, and only assigns ahead.
        self.optimizer.zero_grad(set_to_none=self._is_offloaded)

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
        return norm.to(gradients[0].device)  # offloaded ones are on the host, and waited for

    def _zero_pulls(self, like: Tensor) -> Tensor:
        """[K, H + 2] for the loss's `objective_gradients` and `objective_squares`; [0, H + 2] if
        none are asked."""
        k = 0 if self.loss_config.entropy_coef else self._num_objectives
        return like.new_zeros(k, self.policy.head.weight.shape[1] + 2)

    def _of_all_processes(
        self, stats: UpdateStats, clippable: Tensor, pulls: Tensor
    ) -> tuple[UpdateStats, Tensor, Tensor]:
        """Each process has summed its own part; one collective."""
        scalars = torch.stack([stats.entropy, stats.kl, stats.logprob_diff_mean])
        importance = scalars[:0] if stats.importance is None else stats.importance
        parts = [
            stats.objective_losses, stats.clip_fraction, clippable, scalars, importance,
            pulls.flatten(),
        ]  # fmt: skip
        sums, largest = self._world.sum_and_max(torch.cat(parts), stats.logprob_diff_max[None])
        sizes = [len(part) for part in parts]
        losses, clipped, clippable, scalars, importance, flat = sums.split(sizes)
        entropy, kl, mean = scalars.unbind()
        return replace(
            stats, objective_losses=losses, clip_fraction=clipped, entropy=entropy, kl=kl,
            logprob_diff_mean=mean, logprob_diff_max=largest[0],
            importance=None if stats.importance is None else importance,
        ), clippable, flat.view_as(pulls)  # fmt: skip

    def _zero_stats(self, update: PackedUpdate) -> UpdateStats:
        device = update.advantages.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        k = self._num_objectives
        stats = UpdateStats(zeros(k), zeros(k), *(zeros() for _ in range(6)))
        stats.importance = zeros(4) if self._weighs_rollouts else None
        return stats

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's state by parameter name, for checkpoints; empty before the first step."""
        for name, parameter in self.policy.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", value

    def load_named_state(self, state: Mapping[str, Sliceable]) -> None:
        """Takes back what `named_state` gave, whole.

        Raises:
            CheckpointError: it was kept under another `optimizer.state`.
        """
        by_name = dict(self.policy.model.named_parameters())
        kinds: dict[str, set[str]] = {}
        for key in state:
            kind, _, name = key.partition("/")
            kinds.setdefault(name, set()).add(kind)
        for name, found in kinds.items():
            wanted = new_state(by_name[name], self._settings.state)
            loaded: dict[str, Tensor] = {}
            if found == wanted.keys():
                loaded = {k: part_of(state[f"{k}/{name}"], like) for k, like in wanted.items()}
            if not loaded or any(t.dtype != wanted[kind].dtype for kind, t in loaded.items()):
                raise CheckpointError(
                    f"the checkpoint's AdamW moments are not those of optimizer.state = "
                    f"{self._settings.state} ({name} has {_described(state, name)}): resume with "
                    f"the optimizer.state that the run began with"
                )
            self.optimizer.state[by_name[name]] = loaded


def _importance_sums(output: PolicyLossOutput, is_policy: Tensor) -> Tensor:
    """`UpdateStats.importance` of one pass, whose policy tokens are marked [N]."""
    weights, bounded = output.importance_weights, output.importance_bounded
    assert weights is not None
    assert bounded is not None
    sums = (is_policy.sum(), weights.sum(), weights.square().sum(), bounded.sum())
    return torch.stack([value.float() for value in sums])


def _described(state: Mapping[str, Sliceable], name: str) -> str:
    moment = state.get(f"exp_avg/{name}")
    return "none" if moment is None else str(moment[...].dtype).removeprefix("torch.")
