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
    r"(?<![A-Za-z])\\frac\s*(?:\{\s*([+-]?\s*[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))"
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
    if not any(map(str.isdigit, text)):
        word = _WORDS.get(text.casefold().rstrip("."))
        return None if word is None else Quantity(Fraction(word))
    if len(text) > _LONGEST:
        return None
    text = _as_line(text)
    if match := _REPEATING.fullmatch(text):
        return Quantity(_repeating(*match.groups()), is_fraction=True)
    match = _NUMBER.match(text)
    if match is None or (match["sign"] and match["sign2"]):
        return None
    number = _value(match)
    unit = read_unit(text[match.end() :], strict=strict)
    if number is None or unit is None:
        return None
    if unit and unit[0] in _SCALES:
        number, unit = replace(number, value=number.value * _SCALES[unit[0]]), unit[1:]
    if currency := match["currency"].strip():
        unit = tuple(dict.fromkeys((_SYMBOLS[currency[-1]], *unit)))
    if unit[:1] == ("%",):
        return replace(number, unit=unit[1:], is_percent=True)
    return replace(number, unit=unit)


_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: number for number, word in enumerate(_ONES)} | {
    f"{ten}{between}{one}": 10 * tens + ones
    for tens, ten in enumerate(_TENS, 2)
    for ones, one in enumerate(["", *_ONES[1:10]])
    for between in ("-", " ")[: 2 if one else 0] or ("",)
}
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d{1,20})\}")


def _repeating(sign: str, whole: str, fixed: str, period: str) -> Fraction:
    """0.1\\overline{6} as 1/6."""
    tail = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed)
    value = Fraction(f"{whole or 0}.{fixed or 0}") + tail
    return -value if sign == "-" else value


def _as_line(text: str) -> str:
    """Fractions with a slash, no brackets around all, ^ for powers."""
    text = text.replace("**", "^")
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text).strip()
    text = re.sub(r"^([+-])\s+", r"\1", text)
    if match := _LINE_FRACTION.fullmatch(text):
        text = f"{match[1]}{match[2]}/{match[3]}"
    match = re.fullmatch(r"([+-]?)[(\[{⦃]\s*([^()\[\]{}⦃⦄]*?)\s*[)\]}⦄]", text)
    return match[1] + match[2] if match else text


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
    if answer[: len(truth)] == truth:  # 12 dollars in total
        return answer[len(truth)] not in ("/", "^2", "^3", "of") and truth != ("deg",)
    return truth[0] == "deg" == answer[0] and 1 in (len(answer), len(truth))


# -- units

_ALIASES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre",
    "km": "kilometer kilometre", "nm": "nanometer nanometre", "in": "inch inche", "ft": "foot feet",
    "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram gramme", "kg": "kilogram kilo",
    "lb": "pound lbs", "oz": "ounce", "t": "ton tonne", "ml": "milliliter millilitre",
    "l": "liter litre", "gal": "gallon", "ms": "millisecond", "s": "second sec", "min": "minute",
    "h": "hour hr", "d": "day", "wk": "week", "yr": "year", "mo": "month", "deg": "degree",
    "rad": "radian", "$": "dollar usd buck", "€": "euro eur", "£": "gbp", "¢": "cent",
    "%": "percent percentage pct", "c": "celsius centigrade", "f": "fahrenheit", "k": "kelvin",
    "hz": "hertz", "khz": "kilohertz", "mhz": "megahertz", "j": "joule", "kj": "kilojoule",
    "w": "watt", "kw": "kilowatt", "v": "volt", "a": "ampere amp", "n": "newton", "pa": "pascal",
    "kpa": "kilopascal", "mol": "mole", "ohm": "omega", "kwh": "", "mph": "", "kph": "", "kmh": "",
    "ev": "", "cal": "calorie", "kcal": "kilocalorie", "atm": "atmosphere", "unit": "",
}  # fmt: skip
_UNITS = {word: symbol for symbol, words in _ALIASES.items() for word in [symbol, *words.split()]}
_SYMBOLS = {
    "$": "$",
    "€": "€",
    "£": "£",
    "¥": "¥",
    "₹": "₹",
    "₩": "₩",
    "D": "$",
    "R": "€",
    "P": "£",
}
_SPEEDS = {"mph": ["mi", "/", "h"], "kph": ["km", "/", "h"], "kmh": ["km", "/", "h"]}
_ATTACHED_LETTERS = set("mgsLlhNVWJKAC")  # one letter right behind a number may be a variable
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
_NOT_IN_UNITS = re.compile(
    r"or|and|not|but|to|than|less|more|fewer|if|maybe|plus|minus|over|times|divided|nor|either|isn"
    r"|is|are|was|wrong|no|never|except|x|y|z|i|e|am|pm"
)
_UNIT_TOKEN = re.compile(
    r"[^\W\d_]+(?:'s)?|\^\{?\(?-?\d\)?\}?|\^\\circ|\^\{\\circ\}|[%$€£¥₹₩¢/·\"′″]|\\[A-Za-z]+"
)


@lru_cache(maxsize=2048)
def read_unit(rest: str, *, strict: bool) -> tuple[str, ...] | None:
    """Canonical words of a unit; () for none, None for what is no unit."""
    attached = rest[:1].isalpha()
    rest = rest.strip().rstrip(".")
    if not rest:
        return ()
    tokens = _UNIT_TOKEN.findall(rest)
    if (
        len(tokens) > 8
        or tokens[:1]
        and re.match(r"\^\W*\d", tokens[0])
        or "".join(tokens) != re.sub(r"[\s.()]|\\cdot|-(?=[A-Za-z])", "", rest)
    ):
        return None
    if attached and not _may_be_attached(tokens, strict):
        return None
    unit: list[str] = []
    power = ""
    for token in tokens:
        lower = token.casefold()
        if _NOT_IN_UNITS.fullmatch(lower) or (token.startswith("\\") and token != "\\circ"):
            return None
        if token in ("^\\circ", "^{\\circ}"):
            unit.append("deg")
        elif token[0] == "^":
            unit.append(f"^{token.strip('^{}()')}")
        elif lower in ("square", "sq", "cubic", "squared", "cubed"):
            power = "^2" if lower[0] == "s" else "^3"
            if lower[-1] == "d":
                unit.append(power)
                power = ""
        elif lower in _SPEEDS:
            unit += _SPEEDS[lower]
        else:
            unit.append(_canonical(lower))
            unit += [power] if power else []
            power = ""
    if strict and not _is_surely_a_unit(tokens, unit):
        return None
    return tuple(unit)


def is_unit(word: str) -> bool:
    """Whether a word is one of the known units or scales."""
    return _canonical(word.casefold()) in _ALIASES or word.casefold() in _SCALES


def _canonical(word: str) -> str:
    word = {"per": "/", "mins": "min", "hrs": "h", "secs": "s", "ozs": "oz", "yrs": "yr"}.get(
        word, word
    )
    if word in _UNITS:
        return _UNITS[word]
    singular = word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] != "s" else word
    return _UNITS.get(singular, singular)


def _may_be_attached(tokens: list[str], strict: bool) -> bool:
    first = tokens[0]
    if len(first) == 1:
        return not strict and first in _ATTACHED_LETTERS
    return first.casefold() in _UNITS or _canonical(first.casefold()) in _ALIASES


def _is_surely_a_unit(tokens: list[str], unit: list[str]) -> bool:
    if all(word in _ALIASES or word in _SCALES or word[0] in "^/%" for word in unit):
        return True
    # One word in small letters: 5 apples.
    return len(tokens) == 1 and len(tokens[0]) > 2 and tokens[0].islower()
