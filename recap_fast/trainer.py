"""The training loop: GRPO with replay, every objective reweighted by RECAP.

One step, in order: draw rows; sample a group of rollouts for every prompt; score them; weigh the
objectives (rewards of this step, supervised losses of the step before: theirs are known only
after the forward pass); pack rollouts and supervised rows into one flat batch; one forward and
backward pass over it; AdamW; push the weights into the rollout engine; write metrics.

Simplifications that are deliberate: rollouts and training take turns on one device; the policy is
the one that sampled (ratio 1) unless `training.updates_per_rollout` is above 1, and then the
sampled log-probs stand for the old policy's.

    recap-fast train examples/smollm2-cpu.yaml
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recap_fast.config import ConfigError, TrainConfig, save_config
from recap_fast.data.images import load_image_encoder
from recap_fast.data.mix import DataStream
from recap_fast.model.policy import load_policy, load_tokenizer, resolve_model
from recap_fast.model.upload import upload
from recap_fast.ops import group_advantages
from recap_fast.report.metrics import MetricsWriter, ProgressView
from recap_fast.rewards.scorer import RewardScorer
from recap_fast.reweighting.recap import Reweighter, make_reweighter
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.mismatch import MismatchGuard, verify_sync
from recap_fast.rollout.protocol import iter_weights
from recap_fast.training.checkpoint import (
    CheckpointError,
    TrainerState,
    check_savable,
    load_state,
    save_checkpoint,
)
from recap_fast.training.determinism import determinism, prepare_determinism
from recap_fast.training.evaluate import Evaluator
from recap_fast.training.optimization import (
    PolicyOptimizer,
    UpdateStats,
    combine_stats,
    learning_rate,
)
from recap_fast.training.packing import PackedUpdate, pack_update
from recap_fast.training.run_folder import clear_folder, lock_folder, prepare_folder
from recap_fast.training.scored_rollouts import generate_and_score
from recap_fast.training.step_metrics import (
    column_deviations,
    column_means,
    device_metrics,
    host_metrics,
    learnt_something,
)
from recap_fast.training.stop_signals import collect_stop_signals
from recap_fast.types import (
    Prompt,
    RewardTable,
    Rollout,
    SamplingSpec,
    StepRows,
    UserError,
    WeightSyncError,
)

logger = logging.getLogger(__name__)

_SEED_STRIDE = 1_000_003
"""Prime distance between the sampling seeds of two runs, so that their steps share none."""

_VERIFIED_PROMPTS = 4


class Trainer:
    """Trains one model from a configuration, into the run folder that it names.

    Args:
        config: what `load_config` returned.
        resume: continue from the newest checkpoint in the run folder.
        overwrite: remove what an earlier run left in the folder.

    Raises:
        UserError: the configuration, model, data, rewards or run folder cannot be used.
    """

    def __init__(
        self, config: TrainConfig, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.config = config
        if config.training.deterministic:
            prepare_determinism()
        self.run_dir = Path(config.run)
        self._checkpoints = self.run_dir / "checkpoints"
        checkpoint = prepare_folder(config, self.run_dir, resume, overwrite)
        self._lock = lock_folder(self.run_dir)
        state = load_state(checkpoint) if checkpoint else None
        self.step = state.step if state else 0
        self._names = [objective.name for objective in config.objectives]

        # What the user can get wrong comes first, what takes long comes last.
        model_path = resolve_model(config.model.path)
        self.tokenizer = load_tokenizer(model_path)
        self.images = load_image_encoder(model_path, config.data)
        self.stream = DataStream(config.data, self.tokenizer, config.seed, self.images)
        self.scorer = RewardScorer(config.data.sources, config.objectives, config.rewards)
        logger.info("loading %s", checkpoint or config.model.path)
        self.policy = load_policy(config.model, str(checkpoint or model_path))
        reference = None
        if config.model.reference is not None:
            initial = config.model.reference == "initial"
            path = model_path if initial else resolve_model(config.model.reference)
            reference = load_policy(
                config.model, path, trainable=False, attention=self.policy.attention.name
            )
            reference.check_length(config.max_sequence_tokens)
        self.policy.check_length(config.max_sequence_tokens)
        check_savable(self._checkpoints, self.policy.model, self.tokenizer, self.images)
        self.optimizer = PolicyOptimizer(self.policy, reference, config)
        self.reweighter = _build_reweighter(config, self.policy.device)
        supervised = [objective.kind == "loss" for objective in config.objectives]
        self._is_supervised = torch.tensor(supervised, device=self.policy.device)
        # [K] of the step before; NaN for rewards, and where that step had no row of the objective.
        self._losses = torch.full(
            (len(self._names),), torch.nan, dtype=torch.float32, device=self.policy.device
        )
        logger.info("starting the rollout engine (%s)", config.rollout.engine)
        self.engine = make_engine(
            config.rollout,
            model=self.policy.model,
            model_path=model_path,
            tokenizer=self.tokenizer,
            max_model_len=config.max_rollout_tokens,
            seed=config.seed,
            device=self.policy.device,
            image_pixels=self.images.pixel_budget if self.images else None,
        )
        self.guard = MismatchGuard(config.rollout, self.engine, self.policy.model)
        self.evaluator = Evaluator(config, self.policy, self.engine, self.scorer, self.stream)
        if state:
            self._restore(state)
        self.engine.sync_weights(iter_weights(self.policy.model))
        self._verify_sync()
        if overwrite:
            clear_folder(self.run_dir)
        save_config(config, self.run_dir / "config.yaml")
        self.metrics = MetricsWriter(self.run_dir, config, start_step=self.step)
        self._first_step = self.step
        self._has_learnt = self._owes_checkpoint = False

    def _verify_sync(self) -> None:
        """Compares a few greedy tokens' log-probs before the first step is paid for."""
        held_out = [
            [row for row in self.stream.held_out(source.name) if isinstance(row, Prompt)]
            for source in self.config.data.sources
        ]
        # A source with images, where there is one, shows the weights of the vision tower too.
        held_out.sort(key=lambda rows: not any(row.images for row in rows))
        prompts = next(filter(None, held_out), [])[:_VERIFIED_PROMPTS]
        if prompts:
            verify_sync(self.engine, self.policy.model, prompts)

    def train(self) -> bool:
        """Runs the remaining steps. Returns False when SIGTERM or Ctrl-C ended the run early, with
        a checkpoint written."""
        steps = self.config.training.steps
        with (
            collect_stop_signals("saving and stopping") as stop,
            ProgressView(self.config, self.step) as view,
        ):
            if self.step == 0 and self.config.evaluation.before:
                self._log(view, {"step": 0} | self.evaluator.run())
            while self.step < steps and not stop:
                cursor, step = self.stream.state_dict(), self.step
                try:
                    row = self._train_step(stop)
                    if row is None:  # stopped before the optimizer step: nothing has changed
                        self.stream.load_state_dict(cursor)
                        break
                    try:
                        if self._is_due(self.config.evaluation.every, self.config.evaluation.after):
                            row |= self.evaluator.run()
                    finally:
                        self._log(view, row)
                except (UserError, WeightSyncError):
                    if self.step == step:
                        self.stream.load_state_dict(cursor)
                    if self.step > 0 and (path := self._try_to_save()):
                        logger.error("saved what was learnt so far: %s", path)
                    raise
                if self._owes_checkpoint or self._is_due(self.config.checkpoint.every, True):
                    self._owes_checkpoint = self._try_to_save() is None
        self._summarise_losses()
        finished = self.step >= steps
        if finished and self._owes_checkpoint:
            self.save()  # raises what stands in the way
        if not finished:
            path = self.save()
            logger.warning("stopped after step %d; continue with --resume (%s)", self.step, path)
        return finished

    def _train_step(self, stop: Sequence[int]) -> dict[str, Any] | None:
        started = time.perf_counter()
        rows = self.stream.next_step()
        scored = generate_and_score(self.engine, self.scorer, rows.prompts, self._sampling(), stop)
        if scored is None:
            return None
        sampled = time.perf_counter()
        rollouts, rewards = scored.rollouts, scored.rewards
        advantages = self._advantages(rollouts, rewards)
        updates = self._pack(rows, rollouts, advantages)
        lr = learning_rate(
            self.step,
            self.config.training.steps,
            self.config.optimizer.learning_rate,
            self.config.optimizer.warmup_fraction,
        )
        stats = self._learn(updates, rewards, lr)
        from_device = device_metrics(self._names, self.reweighter, stats)
        self.step += 1
        trained = time.perf_counter()
        self.engine.sync_weights(iter_weights(self.policy.model))
        synced = time.perf_counter()

        self.metrics.write_rollouts(self.step, rollouts, rewards)
        tokens = sum(len(r.prompt.token_ids) + len(r.token_ids) for r in rollouts)
        tokens += sum(len(row.token_ids) for row in rows.supervised)
        return {
            "step": self.step,
            "lr": lr,
            **from_device,
            **host_metrics(self.config.objectives, rollouts, rewards, updates, self.stream.skipped),
            "time/rollout": scored.rollout_seconds,
            "time/reward": scored.reward_seconds,
            "time/train": trained - sampled,
            "time/sync": synced - trained,
            "time/total": synced - started,
            "tokens_per_second": tokens / (synced - started),
        }

    def _sampling(self) -> SamplingSpec:
        settings = self.config.rollout
        return SamplingSpec(
            n=settings.group_size,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=self.config.seed * _SEED_STRIDE + self.step,
        )

    def _advantages(self, rollouts: Sequence[Rollout], rewards: RewardTable) -> np.ndarray:
        """[S, K] float32; NaN where the objective is absent."""
        groups = torch.tensor([r.group for r in rollouts], dtype=torch.int64)
        settings = self.config.advantages
        table = group_advantages(
            torch.from_numpy(rewards.values), groups, normalize=settings.normalize, eps=settings.eps
        ).numpy()
        return np.where(np.isnan(rewards.values), np.float32(np.nan), table)

    def _pack(
        self, rows: StepRows, rollouts: Sequence[Rollout], advantages: np.ndarray
    ) -> list[PackedUpdate]:
        """One packed update per optimizer step; groups and supervised rows are dealt in turn."""
        count = self.config.training.updates_per_rollout
        objective_of = {s.name: s.objective for s in self.config.data.sources}
        updates = []
        for turn in range(count):
            mine = [i for i, r in enumerate(rollouts) if r.group % count == turn]
            replay = rows.supervised[turn::count]
            updates.append(
                pack_update(
                    [rollouts[i] for i in mine],
                    advantages[mine],
                    replay,
                    [self._names.index(objective_of[row.source]) for row in replay],
                    config=self.config.loss,
                    max_tokens=self.config.training.max_tokens,
                    attention=self.policy.attention,
                    vision=self.policy.vision,
                )
            )
        return updates

    def _learn(
        self, updates: Sequence[PackedUpdate], rewards: RewardTable, lr: float
    ) -> UpdateStats:
        """Uploads the step, weighs the objectives and updates the parameters. Nothing in here waits
        for the device: what comes of it stays there."""
        weights = self._reweigh(rewards)
        uploaded = [update.to(self._losses.device) for update in updates]
        with determinism(self.config.training.deterministic):
            stats = combine_stats(
                [self.optimizer.step(update, weights, lr) for update in uploaded], uploaded
            )
        self._losses = torch.where(self._is_supervised, stats.objective_losses, torch.nan)
        return stats

    def _reweigh(self, rewards: RewardTable) -> Tensor:
        """lambda [K] for this step, from its rewards and from the losses of the step before."""
        device = self._losses.device
        means = upload(torch.from_numpy(column_means(rewards.values)), device)
        values = torch.where(self._is_supervised, self._losses, means)
        deviations = None
        if self.reweighter.reads_deviations:
            deviations = upload(torch.from_numpy(column_deviations(rewards.values)), device)
        return self.reweighter.update(values, deviations=deviations)

    def _log(self, view: ProgressView, row: Mapping[str, Any]) -> None:
        self._has_learnt |= learnt_something(row)
        self.metrics.write(row)
        view.update(row)
        if row.get("train/policy_tokens"):
            self.guard.check(
                row["rollout/logprob_diff_mean"], row["rollout/logprob_diff_max"], row["step"]
            )

    def _summarise_losses(self) -> None:
        """Says at the end what was skipped and what failed, with the first error of each kind."""
        if self.step > self._first_step and not self._has_learnt:
            logger.warning(
                "no step of %d learnt anything: in every group each reward was absent or the same "
                "for all rollouts, or the gradients were not finite",
                self.step - self._first_step,
            )
        for what, count in self.stream.skipped.items():
            logger.warning("skipped rows: %s: %d", what, count)
        for what, count in self.stream.noted.items():
            logger.warning("rows used in part: %s: %d", what, count)
        for what, count in self.scorer.failures.items():
            logger.warning("failed rewards: %s: %d", what, count)
        for what, count in self.scorer.unreadable.items():
            logger.warning("answers that could not be read, worth 0: %s: %d", what, count)
        for what, text in self.scorer.first_errors.items():
            logger.warning("first error of %s: %s", what, text)

    def _is_due(self, every: int, at_end: bool) -> bool:
        last = self.step == self.config.training.steps
        return (last and at_end) or (not last and every > 0 and self.step % every == 0)

    def _try_to_save(self) -> Path | None:
        """Like `save`, but a disk that is full now must not end what can be saved a step later."""
        try:
            return self.save()
        except CheckpointError as error:
            logger.error("%s; it will be tried again", error)
            return None

    def save(self) -> Path:
        """Writes a checkpoint of the present step and returns its folder."""
        tensors = {f"optimizer/{name}": t for name, t in self.optimizer.named_state()}
        tensors |= {f"reweighter/{k}": t for k, t in self.reweighter.state_dict().items()}
        tensors |= {"losses": self._losses, "rng/cpu": torch.get_rng_state()}
        if self.policy.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        state = TrainerState(self.step, self.stream.state_dict(), tensors)
        return save_checkpoint(
            self._checkpoints,
            state,
            self.policy.model,
            self.tokenizer,
            keep=self.config.checkpoint.keep,
            images=self.images,
        )

    def _restore(self, state: TrainerState) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {
                key.removeprefix(prefix): tensor
                for key, tensor in state.tensors.items()
                if key.startswith(prefix)
            }

        self.optimizer.load_named_state(part("optimizer/"))
        self.reweighter.load_state_dict(part("reweighter/"))
        self._losses = state.tensors["losses"].to(self.policy.device)
        torch.set_rng_state(state.tensors["rng/cpu"])
        if "rng/cuda" in state.tensors and self.policy.device.type == "cuda":
            torch.cuda.set_rng_state(state.tensors["rng/cuda"])
        self.stream.load_state_dict(state.data)

    def close(self) -> None:
        """Stops the workers and the engine."""
        self.metrics.close()
        self.scorer.close()
        self.engine.close()
        self._lock.close()


def _build_reweighter(config: TrainConfig, device: torch.device) -> Reweighter:
    """Turns what the user names by objective into lists in the objectives' order."""
    arguments = dict(config.reweighting.parameters)
    names = [objective.name for objective in config.objectives]
    for reserved in ("signals", "device", "num_objectives"):
        if reserved in arguments:
            raise ConfigError(f"reweighting.parameters.{reserved}: not a parameter of the method")
    if isinstance(arguments.get("weights"), dict):
        given = arguments["weights"]
        if set(given) != set(names):
            raise ConfigError(
                f"reweighting.parameters.weights: wanted one for each of {names}, got {list(given)}"
            )
        arguments["weights"] = [given[name] for name in names]
    arguments["signals"] = [
        config.reweighting.signals.get(o.name, o.kind) for o in config.objectives
    ]
    try:
        return make_reweighter(config.reweighting.method, len(names), device=device, **arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"reweighting: {error}") from None
