"""Dates and times of day in their usual notations, where these leave no doubt."""

from __future__ import annotations

import datetime
import re
from functools import lru_cache

_MONTHS = [
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
]  # fmt: skip
_DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_MONTH = "(?P<month>" + "|".join(rf"{name[:3]}(?:{name[3:]})?" for name in _MONTHS) + r"|sept)\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})"
_WEEKDAY = "(?:(?P<weekday>" + "|".join(rf"{n[:3]}(?:{n[3:]})?" for n in _DAYS) + r")\.?,?\s+)?"
_DATES = [
    re.compile(_WEEKDAY + pattern, re.IGNORECASE)
    for pattern in (
        rf"{_MONTH}\s*{_DAY}(?:,?\s*{_YEAR})?",
        rf"(?:the\s+)?{_DAY}(?:\s+of)?[\s-]+{_MONTH}(?:,?[\s-]+{_YEAR})?",
        r"(?P<year>\d{4})(?P<sep>[-/.])(?P<month>\d{1,2})(?P=sep)(?P<day>\d{1,2})(?:T00:00(?::00)?Z?)?",
        rf"{_YEAR},?\s+{_MONTH}\s+{_DAY}",
    )
]
_NUMERIC = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})")
_TIME = re.compile(
    r"(?:at\s+)?(?P<hour>\d{1,2})(?:\s?[:.]\s?(?P<minute>\d{2})(?::(?P<second>\d{2}))?)?\s*"
    r"(?P<half>[ap]\.?\s?m\.?)?(?:\s*(?:o'clock|h|hrs|hours))?",
    re.IGNORECASE,
)
_NOON = {"noon": (12, 0, 0), "12 noon": (12, 0, 0), "midnight": (0, 0, 0), "12 midnight": (0, 0, 0)}

Moment = tuple[str, int | None, int, int]
"""("date", year, month, day) or ("time", hour, minute, second)."""


@lru_cache(maxsize=2048)
def read_moment(text: str) -> Moment | None:
    """The date or time of day that a text is, and nothing besides.

    03/05/2024 may be two dates, so it is none (but it equals itself as a text);
    25/12/2024 is one.
    """
    text = text.strip().rstrip(",")
    if not 2 < len(text) < 40 or not (any(map(str.isdigit, text)) or text.casefold() in _NOON):
        return None
    return _read_date(text) or _read_time(text)


def _read_date(text: str) -> Moment | None:
    for pattern in _DATES:
        if match := pattern.fullmatch(text.rstrip(".")):
            month = match["month"].casefold()
            number = int(month) if month.isdigit() else _month(month)
            year = int(match["year"]) if match["year"] else None
            return _date(year, number, int(match["day"]), match["weekday"])
    if match := _NUMERIC.fullmatch(text):
        first, second, year = int(match[1]), int(match[3]), int(match[4])
        if first == second or first > 12:
            return _date(year, second, first, None)
        if second > 12:
            return _date(year, first, second, None)
    return None


def _month(name: str) -> int:
    return next(i for i, month in enumerate(_MONTHS, 1) if month.startswith(name[:3]))


def _date(year: int | None, month: int, day: int, weekday: str | None) -> Moment | None:
    try:
        date = datetime.date(2000 if year is None else year, month, day)
    except ValueError:
        return None
    if weekday and year and not _DAYS[date.weekday()].startswith(weekday.casefold()[:3]):
        return None
    return "date", year, month, day


def _read_time(text: str) -> Moment | None:
    if text.casefold() in _NOON:
        return ("time", *_NOON[text.casefold()])
    match = _TIME.fullmatch(text)
    if match is None or not (match["half"] or (match["minute"] and ":" in text)):
        return None
    hour, minute, second = (int(match[k] or 0) for k in ("hour", "minute", "second"))
    if match["half"]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if match["half"][0] in "pP" else 0)
    return ("time", hour, minute, second) if hour < 24 and minute < 60 and second < 60 else None
