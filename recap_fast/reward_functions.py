"""The built-in reward functions.

Each takes a `RewardSample` and parameters by keyword, and returns a number. A truth that it cannot
use raises: `recap_fast.rewards` counts that and leaves the reward out. What a model wrote never
raises: it gets the lowest score.

Reward workers import this module, so it is free of torch, and heavy imports wait until needed.
"""

from __future__ import annotations

import json
import logging
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from recap_fast.types import MODEL_IMAGE_SIZES, ORIGINAL_IMAGE_SIZES, RewardSample


def extract_answer(completion: str) -> str:
    """The part of a completion that is compared with the truth.

    The last <answer>...</answer>, if there is one. Otherwise, of what follows the last </think>,
    the last \\boxed{...} or else all of it.
    """
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return completion[start + len("<answer>") : end].strip()
    text = completion.rpartition("</think>")[2]
    boxed = _last_boxed(text)
    return (text if boxed is None else boxed).strip()


def _last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} whose braces are balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for index in range(start + len("\\boxed"), len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[start + len("\\boxed{") : index]
    return None


def accuracy(sample: RewardSample, *, choices: str | None = None) -> float:
    """1 if the extracted answer is right, else 0.

    Right is what math-verify finds equal, or what is the same text after normalisation (case,
    Unicode form, whitespace, closing punctuation), or, for a truth that is a single letter, an
    answer that names it: "B", "(b)", "B. Paris", "the answer is B".

    Args:
        choices: column of the row with the list of options (by default the source's `choices`; a
            row that has none there is an open question). Then the truth may be an option's letter,
            its number from 0, or its text, and so may the answer (except the number).

    Raises:
        ValueError, TypeError, KeyError: the truth or the options are not of that form.
    """
    prediction = extract_answer(sample.completion)
    options = None if choices is None else sample.entry[choices]
    if options is not None and options != []:
        return float(_is_right_choice(prediction, sample.answer, options))
    truth = _truth_text(sample.answer)
    if not prediction:
        return 0.0
    return float(
        _normalise(prediction) == _normalise(truth)
        or _is_same_letter(prediction, truth)
        or _is_mathematically_equal(prediction, truth)
    )


def _truth_text(answer: Any) -> str:
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    if not isinstance(answer, str):
        raise TypeError(f"the truth must be a text or a number, got {answer!r}")
    # GSM8K: the solution, then "#### result". Others keep the tags or the \\boxed{} of a solution.
    text = extract_answer(answer.rpartition("####")[2])
    if not text:
        raise ValueError("the truth is empty")
    return text


def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    return " ".join(text.split()).strip("\"'`*").rstrip(".!").strip()


_TRUTH_LETTER = re.compile(r"\(?([A-Z])\)?\.?")
_OPTION_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Za-z])(?=[.):]|$)")
_ANSWER_IS = re.compile(
    r"\b(?:answer|option|choice)\s*(?:is|:)?\s*:?\s*\(?([A-Z])\)?(?![A-Za-z'])", re.IGNORECASE
)


def _letter(text: str) -> str | None:
    """The option letter that an answer names."""
    text = text.strip().strip("*")
    if match := _OPTION_LETTER.match(text):
        return (match[1] or match[2]).upper()
    named = _ANSWER_IS.findall(text)
    return named[-1].upper() if named else None


def _is_same_letter(prediction: str, truth: str) -> bool:
    match = _TRUTH_LETTER.fullmatch(truth)
    return match is not None and _letter(prediction) == match[1]


def _is_right_choice(prediction: str, answer: Any, options: Any) -> bool:
    if not isinstance(options, list | tuple) or not options:
        raise TypeError(f"the options must be a list, got {options!r}")
    texts = [_normalise(str(option)) for option in options]
    right = _choice_index(answer, texts)
    normalised = _normalise(prediction)
    if normalised in texts:
        return texts.index(normalised) == right
    return _letter(prediction) == chr(ord("A") + right)


