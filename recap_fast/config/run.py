"""All settings of a run together, and which of them go with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from recap_fast.config.data import AdaptiveConfig, DataConfig
from recap_fast.config.model import ModelConfig
from recap_fast.config.rollout import RolloutConfig
from recap_fast.config.section import Section, nearest
from recap_fast.config.training import (
    AdvantageConfig,
    CheckpointConfig,
    DistributedConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    RewardsConfig,
    ReweightingConfig,
    TrainingConfig,
)
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.types import Objective


class TrainConfig(Section):
    """All settings of a run. `load_config` reads them from YAML and `Trainer` carries them out; the
    parts that a run may do without have defaults.

    Raises:
        pydantic.ValidationError: a value of another type or outside its range, an unknown key, or
            settings that contradict each other.
    """

    run: str
    """The run's folder."""
    seed: int = Field(0, ge=0)
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    loss: PolicyLossConfig = PolicyLossConfig()
    reweighting: ReweightingConfig = ReweightingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def objectives(self) -> list[Objective]:
        """The K objectives, in order of first mention. Several sources may share one."""
        found: dict[str, Objective] = {}
        for source in self.data.sources:
            for name in source.objectives:
                found.setdefault(name, Objective(name, "reward" if source.kind == "rl" else "loss"))
        return list(found.values())

    @property
    def max_rollout_tokens(self) -> int:
        """Tokens of the longest prompt with the longest completion, in training or evaluation."""
        completion = max(self.rollout.max_new_tokens, self.evaluation.max_new_tokens or 0)
        return self.data.max_prompt_tokens + completion

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens of the longest sequence that the model sees: a rollout, or a supervised row."""
        has_replay = any(source.kind == "sft" for source in self.data.sources)
        supervised = self.data.max_supervised_tokens if has_replay else 0
        return max(self.max_rollout_tokens, supervised)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        self._check_sources()
        self._check_loss()
        self._check_combination()
        transfer = self.rollout.server.transfer
        if self.model.device == "cpu" and transfer not in ("auto", "shared_memory"):
            raise ValueError(
                f"rollout.server.transfer is {transfer}, which takes weights from a GPU, and "
                f"model.device is cpu: set rollout.server.transfer to shared_memory, or leave it "
                f"out"
            )
        if self.rollout.server.adapters == "named" and (
            self.model.lora is None or self.model.train_vision
        ):
            problem = "unset" if self.model.lora is None else "beside train_vision"
            raise ValueError(
                f"rollout.server.adapters is named, and model.lora is {problem}: it is for "
                f"adapters of a language model; set it to merged"
            )
        longest = max(
            self.data.max_prompt_tokens + self.rollout.max_new_tokens,
            self.data.max_supervised_tokens,
        )
        if self.training.updates_per_rollout > self.data.batch_size:
            raise ValueError(
                f"training.updates_per_rollout is {self.training.updates_per_rollout}, but a step "
                f"has only data.batch_size = {self.data.batch_size} rows to deal out"
            )
        if self.training.max_tokens < longest:
            raise ValueError(
                f"training.max_tokens is {self.training.max_tokens}, but one sequence may have "
                f"{longest} tokens (data.max_prompt_tokens + rollout.max_new_tokens, or "
                f"data.max_supervised_tokens)"
            )
        return self

    def _check_sources(self) -> None:
        names = [source.name for source in self.data.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"data.sources: the name {name!r} is used twice")
        kinds = {objective.name: objective.kind for objective in self.objectives}
        for source in self.data.sources:
            for name in source.objectives:
                if (kinds[name] == "loss") != (source.kind == "sft"):
                    raise ValueError(
                        f"data.sources: objective {name!r} is a reward in one source and a "
                        f"supervised loss in another"
                    )
        self._check_mixing(names)
        if self.data.review is not None:
            _check_names("data.review.rewards", self.data.review.rewards, kinds)
            for name in self.data.review.rewards:
                if kinds[name] != "reward":
                    raise ValueError(
                        f"data.review.rewards: {name!r} is a supervised loss, and only what is "
                        f"sampled can be solved: name a reward, or leave data.review out"
                    )
        _check_names("reweighting.signals", self.reweighting.signals, kinds)

    def _check_mixing(self, names: Sequence[str]) -> None:
        data, mixing = self.data, self.data.base_mixing
        is_adaptive = data.mixing == "adaptive"
        path = "data.adaptive.shares" if is_adaptive else "data.mixing"
        if isinstance(mixing, dict):
            _check_names(path, mixing, names)
            if min(mixing.values(), default=0) < 0 or not sum(mixing.values()):
                raise ValueError(f"{path}: ratios must be at least 0, and one of them above 0")
        if mixing == "coreset":
            replay = {source.is_replay for source in data.sources}
            if replay != {True, False}:
                raise ValueError(
                    f"{path}: coreset needs at least one source with `replay: true` and one without"
                )
        if not is_adaptive:
            if data.adaptive != AdaptiveConfig():
                raise ValueError(
                    f"data.adaptive has no use while data.mixing is {data.mixing!r}: set "
                    f"data.mixing to adaptive, or leave data.adaptive out"
                )
            return
        if self.reweighting.method == "uniform":
            raise ValueError(
                "data.mixing is adaptive, which goes by the objectives' weights, and "
                "reweighting.method is uniform, whose weights are all 1: set reweighting.method to "
                "recap, or data.mixing to what data.adaptive.shares is"
            )
        ratios = mixing if isinstance(mixing, dict) else dict.fromkeys(names, 1.0)
        drawn = [source for source in data.sources if ratios.get(source.name)]
        if len({frozenset(source.objectives) for source in drawn}) == 1:
            raise ValueError(
                "data.mixing is adaptive, and all sources that are drawn from carry the same "
                "objectives, whose weights tell none from another: give sources objectives of "
                "their own (`rewards`, `objective`), or set data.mixing to another"
            )

    def _check_loss(self) -> None:
        depth = self.rollout.asynchronous.depth
        if depth and self.loss.rollout_is_cap is None:
            raise ValueError(
                f"rollout.async.depth is {depth}, so that tokens are trained on that other weights "
                f"have sampled, and nothing corrects for it: set loss.rollout_is_cap, to 2.0 for "
                f"instance"
            )
        if self.loss.entropy_coef and self.reweighting.balance == "gradient":
            raise ValueError(
                f"reweighting.balance is gradient, and loss.entropy_coef is "
                f"{self.loss.entropy_coef}: beside an entropy bonus the objectives' gradients are "
                f"not told apart; set one of them to none or 0"
            )
        if self.loss.kl_coef and self.model.reference is None:
            raise ValueError(
                f"loss.kl_coef is {self.loss.kl_coef}, but there is no reference model: set "
                f'model.reference to "initial" or to a path'
            )
        if self.model.reference is not None and not self.loss.kl_coef:
            raise ValueError("model.reference has no use while loss.kl_coef is 0: leave one out")
        if self.loss.logit_softcap is not None:
            raise ValueError("loss.logit_softcap: the trainer takes the model's own; leave it out")
        if self.rollout.dynamic_sampling is not None and self.rollout.group_size == 1:
            raise ValueError(
                "rollout.group_size is 1, but rollout.dynamic_sampling compares the rollouts of a "
                "group: use at least 2, or leave rollout.dynamic_sampling out"
            )
        has_rl = any(source.kind == "rl" for source in self.data.sources)
        if has_rl and self.rollout.group_size == 1 and self.advantages.normalize != "none":
            raise ValueError(
                f"rollout.group_size is 1, but advantages.normalize is "
                f"{self.advantages.normalize!r}, which compares a group's rollouts: use at least "
                f'2, or advantages.normalize: "none"'
            )
        if self.loss.temperature != 1.0 and self.loss.temperature != self.rollout.temperature:
            raise ValueError(
                f"loss.temperature is {self.loss.temperature} and rollout.temperature is "
                f"{self.rollout.temperature}: leave loss.temperature out, the trainer takes the "
                f"rollouts'"
            )

    def _check_combination(self) -> None:
        method, combination = self.reweighting.method, self.reweighting.advantages
        if combination == "group":
            return
        given = f"reweighting.advantages is {combination}"
        if method not in ("uniform", "static"):
            raise ValueError(
                f"{given}, which decides how much each reward of a rollout counts, and "
                f"reweighting.method is {method}, which would decide it too: set "
                f"reweighting.method to uniform or static, or reweighting.advantages to group"
            )
        if self.advantages.normalize != "std":
            raise ValueError(
                f"{given}, which combines advantages in units of their group's deviation, and "
                f"advantages.normalize is {self.advantages.normalize}: set it to std, or leave it "
                f"out"
            )
        if not any(source.kind == "rl" for source in self.data.sources):
            raise ValueError(f"{given}, and no source has rewards to combine: leave it out")


def _check_names(path: str, given: Any, valid: Any) -> None:
    for name in given:
        if name not in valid:
            raise ValueError(f"{path}: unknown name {name!r}{nearest(name, list(valid))}")
