"""The training loop: GRPO with replay, every objective reweighted by RECAP.

One step, in order: draw rows; sample a group of rollouts for every prompt; score them, and sample
others for groups without a signal, if asked to; weigh the objectives (rewards of this step,
supervised losses of the step before: theirs are known only after the forward pass); pack rollouts
and supervised rows into one flat batch; one forward and backward pass over it; AdamW; push the
weights into the rollout engine; write metrics.

Simplifications that are deliberate: rollouts and training take turns on one device; the policy is
the one that sampled (ratio 1) unless `training.updates_per_rollout` is above 1, and then the
sampled log-probs stand for the old policy's, or with `loss.rollout_is_cap` an importance weight
corrects for the difference.

    recap-fast train examples/smollm2-cpu.yaml
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from recap_fast.config import ConfigError, TrainConfig, save_config
from recap_fast.data.images import load_image_encoder
from recap_fast.data.mix import DataStream
from recap_fast.model.checkpointing import checkpoint_layers
from recap_fast.model.hub import model_folder
from recap_fast.model.model_path import resolve_model
from recap_fast.model.policy import Policy, load_tokenizer
from recap_fast.model.reference import BasePolicy
from recap_fast.model.shapes import load_shapes
from recap_fast.model.sharded_load import load_sharded_policy
from recap_fast.model.upload import upload
from recap_fast.ops import combined_advantages, group_advantages
from recap_fast.report.metrics import MetricsWriter, ProgressView
from recap_fast.rewards.scorer import RewardScorer
from recap_fast.reweighting.balance import GradientBalance
from recap_fast.reweighting.recap import Reweighter, make_reweighter
from recap_fast.rollout.factory import check_tensor_parallel
from recap_fast.rollout.mismatch import MismatchGuard, verify_sync
from recap_fast.rollout.protocol import SamplingStoppedError, Stoppable, iter_weights
from recap_fast.training.checkpoint import (
    CheckpointError,
    StoredState,
    StoredTensor,
    TrainerState,
    load_state,
    with_what_is_left,
)
from recap_fast.training.determinism import (
    determinism,
    generator_states,
    prepare_determinism,
    restore_generators,
)
from recap_fast.training.distributed import start_world
from recap_fast.training.engine import start_engine
from recap_fast.training.environment import check_environments
from recap_fast.training.evaluate import Evaluator
from recap_fast.training.memory_check import check_memory, reserve_state
from recap_fast.training.optimization import (
    PolicyOptimizer,
    UpdateStats,
    combine_stats,
    learning_rate,
)
from recap_fast.training.packing import PackedUpdate, pack_update
from recap_fast.training.rollout_source import make_source
from recap_fast.training.run_folder import clear_folder, lock_folder, prepare_folder
from recap_fast.training.sharded_checkpoint import CheckpointSaver
from recap_fast.training.step_feedback import step_feedback
from recap_fast.training.step_metrics import (
    column_deviations,
    column_means,
    device_metrics,
    host_metrics,
    learnt_something,
    staleness_metrics,
)
from recap_fast.training.stop_signals import collect_stop_signals
from recap_fast.types import (
    Prompt,
    RewardTable,
    Rollout,
    SupervisedRow,
    UserError,
    WeightSyncError,
)

logger = logging.getLogger(__name__)

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
        self._lock: IO[bytes] | None = None
        self.world = start_world(config)
        with self.world.failures_named():
            self._set_up(resume, overwrite)

    def _set_up(self, resume: bool, overwrite: bool) -> None:
        config = self.config
        checkpoint = self._prepare_folder(resume, overwrite)
        self.world.log_to(self.run_dir / "logs")
        if self.world.size > 1:
            check_environments(config, self.world)
        together = self.world.together  # one message of what fails in all
        state = together(lambda: load_state(checkpoint) if checkpoint else None)
        self.step = state.step if state else 0
        self._names = [objective.name for objective in config.objectives]

        # What the user can get wrong comes first, what takes long comes last.
        together(lambda: _build_reweighter(config, torch.device("cpu")))
        in_parts = self.world.size > 1 or config.model.offload
        find_model = model_folder if in_parts else resolve_model
        model_path = self.world.one_by_host(lambda: find_model(config.model.path))
        if config.rollout.tensor_parallel_size > 1:
            together(lambda: check_tensor_parallel(config.rollout, load_shapes(model_path)))
        memory = check_memory(config, model_path, self.world)
        together(lambda: self._open_data(model_path))
        self.world.stage = "loading the model"
        logger.info("loading %s", checkpoint or config.model.path)
        load = partial(load_sharded_policy, config.model, mesh=self.world.mesh, seed=config.seed)
        self.policy = together(lambda: load(str(checkpoint or model_path)))
        together(lambda: self.policy.check_length(config.max_sequence_tokens))
        if memory is not None:
            checkpoint_layers(self.policy.model, memory.checkpointing)
        self.saver = CheckpointSaver(
            self.run_dir / "checkpoints",
            self.policy.model,
            self.tokenizer,
            self.images,
            keep=config.checkpoint.keep,
            world=self.world,
            timeout=config.distributed.timeout,
        )
        reference: Policy | BasePolicy | None = None
        initial = config.model.reference == "initial"
        if initial and config.model.lora is not None:
            reference = BasePolicy(self.policy)
        elif config.model.reference is not None:
            other = config.model.reference
            path = model_path if initial else self.world.one_by_host(lambda: find_model(other))
            frozen = together(
                lambda: load(path, trainable=False, attention=self.policy.attention.name)
            )
            together(lambda: frozen.check_length(config.max_sequence_tokens))
            reference = frozen
        self.optimizer = PolicyOptimizer(self.policy, reference, config, self.world)
        reserve_state(self.optimizer.optimizer)
        self.reweighter = together(lambda: _build_reweighter(config, self.policy.device))
        # lambda [K] of "uniform" and "static", the methods that know it before a step.
        self._fixed_weights = self.reweighter.weights.cpu()
        self.balance: GradientBalance | None = None
        if config.reweighting.balance == "gradient":
            self.balance = GradientBalance(len(self._names), self.policy.device)
        supervised = [objective.kind == "loss" for objective in config.objectives]
        self._is_supervised = torch.tensor(supervised, device=self.policy.device)
        # [K] of the step before; NaN for rewards, and where that step had no row of the objective.
        self._losses = torch.full(
            (len(self._names),), torch.nan, dtype=torch.float32, device=self.policy.device
        )
        self.world.stage = "starting the rollout engine"
        logger.info("starting the rollout engine (%s)", config.rollout.engine)
        self.engine = start_engine(
            config,
            self.policy,
            model_path,
            self.tokenizer,
            self.images,
            self.world,
            kv_cache_bytes=memory.kv_cache if memory else None,
            logs=self.run_dir / "logs",
        )
        self.guard = MismatchGuard(config.rollout, self.engine, self.policy.model)
        self.evaluator = Evaluator(
            config, self.policy, self.engine, self.scorer, self.stream, self.world
        )
        self.source = make_source(config, self.stream, self.engine, self.scorer, self.world)
        if state:
            together(lambda: self._restore(state))
        self._sync_weights()
        self._verify_sync()
        self.metrics: MetricsWriter | None = None
        self.world.on_main(lambda: self._start_metrics(overwrite))
        self._first_step = self.step
        self._has_learnt = self._owes_checkpoint = False
        self._not_synced: Exception | None = None  # why the engine lacks the last step's weights

    def _prepare_folder(self, resume: bool, overwrite: bool) -> Path | None:
        """The checkpoint to resume from. Rank 0 looks, and alone writes into the folder later."""

        def prepare() -> str | None:
            checkpoint = prepare_folder(self.config, self.run_dir, resume, overwrite)
            self._lock = lock_folder(self.run_dir)
            return None if checkpoint is None else str(checkpoint)

        found = self.world.on_main(prepare)
        return None if found is None else Path(found)

    def _open_data(self, model_path: str) -> None:
        config = self.config
        self.tokenizer = load_tokenizer(model_path)
        self.images = load_image_encoder(model_path, config.data)
        self.stream = DataStream(config.data, self.tokenizer, config.seed, self.images)
        self.scorer = RewardScorer(config.data.sources, config.objectives, config.rewards)

    def _start_metrics(self, overwrite: bool) -> None:
        if overwrite:
            clear_folder(self.run_dir)
        save_config(self.config, self.run_dir / "config.yaml")
        self.metrics = MetricsWriter(
            self.run_dir,
            self.config,
            start_step=self.step,
            compute_dtype=str(self.policy.compute_dtype).removeprefix("torch."),
        )

    def _sync_weights(self) -> None:
        self.engine.sync_weights(iter_weights(self.policy.model, self.engine.dtype), self.step)

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
            self.world.failures_named(),
            ProgressView(self.config, self.step, self.world.console()) as view,
        ):
            if isinstance(self.engine, Stoppable):
                self.engine.heed(stop)
            if self.step == 0 and self.config.evaluation.before:
                self._log(view, {"step": 0} | self._evaluate(stop))
            while self.step < steps and not self.world.any(bool(stop)):
                try:
                    row = self._train_step(stop)
                    if row is None:  # stopped before the optimizer step: nothing has changed
                        break
                    try:
                        if self._not_synced is not None:
                            raise self._not_synced
                        if self._is_due(self.config.evaluation.every, self.config.evaluation.after):
                            self.world.stage = f"evaluating after step {self.step}"
                            row |= self._evaluate(stop)
                    finally:
                        self._log(view, row)
                except (UserError, WeightSyncError):
                    if self.step > 0 and self._succeeds(self.save, "the run ends without it"):
                        text = f"saved what was learnt so far: step {self.step}"
                        self.world.log_once(logger, logging.ERROR, text)
                    raise
                self._owes_checkpoint |= not self._succeeds(self.saver.settle)
                if self._owes_checkpoint or self._is_due(self.config.checkpoint.every, True):
                    self._owes_checkpoint = not self._succeeds(self._start_saving)
        self._summarise_losses()
        finished = self.step >= steps
        path = self._save_last()
        if not finished:
            logger.warning("stopped after step %d; continue with --resume (%s)", self.step, path)
        return finished

    def _evaluate(self, stop: Sequence[int]) -> dict[str, float]:
        """Nothing where the run is to stop, and its engine has nothing to sample from."""
        try:
            return self.evaluator.run()
        except UserError as error:
            in_all = error.is_shared or self.world.size == 1
            if not in_all or not self.world.any(bool(stop)):
                raise
            self.world.log_once(logger, logging.ERROR, f"the evaluation was given up: {error}")
            return {}

    def _train_step(self, stop: Sequence[int]) -> dict[str, Any] | None:
        started = time.perf_counter()
        self.world.stage = f"sampling and scoring for step {self.step + 1}"
        batch = self.source.next(self.step, stop)
        if batch is None:
            return None
        drawn = batch.drawn
        sampled = time.perf_counter()
        self.engine.sleep()  # until the weights of this step wake it
        rollouts, rewards = drawn.scored.rollouts, drawn.scored.rewards
        trained = [rollouts[row] for row in drawn.trained]
        advantages = self._advantages(trained, rewards.values[drawn.trained])
        updates = self._pack(batch.supervised, trained, advantages)
        lr = learning_rate(
            self.step,
            self.config.training.steps,
            self.config.optimizer.learning_rate,
            self.config.optimizer.warmup_fraction,
        )
        self.world.stage = f"updating in step {self.step + 1}"
        stats = self._learn(updates, rewards, lr)
        from_device = device_metrics(self._names, self.reweighter, stats, self.balance)
        self.step += 1
        updated = time.perf_counter()
        self.world.stage = f"giving the engine the weights of step {self.step}"
        try:
            with suppress(SamplingStoppedError):  # the loop ends, and nothing is sampled any more
                self._sync_weights()
        except (UserError, WeightSyncError) as error:
            # What was learnt is saved: its prompts count as trained on, and its row is written.
            self._not_synced = error
        self.source.trained(
            self.step, step_feedback(self.config, from_device, rollouts, rewards, self.world)
        )
        synced = time.perf_counter()

        self.world.stage = f"writing what step {self.step} gave"
        if self.metrics is not None:
            self.metrics.write_rollouts(self.step, rollouts, rewards)
        tokens = sum(len(r.prompt.token_ids) + len(r.token_ids) for r in rollouts)
        tokens += sum(len(row.token_ids) for row in batch.supervised)
        return {
            "step": self.step,
            "lr": lr,
            **from_device,
            **host_metrics(self.config.objectives, rollouts, rewards, updates, self.stream.skipped),
            **staleness_metrics(trained, self.step - 1),
            **drawn.groups.metrics(),
            **self.stream.mix_metrics,
            **batch.engine,
            "time/rollout": drawn.scored.rollout_seconds,
            "time/reward": drawn.scored.reward_seconds,
            "time/train": updated - sampled,
            "time/sync": synced - updated,
            "time/total": synced - started,
            "tokens_per_second": tokens / (synced - started),
        }

    def _advantages(self, rollouts: Sequence[Rollout], rewards: np.ndarray) -> np.ndarray:
        """[S, K] float32 from rewards [S, K]; NaN where the objective is absent."""
        groups = torch.tensor([r.group for r in rollouts], dtype=torch.int64)
        given, eps = torch.from_numpy(rewards), self.config.advantages.eps
        combination = self.config.reweighting.advantages
        if combination == "group":
            normalize = self.config.advantages.normalize
            table = group_advantages(given, groups, normalize=normalize, eps=eps)
        else:
            weights = self._fixed_weights
            table = combined_advantages(given, groups, weights, method=combination, eps=eps)
        return np.where(np.isnan(rewards), np.float32(np.nan), table.numpy())

    def _pack(
        self,
        supervised: Sequence[SupervisedRow],
        rollouts: Sequence[Rollout],
        advantages: np.ndarray,
    ) -> list[PackedUpdate]:
        """One packed update per optimizer step; groups and supervised rows are dealt in turn."""
        count = self.config.training.updates_per_rollout
        objective_of = {s.name: s.objective for s in self.config.data.sources}
        places = {group: i for i, group in enumerate(dict.fromkeys(r.group for r in rollouts))}
        updates = []
        for turn in range(count):
            mine = [i for i, r in enumerate(rollouts) if places[r.group] % count == turn]
            replay = supervised[turn::count]
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
                    rank=self.world.rank,
                    size=self.world.size,
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
        parameter_norms = None
        every = self.config.reweighting.measure_gradients_every
        if every and self.step % every == 0 and uploaded[0].batches:
            parameter_norms = self.optimizer.measure_gradients(uploaded[0])
        with determinism(self.config.training.deterministic):
            stats = combine_stats(
                [self.optimizer.step(update, weights, lr) for update in uploaded], uploaded
            )
        self._losses = torch.where(self._is_supervised, stats.objective_losses, torch.nan)
        if self.balance is not None and stats.gradient_norms is not None:
            self.balance.observe(stats.gradient_norms)
        stats.parameter_norms = parameter_norms
        return stats

    def _reweigh(self, rewards: RewardTable) -> Tensor:
        """lambda [K] for this step, from its rewards and from the losses of the step before."""
        device = self._losses.device
        means = upload(torch.from_numpy(column_means(rewards.values)), device)
        values = torch.where(self._is_supervised, self._losses, means)
        deviations = None
        if self.reweighter.reads_deviations:
            deviations = upload(torch.from_numpy(column_deviations(rewards.values)), device)
        weights = self.reweighter.update(values, deviations=deviations)
        return weights if self.balance is None else self.balance.weigh(weights)

    def _log(self, view: ProgressView, row: Mapping[str, Any]) -> None:
        self._has_learnt |= learnt_something(row)
        if self.metrics is not None:
            self.metrics.write(row)
        view.update(row)
        if row.get("train/policy_tokens"):
            self.guard.check(
                row["rollout/logprob_diff_mean"],
                row["rollout/logprob_diff_max"],
                row["step"],
                row.get("staleness/max", 0),
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
        # Copies, since groups that were sampled ahead may still be scored.
        for what, count in list(self.scorer.failures.items()):
            logger.warning("failed rewards: %s: %d", what, count)
        for what, count in list(self.scorer.unreadable.items()):
            logger.warning("answers that could not be read, worth 0: %s: %d", what, count)
        for what, text in list(self.scorer.first_errors.items()):
            logger.warning("first error of %s: %s", what, text)

    def _is_due(self, every: int, at_end: bool) -> bool:
        last = self.step == self.config.training.steps
        return (last and at_end) or (not last and every > 0 and self.step % every == 0)

    def _succeeds(
        self, save: Callable[[], object], otherwise: str = "it will be tried again"
    ) -> bool:
        """Whether there was no error: a disk that is full now must not end what can be saved a step
        later."""
        try:
            save()
            return True
        except CheckpointError as error:
            self.world.log_once(logger, logging.ERROR, f"{error}; {otherwise}")
            return False

    def _save_last(self) -> Path:
        """`save` at the end of the run, which fails if it does."""
        try:
            return self.save()
        except CheckpointError as error:
            raise with_what_is_left(error, self.run_dir / "checkpoints") from error

    def save(self) -> Path:
        """Writes a checkpoint of the present step and returns its folder."""
        self._succeeds(self.saver.wait)
        path = self._start_saving()
        self.saver.wait()
        return path

    def _start_saving(self) -> Path:
        """Takes all that a checkpoint holds from the device; it is written while training goes on.
        Raises `CheckpointError` of the save before."""
        self.world.stage = f"saving step {self.step}"
        tensors = {f"optimizer/{name}": t for name, t in self.optimizer.named_state()}
        tensors |= {f"reweighter/{k}": t for k, t in self.reweighter.state_dict().items()}
        if self.balance is not None:
            tensors |= {f"balance/{k}": t for k, t in self.balance.state_dict().items()}
        generators = generator_states(self.world.rank, self.policy.device)
        tensors |= {f"rng/{name}": t for name, t in generators.items()} | {"losses": self._losses}
        return self.saver.start(TrainerState(self.step, self.source.state_dict(), tensors))

    def _restore(self, state: StoredState) -> None:
        def part(prefix: str) -> dict[str, StoredTensor]:
            return {
                key.removeprefix(prefix): tensor
                for key, tensor in state.tensors.items()
                if key.startswith(prefix)
            }

        self.optimizer.load_named_state(part("optimizer/"))
        self.reweighter.load_state_dict({k: t[...] for k, t in part("reweighter/").items()})
        if self.balance is not None:
            try:
                self.balance.load_state_dict({k: t[...] for k, t in part("balance/").items()})
            except ValueError as error:
                raise CheckpointError(
                    f"{error}: resume with the reweighting.balance the run was started with"
                ) from None
        self._losses = state.tensors["losses"][...].to(self.policy.device)
        restore_generators(part("rng/"), self.world.rank, self.policy.device)
        self.source.load_state_dict(state.data, self.step)

    def close(self) -> None:
        """Stops the workers and the engine."""
        if self.metrics is not None:
            self.metrics.close()
        self.saver.close()
        self.source.close()
        self.scorer.close()
        self.engine.close()
        if self._lock is not None:
            self._lock.close()
        self.world.close()


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
