"""Multiple choice: which options an answer names, by letter or by text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from recap_fast.rewards.commitment import claims, extract_answer
from recap_fast.rewards.equality import same
from recap_fast.rewards.notation import clean, clean_lines, words

_MAX_LETTERED = 26


@dataclass(frozen=True)
class Options:
    """The options of a question, in order: what each is called, what it says, and its number from 0
    in the row, where None may stand between them."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    numbers: tuple[int, ...]


def read_options(options: Any) -> Options:
    """Options as data sets write them: a list of texts, a list of {"label", "text"}, {"A": text,
    ...}, or {"text": [...], "label": [...]}; None is no option, as Parquet fills up with it.

    What has no label is called A, B, C, ... by its place. Labels that the texts carry too ("A. 5",
    "B) 7") are taken off these. None and empty lists have no options.

    Raises:
        TypeError: they are not of that form.
        ValueError: labels and texts are not as many, two labels are the same, or options without
            labels are more than the letters.
    """
    kept = [
        (number, label, text)
        for number, (label, text) in enumerate(_pairs(options))
        if text is not None
    ]
    for number, label, text in kept:
        if not isinstance(text, str | int | float) or not isinstance(label, str | int | None):
            raise TypeError(f"an option must be a text or a number, got {text!r} ({label!r})")
        if label is None and number >= _MAX_LETTERED:
            raise ValueError(f"only {_MAX_LETTERED} options have letters: give them labels")
    labels = [_bare_label(label, number) for number, label, _ in kept]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two options have the same label: {labels}")
    texts = _without_labels([str(text) for _, _, text in kept], labels)
    return Options(tuple(labels), tuple(texts), tuple(number for number, _, _ in kept))


def _pairs(options: Any) -> list[tuple[Any, Any]]:
    """Label (None if it has none) and text of each option."""
    if options is None:
        return []
    if isinstance(options, list | tuple):
        return [
            (one.get("label"), one["text"])
            if isinstance(one, Mapping) and "text" in one
            else (None, one)
            for one in options
        ]
    if not isinstance(options, Mapping):
        raise TypeError(f"the options must be a list or a mapping, got {options!r}")
    texts, labels = options.get("text"), options.get("label")
    if not isinstance(texts, list | tuple) and options.keys() != {"label", "text"}:
        return list(options.items())
    labels = [None] * len(texts or ()) if labels is None or labels == [] else labels
    if not isinstance(labels, list | tuple) or not isinstance(texts or [], list | tuple):
        raise TypeError(f"labels and texts must be lists, got {options!r}")
    if len(labels) != len(texts or ()):
        raise ValueError(f"the options need as many labels as texts, got {options!r}")
    return list(zip(labels, texts or (), strict=True))


def _bare_label(label: str | int | None, number: int) -> str:
    """A label without brackets and points; the letter of its place for none."""
    bare = "" if label is None else str(label).strip().strip("()[]{}.: ")
    return bare or _letters(number + 1)[number]


def _without_labels(texts: list[str], labels: list[str]) -> list[str]:
    """Texts without their own labels, if all have them."""
    found = [
        # "1.5" is no option called 1.
        re.match(
            rf"\s*(?:\({re.escape(label)}\)|{re.escape(label)}\s*[).:]"
            rf"{'(?=[^0-9])' if label[-1].isdigit() else ''})\s*(?=\S)",
            text,
        )
        for text, label in zip(texts, labels, strict=True)
    ]
    if not all(found):
        return texts
    return [text[match.end() :] for text, match in zip(texts, found, strict=True) if match]


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + index) for index in range(count)]


