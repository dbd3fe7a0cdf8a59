"""Sources of rows, and how a step mixes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from recap_fast.config.section import Section


class RewardSpec(Section):
    function: str
    """A built-in name (`recap_fast.rewards.functions.BUILTIN`) or "module:function"."""
    parameters: dict[str, Any] = {}
    """Keyword arguments for the function."""


class SourceConfig(Section):
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


class AdaptiveConfig(Section):
    """Of data.mixing adaptive: shares that follow the weights of the objectives."""

    shares: Literal["uniform", "proportional", "coreset"] | dict[str, float] = "uniform"
    """What the sources' shares start from, as in `data.mixing`."""
    most: float = Field(2.0, gt=1)
    """A source's share is at most this many times what it started from, and at least one part in as
    many of it."""


class ReviewConfig(Section):
    """Prompts that were solved come back before what it costs to learn them again grows, in the
    place of others (correct-set turnover, arXiv 2606.03087). rl sources with one of `rewards`."""

    share: float = Field(0.25, gt=0, le=1)
    """Largest share of a source's rows that are reviewed; a step rounds it down or up, so that it
    holds over steps."""
    after: int = Field(50, ge=1)
    """Steps after which a solved prompt comes back. They double each time a review finds it solved;
    one that is not comes back at once, a few times."""
    rewards: Annotated[list[str], Field(min_length=1)] = ["accuracy"]
    """Objectives that say whether a prompt is solved: all of these that its source has."""
    threshold: float = 0.75
    """A prompt is solved where the mean of the reward over its rollouts is at least this."""


class DataConfig(Section):
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
