"""Numbers in words: "minus seven", "one thousand two hundred thirty-four", "three quarters"."""

from __future__ import annotations

import re
from fractions import Fraction

_ONES = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen",
)
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_SCALES = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "thousand": 10**3}
_DENOMINATORS = {
    "half": 2, "halve": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6,
    "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12,
}  # fmt: skip
_VALUES = {word: value for value, word in enumerate(_ONES)} | {
    word: 10 * value for value, word in enumerate(_TENS, 2)
}
NUMBER_WORDS = frozenset({*_ONES, *_TENS, "hundred", *_SCALES, "hundreds", "thousands", "millions"})

_ONE = "(?:" + "|".join(_ONES[1:10]) + ")"
_BELOW_100 = (
    f"(?:(?:{'|'.join(_TENS)})(?:[- ]{_ONE})?|(?:{'|'.join(sorted(_ONES[1:], reverse=True))}))"
)
_BELOW_1000 = rf"(?:(?:{_BELOW_100}|a) hundred(?:(?: and)? {_BELOW_100})?|{_BELOW_100})"
_CARDINAL = (
    "(?:zero|"
    + rf"(?=\w)(?:(?:{_BELOW_1000}|a) trillion\b(?:,? )?)?"
    + rf"(?:(?:{_BELOW_1000}|a) billion\b(?:,? )?)?"
    + rf"(?:(?:{_BELOW_1000}|a) million\b(?:,? )?)?(?:(?:{_BELOW_1000}|a) thousand\b(?:,? )?)?"
    + rf"(?:(?:and )?{_BELOW_1000})?)"
)
_DENOMINATOR = "(?:" + "|".join(sorted(_DENOMINATORS, reverse=True)) + ")s?"
_SPELLED = re.compile(
    r"(?P<sign>(?:minus|negative) )?(?:"
    rf"(?P<top>{_BELOW_100}|an?)[- ](?P<bottom>{_DENOMINATOR})\b"
    rf"|(?P<whole>{_CARDINAL})\b(?: and (?P<top2>{_BELOW_100}|a)[- ](?P<bottom2>{_DENOMINATOR})\b)?"
    r")(?P<rest>(?![-\w']).*)",
    re.IGNORECASE,
)


def read_spelled(text: str) -> tuple[Fraction, bool, str] | None:
    """The number that a text begins with, whether it is written as a fraction, and the rest."""
    match = _SPELLED.match(text)
    if match is None:
        return None
    top, bottom = match["top"] or match["top2"], match["bottom"] or match["bottom2"]
    value = Fraction(_cardinal(match["whole"] or ""))
    if top:
        numerator = _cardinal(top)
        if (numerator == 1) == bottom.endswith("s"):
            return None  # twenty-fifth is a rank
        value += Fraction(numerator, _DENOMINATORS[bottom.casefold().removesuffix("s")])
    elif not match["whole"].strip():
        return None
    return -value if match["sign"] else value, bool(top), match["rest"]


def _cardinal(text: str) -> int:
    total = current = 0
    for word in re.findall(r"[a-z]+", text.casefold()):
        if word == "hundred":
            current *= 100
        elif word in _SCALES:
            total += current * _SCALES[word]
            current = 0
        elif word != "and":
            current += 1 if word in ("a", "an") else _VALUES[word]
    return total + current