def right_options(truth: Any, options: Options) -> frozenset[int]:
    """Indices of the right options. A truth is a label, a number from 0, a text, or several
    labels, as "A, C", "AC" or a list.

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
    elif isinstance(truth, int) and not isinstance(truth, bool) and truth in options.numbers:
        found = {options.numbers.index(truth)}
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
    text = words(options.texts[one])
    return one == other or (text != "" and text == words(options.texts[other]))


def _named(answer: str, options: Options) -> set[int] | None:
    """Indices of the options that a text names, and nothing besides; None if it is no such text."""
    text = clean(answer)
    # "A, B" are two letters even where an option is "A and B"; "1/2" is a number.
    are_letters = all(label.isalpha() for label in options.labels)
    first, second = (_by_labels, _by_text) if are_letters else (_by_text, _by_labels)
    readings = (_by_label, _by_exact_text, first, second, _by_label_and_text)
    for reading in (*readings, _by_labels_and_texts, _by_texts):
        if found := reading(text, options):
            return found
    return None


_LEAD = (
    r"(?:i (?:think|believe|choose|pick|select)(?: that)?\s+(?:it(?: is|'s)\s+)?)?"
    r"(?:(?:the )?(?:correct |right |best |final )*(?:answer|option|choice)s?\s*(?:is\b|:)?\s*)?"
)
_VERDICT = (
    r"(?:is (?:the )?(?:correct|right|best|answer)(?: (?:answer|option|choice|one))?(?!\w)\.?)?"
)


def _names(options: Options) -> list[str]:
    """What each option may be called: its label; the letter of its place, where labels are no
    letters."""
    labels = [clean(label) for label in options.labels]
    if any(len(label) == 1 and label.isalpha() for label in labels):
        return labels
    # Labels such as I, II, III look like letters in part: none is read as another's place.
    return labels + [x for x in _letters(len(labels)) if x not in map(str.upper, labels)]


@lru_cache(maxsize=256)
def _label(options: Options) -> str:
    """A pattern of everything that an option is called."""
    found = sorted(_names(options), key=len, reverse=True)
    return "(?:" + "|".join(re.escape(name) for name in found) + r")(?!\w)"


def _index(label: str, options: Options) -> int | None:
    names = _names(options)
    if label not in names:
        names, label = [name.upper() for name in names], label.upper()
    if label not in names:
        return None
    index = names.index(label)
    if index < len(options.labels):
        return index
    return ord(label) - ord("A")  # the letter of its place


def _by_label(text: str, options: Options) -> set[int]:
    match = re.fullmatch(
        rf"{_LEAD}[(\[{{]?\s*({_label(options)})\s*[)\]}}]?\s*[.:,]?\s*{_VERDICT}",
        clean(text),
        re.IGNORECASE,
    )
    if match is None:
        return set()
    # "a is right" may speak of anything, "A is right" of an option.
    if " is " in text[match.start(1) :] and match[1].islower() and len(match[1]) == 1:
        return set()
    index = _index(match[1], options)
    return set() if index is None else {index}


def _by_exact_text(text: str, options: Options) -> set[int]:
    """Options that say the same letter by letter, or but for the points of "D.C."."""
    exact = {i for i, option in enumerate(options.texts) if words(option) == words(text)}
    if exact or not (bare := _without_points(text)):
        return exact
    found = {i for i, option in enumerate(options.texts) if _without_points(option) == bare}
    return found if len(found) == 1 else set()


def _without_points(text: str) -> str:
    """Words without the punctuation in and between them; nothing for what is not mere words."""
    text = words(text)
    if not all(sign.isalpha() or sign in " .,'" for sign in text):
        return ""
    return " ".join(re.sub(r"[.,']", "", text).split())


def _by_text(text: str, options: Options) -> set[int]:
    """Options that say the same, if need be in another notation."""
    exact = _by_exact_text(text, options)
    return exact or {i for i, option in enumerate(options.texts) if same(text, option)}


def _by_label_and_text(text: str, options: Options) -> set[int]:
    """ "B) Paris", "B. Paris, as it is the capital": the option's own text, or a reason, or both,
    and nothing else."""
    label = _label(options)
    beside = rf"({label})\s*\((.+)\)|(.+?)\s*[(\[]({label})[)\]]"
    if match := re.fullmatch(beside, text, re.DOTALL):
        found = _by_label(match[1] or match[4], options) & _by_text(match[2] or match[3], options)
        if found:
            return found
    match = re.fullmatch(
        rf"{_LEAD}(?:[(\[{{]\s*({label})\s*[)\]}}]\s*[.:,-]?|({label})\s*(?:[.:),]|\s[-=](?=\s))"
        rf"|({label})(?=\s))\s*(?P<rest>\S.*)",
        text,
        re.IGNORECASE | re.DOTALL,
    )
    if match is None or (match[3] or "").islower():  # "a bird"
        return set()
    index = _index(next(group for group in match.groups()[:3] if group), options)
    return {index} if index is not None and _adds_nothing(match["rest"], index, options) else set()


_REASON = re.compile(r"(?:^|[\s,;.:(-]+)(?:because|since|as)\b", re.IGNORECASE)
_LONGEST_REASON = 200


def _adds_nothing(rest: str, index: int, options: Options) -> bool:
    """Whether what follows a label is its option's text or a reason that speaks of no other."""
    if _is_text_of(rest, index, options):
        return True
    rest = re.sub(rf"^{_VERDICT}", "", rest, count=1, flags=re.IGNORECASE)
    for match in _REASON.finditer(rest):
        said, reason = rest[: match.start()].strip(" ,;"), rest[match.end() :]
        is_said = not said or _is_text_of(said, index, options)
        if is_said and _is_plain_reason(reason, index, options):
            return True
    return False


