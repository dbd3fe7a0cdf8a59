"""Multiple choice: which options an answer names, by letter or by text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recap_fast.rewards.commitment import claims, extract_answer
from recap_fast.rewards.equality import same
from recap_fast.rewards.notation import clean, clean_lines, words


@dataclass(frozen=True)
class Options:
    """The options of a question, in order: what each is called, and what it says."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]


def read_options(options: Any) -> Options:
    """Options as data sets write them: a list, {"A": text, ...}, or {"text": [...], "label":
    [...]}. In a list they are called A, B, C, ..., or as their own texts say ("A. 5", "B) 7").

    Raises:
        TypeError: they are not of that form.
        ValueError: labels and texts are not as many, or there are none.
    """
    if isinstance(options, Mapping) and isinstance(options.get("text"), list | tuple):
        texts, labels = options["text"], options.get("label") or _letters(len(options["text"]))
    elif isinstance(options, Mapping):
        # Parquet writes None for the letters that a question does not have.
        kept = {key: text for key, text in options.items() if text is not None}
        labels, texts = list(kept), list(kept.values())
    elif isinstance(options, list | tuple) and options:
        texts = [str(option) for option in options]
        labels = _letters(len(texts))
        labelled = [_OWN_LABEL.match(text) for text in texts]
        if all(m and (m[1] or m[2]) == label for m, label in zip(labelled, labels, strict=True)):
            texts = [text[m.end() :] for text, m in zip(texts, labelled, strict=True) if m]
    else:
        raise TypeError(f"the options must be a list or a mapping, got {options!r}")
    if not texts or len(labels) != len(texts):
        raise ValueError(f"the options need as many labels as texts, got {options!r}")
    return Options(tuple(str(label).strip() for label in labels), tuple(map(str, texts)))


_OWN_LABEL = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])\s*[).:])\s*")


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + index) for index in range(count)]


def right_options(truth: Any, options: Options) -> frozenset[int]:
    """Numbers of the right options. A truth is a letter, a number from 0, a text, or several
    letters, as "A, C", "AC" or a list.

    Raises:
        ValueError: it is none of the options.
    """
    if isinstance(truth, list | tuple) and truth:
        return frozenset().union(*(right_options(one, options) for one in truth))
    found: set[int] = set()
    if isinstance(truth, str):
        text = extract_answer(truth)
        readings = (_by_label, _by_text, _by_labels, _by_label_and_text)
        found = next((named for read in readings if (named := read(text, options))), set())
    elif isinstance(truth, int) and not isinstance(truth, bool) and 0 <= truth < len(options.texts):
        found = {truth}
    if not found:
        raise ValueError(f"the truth {truth!r} is none of the {len(options.texts)} options")
    return frozenset(found)


def names_right_options(answer: str, right: frozenset[int], options: Options) -> bool:
    """Whether an answer names the right options and no other. Options with the same text are the
    same option."""
    for text in (answer, *claims(clean_lines(answer))):
        named = _named(text, options)
        if named is not None:
            return all(
                any(_is_same_option(one, other, options) for one in named) for other in right
            ) and all(any(_is_same_option(one, other, options) for other in right) for one in named)
    return False


def _is_same_option(one: int, other: int, options: Options) -> bool:
    return one == other or words(options.texts[one]) == words(options.texts[other])


def _named(answer: str, options: Options) -> set[int] | None:
    """Numbers of the options that a text names, and nothing besides; None if it is no such text."""
    text = clean(answer)
    for reading in (_by_label, _by_text, _by_label_and_text, _by_labels, _by_texts):
        if found := reading(text, options):
            return found
    return None


_LEAD = r"(?:(?:the )?(?:correct |right |best |final )?(?:answer|option|choice)s?\s*:?\s*)?"
_LABEL = re.compile(
    rf"{_LEAD}[(\[{{]?\s*(\w{{1,2}})\s*[)\]}}]?\s*[.:,]?\s*"
    r"(?:is (?:the )?(?:correct|right|best|answer)(?: (?:answer|option|choice))?\.?)?",
    re.IGNORECASE,
)


def _index(label: str, options: Options) -> int | None:
    for labels in (options.labels, _letters(len(options.texts))):
        if label in labels:
            return labels.index(label)
        if label.upper() in labels:
            return labels.index(label.upper())
    return None


