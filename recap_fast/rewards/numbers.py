"""Numbers by value, however they are written, with their units.

Values are exact: 10^16 + 1 is not 10^16. A decimal also stands for the number of which it is a
rounding, if it has at least ten significant digits: 0.3333333333 is 1/3, and 0.333 is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from recap_fast.rewards.notation import clean
from recap_fast.rewards.spelled import read_spelled
from recap_fast.rewards.units import ALIASES, SCALES, SYMBOLS, read_unit

_FEWEST_DIGITS_OF_A_ROUNDING = 10
_FLOAT_DIGITS, _FLOAT_NOISE = 16, Fraction(1, 10**14)  # of 0.1 + 0.2 in the data
_LARGEST_EXPONENT = 400
_LONGEST = 120  # characters

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?!\d)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_CURRENCY = r"(?:(?:US|USD|CA|AU)?\s?\$|€|£|¥|₹|₩|USD\s|EUR\s|GBP\s)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<currency>{_CURRENCY}?)\s*(?P<sign2>[+-]?)\s*(?:"
    rf"(?:(?P<whole>\d+)(?:\s+|\s*-\s*(?=\d+/)))?(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})"
    r"|10\s*\^\s*(?:\{\s*(?P<power>[+-]?\s*\d{1,4})\s*\}|(?P<power2>[+-]?\d{1,4})(?!\d))"
    rf"|(?P<digits>{_DECIMAL})(?:[eE](?P<exponent>[+-]?\d{{1,4}})(?!\d)"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*"
    r"(?:\{\s*(?P<times>[+-]?\s*\d{1,4})\s*\}|(?P<times2>[+-]?\d{1,4})(?!\d)))?"
    r")"
)
_FRACTION = re.compile(
    r"(?<![A-Za-z])\\frac\s*(?:\{\s*([+-]?\s*[\d.,]+)\s*\}|(\d))\s*"
    r"(?:\{\s*([+-]?\s*[\d.,]+)\s*\}|(\d))"
)
_LINE_FRACTION = re.compile(r"(-?)\(?\s*(-?[\d.]+)\s*\)?\s*/\s*\(\s*([\d.]+)\s*\)")


@dataclass(frozen=True)
class Quantity:
    """A number as it was written."""

    value: Fraction
    unit: tuple[str, ...] = ()
    is_percent: bool = False
    is_fraction: bool = False  # written as one
    digits: int = 0  # significant ones, of a decimal
    last_place: Fraction | None = None  # what the last digit of a decimal counts


@lru_cache(maxsize=4096)
def read_number(text: str, *, strict: bool = False) -> Quantity | None:
    """The number that a text is, and nothing besides but a unit.

    Args:
        strict: what follows must be a unit beyond doubt. Truths are read so: "7 Up" and "5x" are
            no numbers with a unit.
    """
    text = clean(text)
    if len(text) > _LONGEST:
        return None
    text = re.sub(r"^(?:minus|negative)\s+(?=[\d.\\$])", "-", text, flags=re.IGNORECASE)
    if not any(map(str.isdigit, text)):
        return _read_spelled(text, strict=strict)
    text = _NUMERO.sub("", text)
    text = _as_line(text)
    if match := _REPEATING.fullmatch(text):
        return Quantity(_repeating(*match.groups()), is_fraction=True)
    match = _NUMBER.match(text)
    if match is None or (match["sign"] and match["sign2"]):
        return None
    number = _value(match)
    if number is None:
        return None
    unit = read_unit(text[match.end() :], strict=strict, singular=abs(number.value) <= 1)
    if unit is None:
        return None
    while unit and unit[0] in SCALES:
        number, unit = replace(number, value=number.value * SCALES[unit[0]]), unit[1:]
    if currency := match["currency"].strip():
        unit = tuple(dict.fromkeys((SYMBOLS[currency[-1]], *unit)))
    if unit[:1] == ("%",):
        return replace(number, unit=unit[1:], is_percent=True)
    return replace(number, unit=unit)


_NUMERO = re.compile(r"^(?:no\.|nr\.|number|#)\s*(?=\d)", re.IGNORECASE)


def _read_spelled(text: str, *, strict: bool) -> Quantity | None:
    """ "five inches": of a truth only units beyond doubt, as "seven dwarfs" may be a title."""
    found = read_spelled(text)
    if found is None:
        return None
    value, is_fraction, rest = found
    unit = read_unit(rest, strict=strict, singular=abs(value) <= 1)
    if unit is None or (strict and any(word not in ALIASES for word in unit)):
        return None
    number = Quantity(value, is_fraction=is_fraction)
    if unit[:1] == ("%",):
        return replace(number, unit=unit[1:], is_percent=True)
    return replace(number, unit=unit)


_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d{1,20})\}")


def _repeating(sign: str, whole: str, fixed: str, period: str) -> Fraction:
    """0.1\\overline{6} as 1/6."""
    tail = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed)
    value = Fraction(f"{whole or 0}.{fixed or 0}") + tail
    return -value if sign == "-" else value


def _as_line(text: str) -> str:
    """Fractions with a slash, no brackets around all, ^ for powers."""
    text = text.replace("**", "^")
    text = _FRACTION.sub(_fraction_in_line, text).strip()
    if match := _INVERSE.fullmatch(text):
        text = f"1/{int(match[1]) ** int(match[2])}"
    text = re.sub(r"^([+-])\s+", r"\1", text)
    if match := _LINE_FRACTION.fullmatch(text):
        text = f"{match[1]}{match[2]}/{match[3]}"
    match = re.fullmatch(r"([+-]?)[(\[{⦃]\s*([^()\[\]{}⦃⦄]*?)\s*[)\]}⦄]", text)
    return match[1] + match[2] if match else text


_INVERSE = re.compile(r"(\d{1,9})\s*\^\s*\{?\s*\(?-\s*(\d{1,2})\)?\s*\}?")


def _fraction_in_line(match: re.Match[str]) -> str:
    """1/2 of \\frac{1}{2}, with the sign of the whole in front."""
    top, bottom = match[1] or match[2], match[3] or match[4]
    if bottom[0] in "+-":
        sign = "" if (bottom[0] == "-") == (top[0] == "-") else "-"
        top, bottom = sign + top.lstrip("+- "), bottom.lstrip("+- ")
    return f" {top}/{bottom}"


def _value(match: re.Match[str]) -> Quantity | None:
    sign = -1 if "-" in (match["sign"], match["sign2"]) else 1
    if match["top"]:
        top, bottom, whole = _plain(match["top"]), _plain(match["bottom"]), match["whole"]
        if not bottom or (whole and top >= bottom):
            return None
        return Quantity(sign * (int(whole or 0) + top / bottom), is_fraction=True)
    written = (match["digits"] or "1").replace(",", "").replace(" ", "")
    powers = ("power", "power2", "exponent", "times", "times2")
    exponent = int(next((match[p] for p in powers if match[p]), "0").replace(" ", ""))
    if abs(exponent) > _LARGEST_EXPONENT:
        return None
    scale = Fraction(10) ** exponent
    value = sign * _plain(written) * scale
    if "." not in written.rstrip("."):
        return Quantity(value)
    return Quantity(
        value,
        digits=len(written.replace(".", "").lstrip("0")),
        last_place=scale / 10 ** len(written.rpartition(".")[2]),
    )


def _plain(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", "").rstrip(".") or "0")


def is_integer(number: Quantity) -> bool:
    return number.value.denominator == 1


def same_value(one: Quantity, other: Quantity) -> bool:
    """Whether two numbers are equal, their units and percent signs aside."""
    difference = abs(one.value - other.value)
    if not difference:
        return True
    noise = _FLOAT_NOISE * max(abs(one.value), abs(other.value))
    if max(one.digits, other.digits) >= _FLOAT_DIGITS and difference <= noise:
        return True
    for decimal, exact in ((one, other), (other, one)):
        if decimal.last_place is not None and decimal.digits >= _FEWEST_DIGITS_OF_A_ROUNDING:
            places = 1 if exact.is_fraction else Fraction(1, 2)
            # Of two decimals the shorter may be a rounding of the longer one.
            if exact.last_place is None and not exact.is_fraction:
                continue
            if exact.last_place is not None and exact.last_place >= decimal.last_place:
                continue
            if difference <= places * decimal.last_place:
                return True
    return False


def same_number(answer: Quantity, truth: Quantity) -> bool:
    """Whether an answer is the true number.

    A unit may be left out, or added where the truth has none, but not be another. A percentage and
    a plain number are the same if their figures are (5% for 5, 50 for 50%), and by value below
    one: 5% for 0.05, 1/2 for 50%. So 500% is not 5. A fraction that is a whole number is a
    division that was not done: 84/2 is not 42, or questions would be their own answers.
    """
    if not _same_unit(answer.unit, truth.unit):
        return False
    if answer.is_fraction and not truth.is_fraction and is_integer(answer):
        return False
    if answer.is_percent != truth.is_percent and (answer.unit or truth.unit):
        return False
    if answer.is_percent == truth.is_percent:
        return same_value(answer, truth)
    if truth.is_percent:
        by_value = abs(answer.value) < 1 and same_value(_times(answer, 100), truth)
        return same_value(answer, truth) or by_value
    if abs(truth.value) < 1 and not is_integer(truth):
        return same_value(answer, _times(truth, 100))
    return same_value(answer, truth)


def _times(number: Quantity, factor: int) -> Quantity:
    place = None if number.last_place is None else number.last_place * factor
    return replace(number, value=number.value * factor, last_place=place)


def _same_unit(answer: tuple[str, ...], truth: tuple[str, ...]) -> bool:
    if not answer or not truth or answer == truth:
        return True
    return truth[0] == "deg" == answer[0] and 1 in (len(answer), len(truth))
