"""Units behind numbers, in one spelling. What may be no unit is none: a number word, an operation,
a doubt would be an answer of its own."""

from __future__ import annotations

import re
from functools import lru_cache

from recap_fast.rewards.doubt import DOUBT
from recap_fast.rewards.spelled import NUMBER_WORDS

ALIASES = {
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
    "mpg": "", "rpm": "", "psi": "", "db": "decibel",
    "kb": "kilobyte", "mb": "megabyte", "gb": "gigabyte", "tb": "terabyte", "byte": "", "hp": "",
    "¥": "yen yuan", "₹": "rupee inr", "₩": "won", "ha": "hectare", "acre": "", "dm": "decimeter",
    "µm": "micrometer micron",
}  # fmt: skip
_UNITS = {word: symbol for symbol, words in ALIASES.items() for word in [symbol, *words.split()]}
SYMBOLS = {
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
SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
_NO_NOUN = re.compile(
    r"(?:and|to|too|than|less|fewer|few|many|much|plus|minus|over|divided|by|isn|is|are"
    r"|was|were|be|am|pm|x|y|z|i|e|point|comma|dot|dozens?|score|factorial|pi|tau|negative"
    r"|positive|below|above|under|beyond|past|remainder|modulo|mod|root|roots|cube|power|powers|exponent|take|away|added"
    r"|choose|half|halves|thirds?|fourths?|quarters?|(?:fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand|\w+lion)ths?"
    r"|doubled?|tripled?|halved|twice|thrice|once|fold|exactly|base|log|ln|sin|cos|tan|sqrt|mega"
    r"|giga|micro|nano|lakhs?|crores?|gross|googols?|so|then|thus|hence|well|first|last|next|after|before|same|on|at|up|down|it"
    r"|this|that|these|those|which|\w+ly|\w*ish|\w+ious|\w+wards?|tbd|etc)"
)
_PLURALS = set(
    re.findall(
        r"\w+",
        "people men women children feet teeth mice geese fish sheep deer oxen cattle dice data",
    )
)
_ADDED = re.compile(
    r"\s+(?:(?:in|of) (?:all|total)|total|altogether|overall|left|remaining|each|apiece|long|wide"
    r"|tall|high|deep|old|away from \w+)$",
    re.IGNORECASE,
)
_INCHES, _FEET = ('"', "″", "''"), ("'", "′")
_UNIT_TOKEN = re.compile(
    r"[^\W\d_]+(?:'s(?![A-Za-z]))?|\^\{?\(?-?\d\)?\}?|\^\\circ|\^\{\\circ\}"
    r"|''|[%$€£¥₹₩¢/·\"'′″]|\\[A-Za-z]+"
)
_MOST_TOKENS, _MOST_NOUNS = 8, 3


@lru_cache(maxsize=2048)
def read_unit(rest: str, *, strict: bool, singular: bool = True) -> tuple[str, ...] | None:
    """Canonical words of a unit; () for none, None for what is no unit.

    Args:
        strict: only what is a unit beyond doubt.
        singular: an unknown noun may be no plural, as there is at most one of it.
    """
    attached = rest[:1].isalpha()
    rest = _ADDED.sub("", f" {rest.strip().rstrip('.')}").strip()
    if not rest:
        return ()
    tokens = _UNIT_TOKEN.findall(rest)
    if (
        len(tokens) > _MOST_TOKENS
        or re.match(r"\^\W*\d|[·]", tokens[0] if tokens else "")
        or "".join(tokens) != re.sub(r"[\s.()]|\\cdot|-(?=[A-Za-z])", "", rest)
    ):
        return None
    if attached and not _may_be_attached(tokens, strict):
        return None
    unit = _canonical_unit(tokens)
    if unit is None or not (strict or _are_nouns(unit, singular or _has_plural(tokens))):
        return None
    if strict and not _is_surely_a_unit(tokens, unit):
        return None
    return tuple(unit)


def _canonical_unit(tokens: list[str]) -> list[str] | None:
    unit: list[str] = []
    power = ""
    for token in tokens:
        lower = token.casefold()
        if token in ("^\\circ", "^{\\circ}", "\\circ"):
            unit.append("deg")
        elif token[0] == "^":
            if not _to_power(unit, token.strip("^{}()")):
                return None
        elif lower in ("squared", "cubed"):
            if not _to_power(unit, "2" if lower[0] == "s" else "3"):
                return None
        elif lower in ("square", "sq", "cubic", "cu"):
            power = "^2" if lower[0] == "s" else "^3"
        elif token in _INCHES or token in _FEET:
            unit.append("in" if token in _INCHES else "ft")
        elif lower in _SPEEDS:
            unit += _SPEEDS[lower]
        elif token[0] == "\\" or _is_no_noun(lower):
            return None
        else:
            unit.append(_canonical(lower))
            unit += [power] if power else []
            power = ""
    return None if power else unit


def _is_no_noun(word: str) -> bool:
    return bool(
        _NO_NOUN.fullmatch(word)
        or DOUBT.search(word)
        or any(
            w in NUMBER_WORDS and w not in SCALES
            for w in (word, word.removesuffix("s"), word.removesuffix("es"))
        )
    )


def _to_power(unit: list[str], power: str) -> bool:
    """km h^{-1} is km/h."""
    if not unit or (unit[-1] not in ALIASES and power not in ("2", "3")):
        return False
    if power[0] == "-":
        unit[-1:] = ["/", unit[-1]]
        power = power[1:]
    if power != "1":
        unit.append(f"^{power}")
    return True


def _are_nouns(unit: list[str], singular: bool) -> bool:
    """Whether what is no known unit may be things that are counted: 5 red apples."""
    words = [word for word in unit if word[0].isalpha() and word not in ALIASES]
    while unit and unit[0] in SCALES:
        unit = unit[1:]
    if any(word in SCALES for word in unit):
        return False
    words = [word for word in words if word not in SCALES]
    if len(words) > _MOST_NOUNS or any(len(word) < 2 for word in words):
        return False
    per = unit.index("/") if "/" in unit else len(unit)
    of = unit.index("of") if "of" in unit else per
    head = unit[: min(per, of)]
    if not head:
        return not unit  # "/six" is a division
    return head[-1] in ALIASES or head[-1][0] in "^%" or singular


def _has_plural(tokens: list[str]) -> bool:
    """Whether the things before "per" and "of" are more than one."""
    head = " ".join(tokens).casefold().replace("/", " per ")
    word = re.split(r"\b(?:per|of|in|a|for|with)\b", f"{head} ")[0].split()[-1:]
    return bool(word) and (word[0] in _PLURALS or bool(re.search(r"[^su]s$", word[0])))


_PHRASE_END = re.compile(
    r"[.,;:!]|\b(?:in|for|on|at|by|with|from|to|of|and|that|which|during|each|when|after|before|as)\b"
)


def leading_unit(rest: str) -> str | None:
    """The known unit that a sentence goes on with behind a number, "" if there is none, None if
    the number goes on."""
    words = _PHRASE_END.split(rest, maxsplit=1)[0].strip(" -").split()[:4]
    if words and words[0].casefold() in ("too", "point", "less", "minus", "plus", "times", "dozen"):
        return None
    if re.match(r"\s*and an?\b", rest):
        return None
    for end in range(len(words), 0, -1):
        phrase = " ".join(words[:end])
        unit = read_unit(f" {phrase}", strict=False)
        if unit and any(word in ALIASES or word in SCALES for word in unit):
            return phrase
    return ""


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
    return first.casefold() in _UNITS or _canonical(first.casefold()) in ALIASES


def _is_surely_a_unit(tokens: list[str], unit: list[str]) -> bool:
    if all(word in ALIASES or word in SCALES or word[0] in "^/%" for word in unit):
        return True
    # One word in small letters: 5 apples.
    return len(tokens) == 1 and len(tokens[0]) > 2 and tokens[0].islower()
