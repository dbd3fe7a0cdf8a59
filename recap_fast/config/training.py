"""Rewards, objectives, the optimizer, and what a run writes down."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from recap_fast.config.section import Section


class RewardsConfig(Section):
    workers: int = Field(2, ge=1)
    """Processes that compute rewards."""
    timeout: float = Field(10.0, gt=0)
    """Seconds one reward of one rollout may take."""
    max_failure_fraction: float = Field(0.1, ge=0, le=1)
    """The run stops when more than this share of a step's rewards of one objective failed."""


class AdvantageConfig(Section):
    normalize: Literal["std", "none", "leave_one_out"] = "std"
    eps: float = Field(1e-4, gt=0)


class ReweightingConfig(Section):
    method: Literal[
        "recap", "uniform", "static", "dwa", "rlw", "uw", "scale_invariant", "famo", "saw"
    ] = "recap"
    parameters: dict[str, Any] = {}
    """Keyword arguments of the method, e.g. {window: 10, temperature: 5.0} or {preset: paper} for
    recap. "static" takes {weights: {objective: weight}}."""
    advantages: Literal["group", "gdpo", "gd2po", "dvao"] = "group"
    """How rewards become advantages. group: each objective's by itself, which the weights then act
    on. gdpo, gd2po, dvao: a rollout's rewards are combined into one, see
    `recap_fast.ops.combined_advantages`; with method uniform or static, whose weights enter the
    combination."""
    signals: dict[str, Literal["loss", "reward"]] = {}
    """How an objective's windows are read; unset: rewards "reward", supervised losses "loss"."""
    balance: Literal["none", "gradient"] = "none"
    """gradient: weights are divided by how strongly each objective's gradient has pulled of late,
    so that they decide between equals."""
    measure_gradients_every: int = Field(0, ge=0)
    """Steps between measurements of the norm of each objective's gradient in the parameters, which
    take a forward and backward pass for each; 0: none. To see what balance goes by."""


class OptimizerConfig(Section):
    learning_rate: float = Field(1e-6, gt=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2
    )
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    state: Literal["float32", "bfloat16", "8bit"] = "float32"
    """AdamW's two moments, beside float32 weights and gradients: 8, 4 or 2 bytes a parameter.
    bfloat16 is rounded stochastically; 8bit has a scale for each 256 values of a row."""
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the run over which the rate rises linearly; then it falls linearly to 0."""
    max_grad_norm: float = Field(1.0, gt=0)


class TrainingConfig(Section):
    steps: int = Field(100, ge=1)
    updates_per_rollout: int = Field(1, ge=1)
    """Optimizer steps per batch of rollouts, each on its own part of the groups. Above 1 the
    sampled log-probs are the old policy's, to which the ratio is clipped; with
    `loss.rollout_is_cap` an importance weight corrects for what has changed since instead."""
    max_tokens: int = Field(8192, ge=16)
    """Packed tokens in one forward pass. A step takes as few passes as it needs, of about equal
    size; where that saves one they may be 5 % larger, so leave that much memory."""
    deterministic: bool = False
    """Update with algorithms that give the same bits every time. Acts on CUDA, where flash
    attention and the gradients of shared prompts otherwise add in an order that varies."""


class EvaluationConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before and after."""
    before: bool = True
    after: bool = True
    max_new_tokens: int | None = Field(None, ge=1)
    """Unset: as in rollouts."""


class CheckpointConfig(Section):
    every: int = Field(50, ge=0)
    """Steps between checkpoints; 0: only at the end and on SIGTERM."""
    keep: int = Field(2, ge=1)


class DistributedConfig(Section):
    """Of runs that torchrun starts."""

    replicas: int = Field(1, ge=1)
    """Copies of the sharded model: parameters are sharded over processes / replicas, and gradients
    summed over the copies (HSDP). 1: sharded over all."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that a process waits for the others before the run ends with an error."""


class LoggingConfig(Section):
    tensorboard: bool = True
    wandb: str | None = None
    """W&B project to log to."""
    rollouts_per_step: int = Field(4, ge=0)
    """How many rollouts of each step are written to samples.jsonl."""