def _choice_index(answer: Any, texts: Sequence[str]) -> int:
    """Number of the right option, from 0."""
    index = answer
    if isinstance(answer, str):
        answer = extract_answer(answer)
        letter = _TRUTH_LETTER.fullmatch(answer)
        if _normalise(answer) in texts:
            index = texts.index(_normalise(answer))
        elif letter:
            index = ord(letter[1]) - ord("A")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
        raise ValueError(f"the truth {answer!r} is none of the {len(texts)} options")
    return index


_PLAIN_INTEGER = re.compile(r"[+-]?\d{1,18}")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|log|exp|pi)\b")
_WORD = re.compile(r"[A-Za-z]{3,}")
_LONGEST_FORMULA = 500  # characters
_HUGE_POWER = re.compile(
    r"(?:\^|\*\*)[\s{(]*\d{5,}"  # 2^100000
    r"|(?:\^|\*\*)[\s{(]*\d+[\s})]*(?:\^|\*\*)"  # 9^9^9
    r"|\d{5,}\s*!"
)
_NUMBER_WITH_UNIT = re.compile(r"[^\w\s]*\d[\d.,/]*\s*[^\W\d]+")


def _is_mathematically_equal(prediction: str, truth: str) -> bool:
    if _PLAIN_INTEGER.fullmatch(prediction) and _PLAIN_INTEGER.fullmatch(truth):
        return int(prediction) == int(truth)  # the most frequent case, at no cost
    # sympy would write such a number out, which takes hours and cannot be interrupted. The worker
    # would be killed, but each time a whole time limit would be lost.
    if _HUGE_POWER.search(prediction):
        return False
    # Of a truth in words math-verify would compare a number that happens to be in it.
    if _has_words(truth) and not _NUMBER_WITH_UNIT.fullmatch(truth):
        return False
    from math_verify import verify

    # The end of an answer, because parsers take seconds to minutes for the endless "((((" of a
    # model that has lost its way. Without time limits: math-verify's use SIGALRM, the pool has its
    # own.
    parsed = _parse(prediction[-_LONGEST_FORMULA:])
    return bool(verify(_parse(truth), parsed, timeout_seconds=None))


def _has_words(text: str) -> bool:
    return _WORD.search(_LATEX_COMMAND.sub(" ", text)) is not None


@lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """math-verify's reading of a text. Rollouts of one group share the truth: hence the cache."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of missing time limits
    parsed: list[Any] = parse(text, parsing_timeout=None)
    if not _has_words(text) and "$" not in text:
        # A formula without delimiters is found only inside some; prose would be read as a product.
        parsed = parsed + parse(f"\\boxed{{{text}}}", parsing_timeout=None)
    return parsed


_THINKING = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def thinking_format(sample: RewardSample, *, prompt_opens_think: bool = False) -> float:
    """1 if a completion is <think>...</think> and then <answer>...</answer>, each tag exactly
    once, both with content, and nothing but whitespace around them; else 0.

    Args:
        prompt_opens_think: the chat template ends the prompt with "<think>", so the completion
            starts inside of it.
    """
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


_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_Box = tuple[float, float, float, float]  # x1, y1, x2, y2
_Extent = tuple[float, float]  # how many units an image is wide and high

BoxFormat = Literal["xyxy", "xywh"]
BoxUnits = Literal["pixels", "fraction", "thousandths"]

_UNITS: dict[BoxUnits, _Extent | None] = {
    "pixels": None,
    "fraction": (1.0, 1.0),
    "thousandths": (1000.0, 1000.0),
}
_OUTSIDE = 0.02
"""By how much of the image's side a true box may reach over its edge; annotators' boxes do, by a
pixel or two. More means that the truth is in other units."""


def iou(
    sample: RewardSample,
    *,
    box_format: BoxFormat = "xyxy",
    units: BoxUnits = "pixels",
    answer_units: BoxUnits = "pixels",
    threshold: float | None = None,
) -> float:
    """Intersection over union of the box in the answer and the true one, in [0, 1].

    The answer's box is [x1, y1, x2, y2] with x1 < x2 and y1 < y2; without one the reward is 0, and
    of several the last counts. What of it lies outside of the image counts as not overlapping.

    Pixels of the truth are those of the image's file, pixels of the answer those of the image as
    the model sees it, after resizing; the sizes of the row's first image connect the two. In a row
    without images both are the same pixels.

    Args:
        box_format: of the truth, "xyxy" or "xywh" (x1, y1, width, height).
        units: of the truth: "pixels", "fraction" (0 to 1 over the image's sides) or "thousandths".
        answer_units: of the answer: what the model was trained to write. Qwen2.5-VL writes
            pixels, Qwen2-VL and Qwen3-VL thousandths.
        threshold: if given, the reward is 1 for an overlap above it and 0 for one up to it.

    Raises:
        ValueError: the truth is no such box, is smaller than a pixel, or lies outside of the image.
    """
    original = _extent(units, sample.entry.get(ORIGINAL_IMAGE_SIZES))
    seen = _extent(answer_units, sample.entry.get(MODEL_IMAGE_SIZES))
    if (original is None) != (seen is None):
        raise ValueError(
            f"the truth is in {units} and the answer in {answer_units}, but the row has no image "
            f"whose size would connect them"
        )
    truth = _true_box(sample.answer, box_format, units)
    box = _box(extract_answer(sample.completion))
    if original is not None and seen is not None:
        truth = _inside(_relative(truth, original), sample.answer, units)
        box = None if box is None else _relative(box, seen)
    overlap = 0.0 if box is None else _overlap(box, truth)
    return overlap if threshold is None else float(overlap > threshold)


def _extent(units: BoxUnits, sizes: Any) -> _Extent | None:
    """Width and height of the row's first image in the given units; None for pixels of a row
    without images."""
    if units != "pixels" or not sizes:
        return _UNITS[units]
    width, height = sizes[0]
    return float(width), float(height)


def _true_box(answer: Any, box_format: BoxFormat, units: BoxUnits) -> _Box:
    numbers = _numbers(answer)
    if numbers is not None and box_format == "xywh":
        x1, y1, width, height = numbers
        numbers = (x1, y1, x1 + width, y1 + height)
    if numbers is None or not _is_box(numbers):
        shape = "[x1, y1, x2, y2]" if box_format == "xyxy" else "[x1, y1, width, height]"
        raise ValueError(f"the truth must be a box {shape}, got {answer!r}")
    x1, y1, x2, y2 = numbers
    if units == "pixels" and max(x2 - x1, y2 - y1) <= 1:
        raise ValueError(
            f"the true box {answer!r} is smaller than a pixel: is it in fractions of the image "
            f"(units: fraction)?"
        )
    return numbers


def _numbers(answer: Any) -> _Box | None:
    """Four numbers, as a list or in a text."""
    if isinstance(answer, str):
        found = _BOX.findall(answer)
        values: Any = [float(number) for number in found[-1]] if found else []
    else:
        values = answer if isinstance(answer, list | tuple) else []
    if len(values) != 4 or not all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    ):
        return None
    x1, y1, x2, y2 = map(float, values)
    return x1, y1, x2, y2


def _box(text: str) -> _Box | None:
    """The last box of an answer, if it is one."""
    numbers = _numbers(text)
    return numbers if numbers is not None and _is_box(numbers) else None


def _is_box(box: _Box) -> bool:
    x1, y1, x2, y2 = box
    return x1 < x2 and y1 < y2 and math.isfinite(_area(box))


def _relative(box: _Box, extent: _Extent) -> _Box:
    """A box in fractions of the image. Overlaps are the same there: both axes are merely scaled."""
    width, height = extent
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _inside(box: _Box, answer: Any, units: BoxUnits) -> _Box:
    """A true box, cut off at the image's edges."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in box)
    far = any(not -_OUTSIDE <= value <= 1 + _OUTSIDE for value in box)
    if far or not _is_box((x1, y1, x2, y2)):
        raise ValueError(
            f"the true box {answer!r} is not inside its image if it is in {units}; is it in other "
            f"units, or has it another box_format?"
        )
    return x1, y1, x2, y2


def _overlap(box: _Box, truth: _Box) -> float:
    width = max(0.0, min(box[2], truth[2]) - max(box[0], truth[0]))
    height = max(0.0, min(box[3], truth[3]) - max(box[1], truth[1]))
    common = width * height
    return common / (_area(box) + _area(truth) - common)


def _area(box: _Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


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
