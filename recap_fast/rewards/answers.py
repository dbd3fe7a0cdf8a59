"""Whether the answer of a completion is right."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from recap_fast.rewards.commitment import (
    claims,
    commitments,
    extract_answer,
    is_marked,
    only_number,
    unboxed,
    written_answers,
)
from recap_fast.rewards.equality import same
from recap_fast.rewards.notation import clean_lines, words
from recap_fast.rewards.numbers import read_number
from recap_fast.rewards.options import Options, names_right_options, read_options, right_options
from recap_fast.rewards.units import leading_unit
from recap_fast.rewards.unreadable import Unreadable, describe
from recap_fast.types import RewardSample

__all__ = ["accuracy", "extract_answer"]


def accuracy(sample: RewardSample, *, choices: str | None = None) -> float:
    """1 if the answer that a completion commits to is the truth, else 0.

    What it commits to is in `recap_fast.rewards.commitment`; several answers are none. The whole of
    it must be the whole truth: the same text (but for case, quotes, closing punctuation), the same
    number however written (`recap_fast.rewards.numbers`), the same date or time, or a formula, set,
    interval, matrix or equation with the same values (`recap_fast.rewards.formulas`). Of a sentence
    the final claim counts: "so the answer is 42".

    Args:
        choices: column of the row with the options (by default the source's `choices`; a row that
            has none there is an open question), in a form of `read_options`. Then the truth may be
            an option's letter, its number from 0, its text, or several letters, all of which must
            be named. Without options a truth that is a list holds the answers that are accepted.

    Raises:
        ValueError, TypeError, KeyError: the truth or the options are not of that form.
    """
    options = None if choices is None else sample.entry[choices]
    known, right, truths = None, frozenset[int](), list[str]()
    if options is None or options in ([], (), {}):
        truths = read_truths(sample.answer)
    else:
        known = read_options(options)
        right = right_options(sample.answer, known)
    try:
        found = commitments(sample.assistant_turn)
        if known is not None:
            return float(_all_name(found, right, known))
        prose = not is_marked(sample.assistant_turn)
        return float(any(_all_are(found, truth, prose=prose) for truth in truths))
    except (Exception, SystemExit) as error:  # noqa: BLE001 (parsers raise anything)
        return Unreadable(describe(error))


def read_truths(answer: Any) -> list[str]:
    """The accepted answers of a row, as texts.

    Raises:
        ValueError: one is empty, or no finite number.
        TypeError: it is neither a text nor a number nor a list of such.
    """
    if isinstance(answer, list | tuple):
        if not answer:
            raise ValueError("the truth is an empty list")
        return [_truth_text(one) for one in answer]
    return [_truth_text(answer)]


def _truth_text(answer: Any) -> str:
    if isinstance(answer, int | float | Decimal | Fraction) and not isinstance(answer, bool):
        if not math.isfinite(answer):
            raise ValueError(f"the truth must be a finite number, got {answer!r}")
        return str(answer)
    if not isinstance(answer, str):
        raise TypeError(f"the truth must be a text, a number or a list of such, got {answer!r}")
    text = _true_answer(answer)
    if not words(text).strip(" $*\\{}\"'`.,;:") or words(text).lstrip("+-") in _NO_NUMBERS:
        raise ValueError(f"the truth {answer[:200]!r} says nothing")
    return text


_NO_NUMBERS = {"nan", "inf"}


@lru_cache(maxsize=1024)
def _true_answer(text: str) -> str:
    """A truth without what data sets write around it: GSM8K the solution, then "#### result";
    others keep the tags or the \\boxed{} of a solution, whose last box counts."""
    text = text.rpartition("####")[2].strip()
    if not is_marked(text) and "think>" not in text:
        return text
    found, _ = written_answers(text)
    is_tagged = "<answer>" in text
    return unboxed(found[-1]) if found and not (is_tagged and len(found) > 1) else ""


def _all_name(found: list[str], right: frozenset[int], options: Options) -> bool:
    """Whether all that a completion commits to, or its parts together, name the right options."""
    if len(found) > 1 and names_right_options(", ".join(found), right, options):
        return True
    return bool(found) and all(names_right_options(text, right, options) for text in found)


def _all_are(found: list[str], truth: str, *, prose: bool) -> bool:
    """Whether all that a completion commits to is right, or its parts together: two boxes for two
    roots."""
    if len(found) > 1 and same(", ".join(found), truth):
        return True
    return bool(found) and all(_is_right(text, truth, prose=prose) for text in found)


_PLAIN_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def _is_right(answer: str, truth: str, *, prose: bool) -> bool:
    if _PLAIN_INTEGER.fullmatch(answer) and _PLAIN_INTEGER.fullmatch(truth):
        return int(answer) == int(truth)  # the most frequent case, at no cost
    if same(answer, truth):
        return True
    cleaned = clean_lines(answer)
    if any(same(claim, truth) for claim in claims(cleaned, prose=prose)):
        return True
    if read_number(truth, strict=True) is None:
        return False
    found = only_number(cleaned, prose=prose)
    if found is None:
        return False
    number, behind = found
    unit = leading_unit(behind)
    return unit is not None and same(f"{number} {unit}", truth)
