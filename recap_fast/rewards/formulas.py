"""Formulas: whether two are equal, by math-verify's reading and by their values.

math-verify reads both sides as \\boxed{...}; its other reading, of bare text, takes some number out
of a formula. It is not asked for its verdict, which rounds to six digits: two formulas are equal if
they have the same values, at points of their variables if they have any. That takes milliseconds,
where simplifying may take for ever.
"""

from __future__ import annotations

import cmath
import logging
import math
import re
from collections import Counter
from functools import lru_cache
from typing import Any

from recap_fast.rewards.notation import SET_CLOSE, SET_OPEN

_LONGEST = 400  # characters
_MOST_DIGITS = 60  # of a number
_DEEPEST = 8  # brackets in brackets, if the truth has no more

_COMMANDS = set(
    re.findall(
        r"\w+",
        """
        frac sqrt pi sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp
        times cdot div infty circ alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau
        phi varphi omega psi chi eta kappa xi zeta Delta Omega Phi Sigma Theta overline bar vec hat
        prime lvert rvert vert mathbb to ast star min max lfloor rfloor lceil rceil
        """,
    )
)
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|log|ln|exp|pi|theta"
    r"|alpha|beta|infty)(?![a-z])"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")
_STOP_WORD = re.compile(
    r"(?<![\\A-Za-z])(?:or|and|not|but|is|to|of|if|no|by|it|the|any)(?![A-Za-z])"
)
_EXPONENT = re.compile(r"\^\s*\{?\s*\(?\s*[-+]?\s*(\d+)")
_POWER_OF_POWER = re.compile(
    r"\^\s*(?:\{[^{}]*\}|\([^()]*\)|\w+)\s*\^|\^\s*[{(][^{}()]*\^|\)\s*\^\s*\{?\d{3}"
)
_NUMBER_TOWER = re.compile(r"\d\s*\^\s*[{(]?\s*\d+\s*[})]?\s*\^")
_HEAVY = re.compile(r"\\(?:i?int|iint|oint|sum|prod|lim|binom)(?![A-Za-z])|!")

_EVALUATED = re.compile(
    r"\\(?:[Gg]amma|zeta|[Bb]eta|eta|psi|xi|chi|lambda|Omega|Delta)(?![A-Za-z])"
)
"""Letters that also name functions, whose values sympy works out while it reads them."""


def to_latex(text: str) -> str:
    """Plain spelling of formulas, as sqrt(2)*x**10, in LaTeX."""
    text = text.replace("**", "^").replace("*", r"\cdot ")
    text = _FUNCTION.sub(r"\\\1", text).replace(r"\infty", r"\infty ")
    text = re.sub(r"\\sqrt\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^\s*(-?\d+)", r"^{\1}", text)
    return text.replace(SET_OPEN, r"\{").replace(SET_CLOSE, r"\}")


def is_formula(text: str) -> bool:
    """Whether a text can be read as a formula: it has a sign or a digit, and no words."""
    text = to_latex(text)
    if not re.search(r"[\d\\^+*/=_|-]", text):
        return False
    return not (_WORD.search(text) or _STOP_WORD.search(text) or "$" in text)


def is_readable(text: str, truth: str) -> bool:
    """Whether sympy can be trusted with a formula of the model's. It would write 9^(9^9) out, and
    cannot be interrupted at that; a killed worker costs a whole time limit. What the truth has
    itself is allowed."""
    if len(text) > max(_LONGEST, len(truth)):
        return False
    if Counter(_HEAVY.findall(text)) - Counter(_HEAVY.findall(truth)):
        return False
    commands = set(re.findall(r"\\([A-Za-z]+)", text))
    if commands - _COMMANDS - set(re.findall(r"\\([A-Za-z]+)", truth)):
        return False
    known = _EXPONENT.findall(truth)
    if any(len(e) > 3 and e not in known for e in _EXPONENT.findall(text)):
        return False
    for towers in (_POWER_OF_POWER, _NUMBER_TOWER):
        if towers.search(text) and not towers.search(truth):
            return False
    digits = max(map(len, re.findall(r"\d+", text)), default=0)
    longest = max(map(len, re.findall(r"\d+", truth)), default=0)
    if digits > 3 and _EVALUATED.search(text) and not _EVALUATED.search(truth):
        return False
    return digits <= max(_MOST_DIGITS, longest) and _depth(text) <= max(_DEEPEST, _depth(truth))


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