_NO_TEXT = {"the", "a", "an", "it", "all", "both", "none", "any", "this", "that", "or", "not", "no"}


def _is_text_of(text: str, index: int, options: Options) -> bool:
    """Whether a text is an option's, or its first words."""
    said = _by_text(text, options)
    if said:
        return index in said
    begun, own = words(text), words(options.texts[index])
    return begun not in _NO_TEXT and re.match(rf"{re.escape(begun)}[\s,;(]", own) is not None


_HEDGE = re.compile(
    r"\b(?:or|not|nor|neither|either|maybe|perhaps|possibly|wrong|incorrect|false|also|too|could"
    r"|might|may|both|others?|another|anything|everything|any|every|everyone|all (?:of|are|the)"
    r"|first|second|third|fourth|fifth|last|above|below|options?|choices?|answers?|but|except"
    r"|unless|if|wait|actually|instead|rather|however|though|although|correct|right|true|well|each"
    r"|rest|remaining|same|equally|likewise|these|those|many|several)\b|n't\b|\?",
    re.IGNORECASE,
)


def _is_plain_reason(reason: str, index: int, options: Options) -> bool:
    if len(reason.split()) < 2 or len(reason) > _LONGEST_REASON or _HEDGE.search(reason):
        return False
    return not _mentions_another(reason, index, options) and not _other_labels(
        reason, index, options
    )


def _mentions_another(reason: str, index: int, options: Options) -> bool:
    said, own = words(reason), words(options.texts[index])
    if own:  # it may hold the text of another
        said = re.sub(rf"(?<!\w){re.escape(own)}(?!\w)", " ", said)
    return any(
        re.search(rf"(?<!\w){re.escape(words(option))}(?:e?s)?(?!\w)", said)
        for i, option in enumerate(options.texts)
        if i != index and words(option)
    )


def _other_labels(reason: str, index: int, options: Options) -> bool:
    """Whether another option's label stands in a reason. "a" and "I" may be words."""
    for match in re.finditer(rf"(?<![\w'])({_label(options)})", reason, re.IGNORECASE):
        before, after = reason[: match.start()][-1:], reason[match.end() :]
        is_marked = before in ("(", "[") or re.match(r"\s*(?:[).:,;]|$|(?:and|is|are)\b)", after)
        is_word = match[1] in ("a", "i", "I") and not is_marked
        if not is_word and _index(match[1], options) != index:
            return True
    return False


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


def _by_labels_and_texts(text: str, options: Options) -> set[int]:
    """Several labels, each with its text: "A. 3, C. 5"."""
    text = re.sub(rf"^{_LEAD}", "", text, flags=re.IGNORECASE)
    label = _label(options)
    marks = re.finditer(rf"(?:^|(?<=[\s,;]))(?:\(({label})\)|({label})[).:])\s*", text)
    found = [(match.start(), match.end(), match[1] or match[2]) for match in marks]
    if len(found) < 2 or found[0][0] > 0:
        return set()
    ends = [start for start, _, _ in found[1:]] + [len(text)]
    named: set[int] = set()
    for (_, start, name), end in zip(found, ends, strict=True):
        said = re.sub(r"(?:[\s,;]|(?:^|\s)and$)+$", "", text[start:end].strip())
        index = _index(name, options)
        if index is None or index not in _by_text(said, options):
            return set()
        named.add(index)
    return named


def _by_texts(text: str, options: Options) -> set[int]:
    """Several texts: "red, blue"."""
    parts = [part for part in re.split(r"\s*[,;]\s*(?:and\s+)?|\s+and\s+", text) if part]
    found = [_by_text(part, options) for part in parts]
    return set().union(*found) if len(parts) > 1 and all(found) else set()
