"""The answer in a completion, and whether it is right."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from recap_fast.types import RewardSample


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