@lru_cache(maxsize=2048)
def _parse(text: str) -> Any:
    """sympy's expression of a formula, or None."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of missing time limits
    found = parse(
        f"\\boxed{{{text}}}",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # it would use SIGALRM; workers have the pool's limit
    )
    return found[0] if found else None


def same_formula(answer: str, truth: str) -> bool:
    """Whether two formulas without relations have the same values."""
    answer, truth = to_latex(answer), to_latex(truth)
    if not (is_readable(answer, truth) and is_formula(answer) and is_formula(truth)):
        return False
    names, true_names = _names(answer), _names(truth)
    if names != true_names and names.lower() == true_names.lower():
        return False  # math-verify takes capitals for small letters
    one, other = _parse(answer), _parse(truth)
    return one is not None and other is not None and _same_values(one, other)


def _names(text: str) -> str:
    """The letters of a formula's variables."""
    return "".join(sorted(set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))))


def proportional(answer: tuple[str, str], truth: tuple[str, str], *, positive: bool) -> bool:
    """Whether two relations, by their left and right sides, are the same up to a factor (which
    must be positive: -x < 0 is not x < 0)."""
    sides = [to_latex(side) for side in (*answer, *truth)]
    if not all(
        is_readable(s, " ".join(sides[2:])) and (s.isalpha() or is_formula(s)) for s in sides
    ):
        return False
    parsed = [_parse(side) for side in sides]
    if any(p is None for p in parsed):
        return False
    ratios = []
    for point in range(_POINTS):
        a, b, c, d = (_value(p, point) for p in parsed)
        if a is None or b is None or c is None or d is None or abs(c - d) < _TINY:
            continue
        ratios.append((a - b) / (c - d))
    if len(ratios) < 2 or abs(ratios[0]) < _TINY:
        return False
    if positive and not ratios[0] > 0:
        return False
    return all(_close(ratio, ratios[0], exact=True) for ratio in ratios)


_POINTS = 5
_TINY = 1e-100
_DIGITS = 30


def _same_values(one: Any, other: Any) -> bool:
    from sympy import Float, oo, zoo

    if one == other:
        return True
    if not hasattr(one, "free_symbols") or not hasattr(other, "free_symbols"):
        return False
    if any(side in (oo, -oo, zoo) for side in (one, other)):
        return False
    exact = not (one.has(Float) or other.has(Float))
    names = {symbol.name for side in (one, other) for symbol in side.free_symbols} - {"i"}
    agreed = 0
    for point in range(_POINTS if names else 1):
        a, b = _value(one, point), _value(other, point)
        if a is None and b is None:
            continue
        if a is None or b is None or not _close(a, b, exact=exact):
            return False
        agreed += 1
    return agreed >= min(2, len(names) + 1)


def _value(expression: Any, point: int) -> Any:
    """Value with thirty digits at one of a few fixed points, None where there is none."""
    from sympy import I, Rational, Symbol

    values = {}
    for symbol in expression.free_symbols:
        seed = sum(ord(c) * 31**k for k, c in enumerate(symbol.name)) % 9973
        number = Rational((seed * (point + 3) * 7919) % 4001 + 37, 1009)
        values[symbol] = I if symbol.name == "i" else number * (-1) ** (point + len(symbol.name))
    try:
        expression = expression.xreplace(values)
        _size(expression)
        value = expression.evalf(_DIGITS)
        if not isinstance(value, Symbol) and value.is_number and value.is_finite is not False:
            return value
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        pass
    return None


def _size(expression: Any) -> complex:
    """About the value, with other functions than powers taken as 1. OverflowError where sympy
    would compute with numbers of a size that takes it hours."""
    if not expression.args:
        return complex(expression) if expression.is_number else 1
    sizes = [_size(part) for part in expression.args]
    if expression.is_Add:
        return sum(sizes)
    if expression.is_Mul:
        return math.prod(sizes)
    if expression.is_Pow:
        return sizes[0] ** sizes[1] if sizes[0] else 0
    if expression.func.__name__ in ("exp", "factorial", "gamma"):
        return cmath.exp(sizes[0] * 4)  # n! is below e^(4n) where floats end
    return 1


def _close(one: Any, other: Any, *, exact: bool) -> bool:
    size = max(abs(one), abs(other))
    if size < _TINY:
        return True
    return bool(abs(one - other) <= size * (1e-20 if exact else 1e-9))
