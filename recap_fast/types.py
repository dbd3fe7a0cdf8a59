"""Records that the stages exchange. Stages hand each other these and never dicts.

Shapes: S sequences (rollouts, then supervised rows), K objectives, T packed tokens, N predicted
tokens (those whose log-prob enters the loss).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

FinishReason = Literal["stop", "length"]

ORIGINAL_IMAGE_SIZES = "original_image_sizes"
"""Key of a prompt's entry: [width, height] of each of its images, upright, before resizing."""
MODEL_IMAGE_SIZES = "model_image_sizes"
"""Key of a prompt's entry: [width, height] of each of its images as the model sees it."""

PROMPT_OPENS_THINK = "prompt_opens_think"
"""Key of a prompt's entry, true where the prompt ends with <think>: the completion then begins
inside of the thought. Other prompts' entries lack it."""


class UserError(ValueError):
    """Something that the user can mend. The command line prints its text and exits with 2.

    Attributes:
        is_shared: whether it ends all processes of a run, so that rank 0 prints it, once.
    """

    is_shared = False


class StageError(RuntimeError):
    """Something ended the run in the middle of a stage. Its text is in the log already."""


class LostProcessError(StageError):
    """A collective did not come to its end: another process has died, or hangs."""


class OutOfMemoryError(StageError):
    """A stage wanted more memory than the device, or the host, has."""


class WeightSyncError(RuntimeError):
    """The engine does not sample from the trainer's weights. Its text names the cause."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One of the K things that are optimised and reweighted: a reward, or a supervised loss."""

    name: str
    kind: Literal["reward", "loss"]


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One image of a row, as the model's image processor prepared it.

    In the row's tokens it stands as height * width / merge_size^2 image tokens, with the vision
    start and end tokens around them where the model has them.
    """

    image: Image  # RGB, already resized as configured: for engines with a processor of their own
    patches: Tensor  # [time * height * width, D] float32, in the processor's order
    grid: tuple[int, int, int]  # patches along time (1 for an image), height, width


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of an rl source, templated and tokenised."""

    source: str
    row: int  # row number in its source; the pair (source, row) identifies the prompt
    token_ids: list[int]
    text: str  # the user's turn after the prompt template, for reports
    answer: Any  # ground truth, as the source gives it
    entry: Mapping[str, Any]  # the source's row without its images, for verifiers
    images: tuple[ImageInput, ...] = ()  # in the order of their tokens


@dataclass(frozen=True, slots=True)
class SupervisedRow:
    """One row of an sft source. Tokens from `num_prompt_tokens` on are targets."""

    source: str
    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    images: tuple[ImageInput, ...] = ()  # all of them in the prompt


@dataclass(frozen=True, slots=True)
class StepRows:
    """What the data stage hands over for one step."""

    prompts: list[Prompt]
    supervised: list[SupervisedRow]


@dataclass(frozen=True, slots=True)
class StepFeedback:
    """What a step tells the data stage, which rows to come may depend on. The same in all processes
    of a run, and JSON-able."""

    weights: Mapping[str, float] = field(default_factory=dict)  # lambda, by objective
    groups: Sequence[tuple[str, int, bool | None]] = ()
    """Of each group that was sampled, dropped ones too: its prompt's source and row, and whether it
    was solved; None: no reward says."""


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How an engine samples. `temperature` 0 is greedy. top_p and top_k are left at 1 and off:
    only then are sampled log-probs those of the policy that is trained."""

    n: int
    max_new_tokens: int
    temperature: float
    seed: int
    groups: tuple[int, ...] = ()
    """Of each prompt its number in the step, which its group is called and its seed follows from;
    (): 0, 1, 2 and so on."""

    def group(self, index: int) -> int:
        return self.groups[index] if self.groups else index


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion. Rollouts of one prompt share `group` and stand side by side."""

    prompt: Prompt
    group: int
    token_ids: list[int]  # completion only; ends with EOS where finish_reason is "stop"
    logprobs: list[float]  # of the sampled tokens, at the sampling temperature
    finish_reason: FinishReason
    text: str  # the completion without the token that stopped it
    versions: Sequence[int] = ()
    """Of each token the policy that sampled it, in optimizer steps since the start; (): all of them
    the one that is trained."""


@dataclass(frozen=True, slots=True)
class RewardSample:
    """What a reward function is given."""

    completion: str
    answer: Any
    entry: Mapping[str, Any]
    num_tokens: int
    max_new_tokens: int
    finish_reason: FinishReason

    @property
    def assistant_turn(self) -> str:
        """The completion, after the "<think>" that its prompt ends with where it does."""
        return "<think>" * bool(self.entry.get(PROMPT_OPENS_THINK)) + self.completion


@dataclass(frozen=True, slots=True)
class RewardTable:
    """Rewards of one step. NaN means that the objective is absent from that rollout."""

    values: np.ndarray  # [S, K] float32
    failures: Mapping[str, int] = field(default_factory=dict)  # absent: e.g. {"mine/timeout": 2}
    unreadable: Mapping[str, int] = field(default_factory=dict)
    """Answers that are worth 0 because a built-in reward broke on them, e.g. {"accuracy": 1}."""
