"""The built-in reward functions.

Each takes a `RewardSample` and parameters by keyword, and returns a number. A truth that it cannot
use raises: `recap_fast.rewards.scorer` counts that and leaves the reward out. What a model wrote
never raises: it gets the lowest score.

Reward workers import this module, so it is free of torch, and heavy imports wait until needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from recap_fast.rewards.answers import accuracy, extract_answer
from recap_fast.rewards.boxes import iou
from recap_fast.types import PROMPT_OPENS_THINK, RewardSample

_THINKING = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def thinking_format(sample: RewardSample, *, prompt_opens_think: bool | None = None) -> float:
    """1 if a completion is <think>...</think> and then <answer>...</answer>, each tag exactly
    once, both with content, and nothing but whitespace around them; else 0.

    Args:
        prompt_opens_think: the chat template ends the prompt with "<think>", so the completion
            starts inside of it. Unset: what the data stage saw of the prompt.
    """
    if prompt_opens_think is None:
        prompt_opens_think = bool(sample.entry.get(PROMPT_OPENS_THINK))
    text = "<think>" + sample.completion if prompt_opens_think else sample.completion
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(tag) != 1 for tag in tags):
        return 0.0
    match = _THINKING.fullmatch(text)
    return float(match is not None and bool(match[1].strip() and match[2].strip()))


def answer_format(sample: RewardSample) -> float:
    """1 if a completion has exactly one <answer>...</answer>, with content; else 0. Text around
    it is allowed."""
    before, opening, rest = sample.completion.partition("<answer>")
    inside, closing, after = rest.partition("</answer>")
    if not opening or not closing or not inside.strip():
        return 0.0
    outside = before + after
    return float(
        "<answer>" not in inside and "<answer>" not in outside and "</answer>" not in outside
    )


def overlong(
    sample: RewardSample, *, max_length: int | None = None, buffer: int | None = None
) -> float:
    """DAPO's soft over-long punishment (arXiv 2503.14476, equation 13): 0 up to
    `max_length - buffer` tokens, from there linearly down to -1 at `max_length`, and -1 beyond.

    Args:
        max_length: in tokens; unset: the longest completion the run allows.
        buffer: in tokens; unset: a fifth of `max_length`, as in the paper (4096 of 20480).

    Raises:
        ValueError: buffer is not within 1 .. max_length.
    """
    longest = sample.max_new_tokens if max_length is None else max_length
    width = max(1, longest // 5) if buffer is None else buffer
    if not 1 <= width <= longest:
        raise ValueError(f"buffer must be within 1 and max_length {longest}, got {width}")
    excess = sample.num_tokens - (longest - width)
    return -min(max(excess, 0) / width, 1.0)


def reasoning_gym(
    sample: RewardSample,
    *,
    dataset: str | None = None,
    dataset_parameters: Mapping[str, Any] | None = None,
) -> float:
    """The score that a reasoning-gym dataset's own verifier gives the extracted answer.

    Args:
        dataset: its name. Unset: the source's, or what the row's metadata say.
        dataset_parameters: with which it was made. Unset: the source's.

    Raises:
        ValueError: there is no such dataset, or the row does not say which.
    """
    name = dataset
    if name is None:
        metadata = sample.entry.get("metadata")
        name = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
        if name is None:
            raise ValueError(
                "the row has no metadata.source_dataset: name the dataset in the reward's "
                "parameters, e.g. {function: reasoning_gym, parameters: {dataset: chain_sum}}"
            )
    verifier = _gym_verifier(name, json.dumps(dataset_parameters or {}, sort_keys=True))
    return float(verifier(extract_answer(sample.completion), dict(sample.entry)))


@lru_cache(maxsize=256)
def _gym_verifier(name: str, parameters: str) -> Callable[[str, dict[str, Any]], float]:
    from reasoning_gym import create_dataset

    score: Callable[[str, dict[str, Any]], float] = create_dataset(
        name, **json.loads(parameters)
    ).score_answer
    return score


def check_truth(
    name: str, parameters: Mapping[str, Any], answer: Any, entry: Mapping[str, Any]
) -> None:
    """Raises what a built-in reward would raise for a row whatever the model wrote.

    Args:
        name: "accuracy" or "iou"; the others have no truth of their own to be checked.
        parameters: keyword arguments of the reward.

    Raises:
        ValueError, TypeError, KeyError: the truth is of no use.
    """
    if name in ("accuracy", "iou"):
        BUILTIN[name](RewardSample("", answer, entry, 0, 1, "stop"), **parameters)


BUILTIN: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "thinking_format": thinking_format,
    "answer_format": answer_format,
    "iou": iou,
    "overlong": overlong,
    "reasoning_gym": reasoning_gym,
}
"""Reward functions that a configuration can name."""