def _by_label(text: str, options: Options) -> set[int]:
    match = _LABEL.fullmatch(clean(text))
    if match is None:
        return set()
    # "a is right" may speak of anything, "A is right" of an option.
    if " is " in text and match[1].islower():
        return set()
    index = _index(match[1], options)
    return set() if index is None else {index}


def _by_text(text: str, options: Options) -> set[int]:
    """Options that say the same letter by letter, or else in another notation."""
    exact = {i for i, option in enumerate(options.texts) if words(option) == words(text)}
    return exact or {i for i, option in enumerate(options.texts) if same(text, option)}


_LABEL_AND_REST = re.compile(
    rf"{_LEAD}(?:[(\[{{]\s*(\w{{1,2}})\s*[)\]}}]\s*[.:,-]?|(\w{{1,2}})\s*[.:)]|([A-Z])\s+[-=]|([A-Z]),?(?=\s))"
    r"\s*(?P<rest>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_LABEL_BESIDE_TEXT = re.compile(r"([A-Z])\s*\((.+)\)|(.+?)\s*[(\[]([A-Z])[)\]]", re.DOTALL)
_HEDGE = re.compile(
    r"\b(?:or|not|nor|neither|either|maybe|perhaps|possibly|wrong|incorrect|false)\b|n't\b", re.I
)


def _by_label_and_text(text: str, options: Options) -> set[int]:
    """ "B) Paris", "B. Paris, as it is the capital": nothing in it may speak of another option."""
    if match := _LABEL_BESIDE_TEXT.fullmatch(text):
        found = _by_label(match[1] or match[4], options) & _by_text(match[2] or match[3], options)
        if found:
            return found
    match = _LABEL_AND_REST.fullmatch(text)
    if match is None:
        return set()
    label = next(group for group in match.groups()[:4] if group)
    index = _index(label, options)
    if index is None:
        return set()
    rest = match["rest"].strip()
    said = _by_text(rest, options)
    if said:
        return {index} if index in said else set()
    if match[4] or len(options.texts[index].split()) == 0:  # "B Paris" only with B's own text
        return set()
    own = words(options.texts[index])
    if not words(rest).startswith(own) and _mentions_another(rest, index, options):
        return set()
    if _HEDGE.search(words(rest).removeprefix(own)) or _other_labels(rest, index, options):
        return set()
    return {index}


def _mentions_another(rest: str, index: int, options: Options) -> bool:
    return any(
        re.search(rf"(?<!\w){re.escape(words(option))}(?!\w)", words(rest))
        for i, option in enumerate(options.texts)
        if i != index and words(option)
    )


def _other_labels(rest: str, index: int, options: Options) -> bool:
    """Whether another option's label stands in a text: "(C)", "C.", or C at its end."""
    found = re.findall(r"[(\[](\w{1,2})[)\]]|(?<![\w'])([A-Z])(?:[.):]|$|\s+(?:and|or|is)\b)", rest)
    indices = {_index(a or b, options) for a, b in found} - {None, index}
    return bool(indices)


_BETWEEN = re.compile(r"\s*[,;&/+]\s*(?:and\s+)?|\s+and\s+|\s+(?=[(\[])|(?<=[)\].])\s+")


def _by_labels(text: str, options: Options) -> set[int]:
    """Several labels: "A, C", "(A) and (C)", "AC"."""
    text = re.sub(rf"^(?:both|options?|{_LEAD})\s+(?=\S)", "", clean(text), flags=re.IGNORECASE)
    parts = [part for part in _BETWEEN.split(text) if part]
    if len(parts) == 1 and re.fullmatch(r"[A-Z]{2,}", text):
        parts = list(text)
    found = [_by_label(part, options) for part in parts]
    named = set().union(*found)
    return named if len(named) == len(parts) > 1 and all(found) else set()


def _by_texts(text: str, options: Options) -> set[int]:
    """Several texts: "red, blue"."""
    parts = [part for part in re.split(r"\s*[,;]\s*(?:and\s+)?|\s+and\s+", text) if part]
    found = [_by_text(part, options) for part in parts]
    return set().union(*found) if len(parts) > 1 and all(found) else set()
