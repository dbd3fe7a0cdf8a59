"""The built-in reward functions.

Each takes a `RewardSample` and parameters by keyword, and returns a number. A truth that it cannot
use raises: `recap_fast.rewards.scorer` counts that and leaves the reward out. What a model wrote
never raises: it gets the lowest score, as `Unreadable` where a verifier broke on it.

Reward workers import this module, so it is free of torch, and heavy imports wait until needed.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from recap_fast.rewards.answers import accuracy, extract_answer
from recap_fast.rewards.boxes import iou
from recap_fast.rewards.unreadable import Unreadable, describe
from recap_fast.types import RewardSample

_THINKING = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def thinking_format(sample: RewardSample, *, prompt_opens_think: bool | None = None) -> float:
    """1 if a completion is <think>...</think> and then <answer>...</answer>, each tag exactly
    once, both with content (a thought of some letter or digit), and nothing but whitespace around
    them; else 0.

    Args:
        prompt_opens_think: the chat template ends the prompt with "<think>", so the completion
            starts inside of it. Unset: what the data stage saw of the prompt.
    """
    text = sample.assistant_turn
    if prompt_opens_think is not None:
        text = "<think>" * prompt_opens_think + sample.completion
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(tag) != 1 for tag in tags):
        return 0.0
    match = _THINKING.fullmatch(text)
    return float(match is not None and _says_something(match[1]) and _is_visible(match[2]))


def _says_something(thought: str) -> bool:
    return any(map(str.isalnum, thought))


def _is_visible(text: str) -> bool:
    """Whether there is more than spaces and characters without width."""
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def answer_format(sample: RewardSample) -> float:
    """1 if a completion has exactly one <answer>...</answer>, with content, which stands in no
    thought; else 0. Text around it is allowed."""
    text = sample.assistant_turn
    before, _, rest = text.partition("<answer>")
    inside, _, after = rest.partition("</answer>")
    if any(text.count(tag) != 1 for tag in ("<answer>", "</answer>")):
        return 0.0
    in_thought = before.rfind("<think>") > before.rfind("</think>") or "</think>" in after
    return float(_is_visible(inside) and not in_thought)


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
        ValueError: there is no such dataset, the row does not say which, or its verifier pays for
            an answer that says nothing.
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
    answer = extract_answer(sample.assistant_turn)
    if not answer or answer.strip("+-").casefold() in ("nan", "inf", "infinity"):
        return 0.0  # some verifiers find that nan is within their tolerance
    entry = dict(sample.entry)
    score = _verified(verifier, answer, entry)
    if score < 1 and dataset_parameters is None:
        # Perhaps a row from a file, where tuples have become lists; verifiers compare with ==.
        as_made = entry | {"metadata": _with_tuples(entry.get("metadata"))}
        score = max(score, _verified(verifier, answer, as_made))
    if score >= 1 and _verified(verifier, _NO_ANSWER, entry) >= 1:
        raise ValueError(
            f"reasoning-gym's verifier of {name!r} gives full marks to {_NO_ANSWER!r}, so any "
            f"answer would be right; take the reward accuracy for its rows"
        )
    return score


_NO_ANSWER = "no answer at all"
_Verifier = Callable[[str, dict[str, Any]], float]


def _verified(verifier: _Verifier, answer: str, entry: dict[str, Any]) -> float:
    try:
        score = float(verifier(answer, entry))
    except (Exception, SystemExit) as error:  # noqa: BLE001 (verifiers raise anything)
        return Unreadable(describe(error))
    return score if math.isfinite(score) else Unreadable(f"the verifier gave {score}")


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_with_tuples, value))
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return value


@lru_cache(maxsize=256)
def _gym_verifier(name: str, parameters: str) -> _Verifier:
    from reasoning_gym import create_dataset

    score: _Verifier = create_dataset(name, **json.loads(parameters)).score_answer
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
