"""Whether an answer is the truth: the whole of one against the whole of the other.

Both are taken apart alike, into lists, sets, intervals, matrices and relations, until single texts,
numbers and formulas are left to be compared. So a list is never its last item, nor a formula a
number in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from recap_fast.rewards.dates import read_moment
from recap_fast.rewards.doubt import DOUBT, DOUBT_OF_A_NO
from recap_fast.rewards.formulas import is_formula, proportional, same_formula, to_latex
from recap_fast.rewards.notation import SET_CLOSE, SET_OPEN, clean, enclosed, split_top, words
from recap_fast.rewards.numbers import is_integer, read_number, same_number

_SEPARATOR = re.compile(r"\s*[,;]\s*(?:and|or)\s+|\s*[,;]\s*|\s+(?:and|or)\s+|\s*&\s*")
_UNION = re.compile(r"\\cup(?![A-Za-z])|\bU\b")
_RELATION = re.compile(r"\\(le|ge|ne|approx|equiv)(?![A-Za-z])|([<>])|(?<![<>!:])(=)")
_MEMBER = re.compile(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*")
_MATRIX = re.compile(
    r"(?:[A-Za-z]\s*=\s*)?\\begin\{([pbBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}",
    re.DOTALL,
)
_RATIO = re.compile(
    r"(\d+(?:\.\d+)?)\s*(?::|\bto\b)\s*(\d+(?:\.\d+)?)(?:\s*(?::|\bto\b)\s*(\d+(?:\.\d+)?))?"
)
_OR = re.compile(r"\s*[,;]?\s*\bor\b\s*")
_REVERSED = re.compile(r"([\[\]])([^\[\](),;]+[,;][^\[\](),;]+)([\[\]])")
_EMPTY_SET = re.compile(rf"(?:the )?empty set|[{{{SET_OPEN}]\s*[}}{SET_CLOSE}]", re.IGNORECASE)
_ROW_END = re.compile(r"\\\\(?:\s*\[[\d.]+\s*(?:pt|ex|em|mm|cm)\])?")
_MOST_ITEMS = 50
_YES_NO = {"yes", "no", "true", "false"}
_ANY_YES_NO = re.compile(r"\b(?:yes|yeah|yep|no|true|false)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Shape:
    """What a text is made of. `kind` is "one", "list", "set", "tuple", "brackets" ([...]), "["
    and "(" (half-open intervals, by their closed and open left end), "union", "matrix", "ratio",
    "relation" (with `signs` between the parts) or "nothing", which equals nothing."""

    kind: str
    parts: tuple[str, ...]
    signs: tuple[str, ...] = ()


def same(answer: str, truth: str) -> bool:
    """Whether an answer, given as a text, is the true one."""
    if answer == truth:
        return True
    if words(answer) == words(truth) and not _depends_on_case(clean(truth)):
        return bool(words(answer))
    true_moment = read_moment(clean(truth))
    if true_moment is not None:
        return read_moment(clean(answer)) == true_moment
    true_number = read_number(truth, strict=True)
    if true_number is not None:
        number = read_number(answer)
        if number is not None:
            return same_number(number, true_number)
    if _is_plain_text(truth):
        return _is_same_word(clean(answer), words(truth))
    return _same_shape(shape(clean(answer)), shape(clean(truth)))


def _depends_on_case(truth: str) -> bool:
    """a + b is not A + B."""
    return bool(re.search(r"[=+*^\\<>]", truth)) and not re.search(r"[A-Za-z]{3}", truth)


def _is_plain_text(truth: str) -> bool:
    return truth.isascii() and truth.replace(" ", "").isalpha() and not _SEPARATOR.search(truth)


_LETTER_LEAD = re.compile(r"^(?:the )?(?:answer|option|choice)\s*:?\s+(?=\S)", re.IGNORECASE)


def _is_same_word(answer: str, truth: str) -> bool:
    """A letter as options are named, or a yes or no with its reason."""
    if len(truth) == 1:
        answer = _LETTER_LEAD.sub("", answer)
        match = re.fullmatch(r"(?:[(\[{]\s*)?([A-Za-z])\s*(?:[)\]}.:]\s*)*", answer)
        if match:
            return match[1].casefold() == truth
        match = re.fullmatch(r"[(\[]?([A-Z])\s*(?:[)\]][.:]?|[.:]|\s-)\s+(.*)", answer, re.DOTALL)
        return (
            match is not None
            and match[1].casefold() == truth
            and not re.search(
                r"(?<![A-Za-z'])[B-HJ-Z](?![A-Za-z'])|\b(?:or|not|and [A-Z])\b|[(\[][A-Z]", match[2]
            )
        )
    if truth in _YES_NO:
        match = re.match(r"([a-z]+)\s*[,.;:-]\s", answer.casefold())
        if match is None or match[1] != truth:
            return False
        reason = answer[match.end() :]
        doubt = DOUBT if truth in ("yes", "true") else DOUBT_OF_A_NO
        return not (doubt.search(reason) or _ANY_YES_NO.search(reason))
    match = re.fullmatch(r"\(([^()]*)\)", answer)
    if match and words(match[1]) == truth:
        return True
    # xy as x \\cdot y
    factors = re.sub(r"\\(?:cdot|times)(?![A-Za-z])|\*|\s", "", answer)
    return len(truth) <= 3 and factors != answer and factors == truth


@lru_cache(maxsize=4096)
def shape(text: str) -> Shape:
    """Takes a cleaned text apart, one level."""
    text = _MEMBER.sub("", text.strip().rstrip(".").strip())
    text = _REVERSED.sub(_turned, text)
    if _EMPTY_SET.fullmatch(text):
        return Shape("one", ("\\emptyset",))
    if match := _MATRIX.fullmatch(text):
        return _matrix(match[1], [row.split("&") for row in _ROW_END.split(match[2])])
    union = split_top(text, _UNION)
    if len(union) > 1:
        return Shape("union", tuple(union))
    if enclosed(text):
        return _in_brackets(text)
    if text.count("\\pm") == 1 and not _SEPARATOR.search(text):
        return Shape("list", (text.replace("\\pm", "+"), text.replace("\\pm", "-")))
    if _RATIO.fullmatch(text):
        return Shape("ratio", tuple(re.split(r"\s*(?::|to)\s*", text)))
    items = split_top(text, _SEPARATOR)
    if len(items) > 1:
        if len(split_top(text, _OR)) > 1:
            return _alternatives(items)
        return _both_bounds(items) or _listed("list", items)
    relation = _RELATION.search(text)
    if relation is not None:
        return _relation(text)
    return Shape("one", (text,))


def _alternatives(items: Sequence[str]) -> Shape:
    """ "x = 2 or x = 3" are roots, "x < 1 or x > 3" is a union; else alternatives are no answer."""
    shapes = [shape(item) for item in items] if all(items) else []
    if shapes and all(one.kind == "relation" and len(one.parts) == 2 for one in shapes):
        names = {one.parts[0] for one in shapes}
        if len(names) == 1 and _NAME.fullmatch(min(names)):
            if all(one.signs == ("=",) for one in shapes):
                return _listed("list", items)
            intervals = [_interval(one) for one in shapes]
            if all(intervals):
                return Shape("union", tuple(interval for interval in intervals if interval))
    if shapes and all(_is_interval(item) for item in items):
        return _listed("union", items)
    return _listed("or", items)


def _is_interval(text: str) -> bool:
    return enclosed(text) and shape(text).kind in ("tuple", "brackets", "[", "(")


def _both_bounds(items: Sequence[str]) -> Shape | None:
    """ "x > 0 and x < 5" as (0, 5)."""
    if len(items) != 2 or not all(items):
        return None
    shapes = [shape(item) for item in items]
    if not all(one.kind == "relation" and len(one.parts) == 2 for one in shapes):
        return None
    if shapes[0].parts[0] != shapes[1].parts[0] or not _NAME.fullmatch(shapes[0].parts[0]):
        return None
    lower = [one for one in shapes if one.signs[0] in (">", "ge")]
    upper = [one for one in shapes if one.signs[0] in ("<", "le")]
    if len(lower) != 1 or len(upper) != 1:
        return None
    bounds = f"{lower[0].parts[1]}, {upper[0].parts[1]}"
    return shape(_brackets(lower[0].signs[0] == "ge", bounds, upper[0].signs[0] == "le"))


def _turned(match: re.Match[str]) -> str:
    """[0, 5[ as [0, 5)."""
    return f"{'[' if match[1] == '[' else '('}{match[2]}{']' if match[3] == ']' else ')'}"


def _in_brackets(text: str) -> Shape:
    left, right, inner = text[0], text[-1], text[1:-1].strip()
    items = split_top(inner, re.compile(r"[,;]"))
    if left in ("{", SET_OPEN) and right in ("}", SET_CLOSE):
        if len(items) == 1 and "\\emptyset" in inner:
            return Shape("nothing", ())
        return _listed("set", items) if len(items) > 1 else shape(inner)
    if len(items) == 1:
        is_row = left == "[" and right == "]" and enclosed(inner) and inner[0] == "["
        return (
            shape(inner) if left + right in ("()", "[]") and not is_row else Shape("one", (text,))
        )
    if left + right == "[]" and all(enclosed(item) and item[0] in "[(" for item in items):
        rows = [split_top(item[1:-1], re.compile(r",")) for item in items]
        if len({len(row) for row in rows}) == 1 and all(item[0] == "[" for item in items):
            return _matrix("pmatrix", rows)
    kind = {"()": "tuple", "[]": "brackets"}.get(left + right, left)
    return _listed(kind, items)


def _listed(kind: str, items: Sequence[str]) -> Shape:
    if len(items) > _MOST_ITEMS or not all(items):
        return Shape("nothing", tuple(items))
    return Shape(kind, tuple(items))


def _matrix(environment: str, rows: Sequence[Sequence[str]]) -> Shape:
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    cells = [cell.strip() for row in rows for cell in row]
    if len({len(row) for row in rows}) != 1 or len(cells) > _MOST_ITEMS:
        return Shape("nothing", ())
    is_determinant = environment in ("vmatrix", "Vmatrix")
    return Shape("determinant" if is_determinant else "matrix", (f"{len(rows)} rows", *cells))


def _relation(text: str) -> Shape:
    parts, signs, start = [], [], 0
    for match in _RELATION.finditer(text):
        parts.append(text[start : match.start()].strip())
        signs.append(match[1] or match[2] or match[3])
        start = match.end()
    parts.append(text[start:].strip())
    if not parts[0] and len(parts) == 2 and signs[0] in ("=", "approx", "equiv"):
        return shape(parts[1])  # "= 5"
    return Shape("relation", tuple(parts), tuple(signs)) if all(parts) else Shape("nothing", ())


_UNORDERED = {"list", "set", "union"}
_SEQUENCES = {"list", "tuple", "brackets"}


def _same_shape(answer: Shape, truth: Shape) -> bool:
    if "nothing" in (answer.kind, truth.kind):
        return False
    if answer.kind == truth.kind == "one":
        return _same_leaf(answer.parts[0], truth.parts[0])
    if truth.kind == "or":
        truth = Shape("list", truth.parts)
        answer = Shape("list", answer.parts) if answer.kind == "or" else answer
    if answer.kind == "or":
        return False
    if "relation" in (answer.kind, truth.kind):
        return _same_relation(answer, truth)
    if len(answer.parts) != len(truth.parts):
        return False
    if answer.kind in _UNORDERED and truth.kind in _UNORDERED:
        if "union" in (answer.kind, truth.kind) and answer.kind != truth.kind:
            return False
        if _is_sequence_of_words(truth):
            return _all_same(answer.parts, truth.parts)
        return _same_in_any_order(answer.parts, truth.parts)
    if answer.kind == "ratio" or truth.kind == "ratio":
        return answer.kind == truth.kind and _all_same(answer.parts, truth.parts)
    if answer.kind == "list":
        named = _without_names(answer)
        if named is not answer and truth.kind == "tuple":
            return _all_same(named.parts, truth.parts)
        answer = named
    if answer.kind != truth.kind:
        # Without brackets a pair may be anything, with them it may be an interval.
        both = {answer.kind, truth.kind}
        if not ("list" in both and both <= _SEQUENCES and len(truth.parts) > 2):
            return False
    return _all_same(answer.parts, truth.parts)


def _is_sequence_of_words(truth: Shape) -> bool:
    """Words in a list may have been put in order: "apple, banana". Numbers are roots, mostly."""
    return truth.kind == "list" and all(
        len(part) > 1 and part.replace(" ", "").isalpha() for part in truth.parts
    )


def _without_names(answer: Shape) -> Shape:
    """x = 1, y = 2 is (1, 2)."""
    shapes = [shape(part) for part in answer.parts]
    if not all(s.kind == "relation" and s.signs == ("=",) for s in shapes):
        return answer
    names = [s.parts[0] for s in shapes]
    if names != sorted(set(names)):
        return answer
    return Shape("list", tuple(s.parts[1] for s in shapes))


def _all_same(answer: Sequence[str], truth: Sequence[str]) -> bool:
    return all(same(a, t) for a, t in zip(answer, truth, strict=True))


def _same_in_any_order(answer: Sequence[str], truth: Sequence[str]) -> bool:
    left = list(truth)
    for part in answer:
        match = next((t for t in left if same(part, t)), None)
        if match is None:
            return False
        left.remove(match)
    return True


# -- single things


def _same_leaf(answer: str, truth: str) -> bool:
    """Two things that cannot be taken apart: numbers, formulas, texts."""
    true_number = read_number(truth, strict=True)
    if true_number is None and _same_but_for_spaces(answer, truth):
        return True
    if _RANGE.fullmatch(truth) or _IN_A_BASE.fullmatch(truth) or _IN_A_BASE.fullmatch(answer):
        return False
    number = read_number(answer, strict=true_number is None)
    if true_number is not None:
        if number is not None:
            return same_number(number, true_number)
        # 0.7071067811865476 is a number like \\sqrt{2}/2; 73 is none like 12 + 61, which is a sum
        # that was not done.
        is_long = true_number.digits >= 10 and not is_integer(true_number)
        return is_long and not true_number.unit and same_formula(_unitless(answer), truth)
    return same_formula(_unitless(answer), _unitless(truth))


_IN_A_BASE = re.compile(r"[0-9A-F]+\s*_\s*\{?\d+\}?")
_RANGE = re.compile(r"\d+\s*-\s*\d+")
"""1990-1995 as a truth: years, pages or a score, and no difference that was left undone."""


def _same_but_for_spaces(answer: str, truth: str) -> bool:
    one, other = (
        re.sub(r"_\{(\w+)\}", r"_\1", "".join(to_latex(text).split())) for text in (answer, truth)
    )
    return one == other


_FORMULA_UNIT = re.compile(
    r"(?<=[\d}\)a-z])\s*(?:\^\s*\{?\\circ\s*\}?|(?:square |cubic )?(?:units?|inches|in|cm|mm|km|m"
    r"|ft|feet|meters?|degrees|radians|rad|dollars|seconds?|minutes?|hours?)"
    r"(?:\s*\^\s*\{?[23]\}?)?)\s*$"
)


def _unitless(text: str) -> str:
    """A formula without the unit behind it, as in 2\\pi cm. The unit stands apart."""
    match = re.search(r"\s\S+(?:\s\S+)?$", text)
    return _FORMULA_UNIT.sub("", text) if match or "circ" in text else text


# -- relations

_ASSIGNED = re.compile(
    r"\\?[A-Za-z]+'?(?:_\{?\w+\}?)?|[A-Za-z]\s*(?:\^\{?-1\}?)?\s*\([^()=]*\)|\\?[A-Za-z][A-Za-z ]*"
    r"|\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)|m?\s*\\angle\s*[A-Z]{1,3}|\|?[A-Z]{2}\|?|[A-Za-z\s+*/\\^(){}-]+"
)
_ARITHMETIC = re.compile(r"(?:[\d\s.,+*/()^{}\[\]!%$-]|\\(?:frac|times|cdot|sqrt|div|pi))+")


def _same_relation(answer: Shape, truth: Shape) -> bool:
    if truth.kind == "relation" and answer.kind == "relation":
        return _same_relations(answer, truth)
    if truth.kind == "relation":
        value = _assigned(truth)
        if value is not None:
            return _same_shape(answer, shape(value))
        interval = _interval(truth)
        return interval is not None and _same_shape(answer, shape(interval))
    if (value := _end_of_chain(answer)) is not None:
        return _same_shape(shape(value), truth)
    interval = _interval(answer)
    return interval is not None and _same_shape(shape(interval), truth)


def _assigned(relation: Shape) -> str | None:
    """What a variable is said to be, if that is all that is said."""
    name, value = relation.parts[0], relation.parts[-1]
    if set(relation.signs) != {"="} or len(relation.parts) != 2:
        return None
    if re.fullmatch(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?|[A-Za-z](?:\^\{?-1\}?)?\s*\([A-Za-z]\)", name):
        return value
    return None


def _end_of_chain(answer: Shape) -> str | None:
    """5 of "x = 5" and 73 of "12 + 61 = 73", but nothing of "2x + 1 = 5" and "41 = 42"."""
    if not set(answer.signs) <= {"=", "approx", "equiv"}:
        return None
    parts = answer.parts
    if len(parts) == 2 and _NAME.fullmatch(parts[1]) and read_number(parts[0]) is not None:
        parts = parts[::-1]  # 5 = x
    value = parts[-1]
    for part in parts[:-1]:
        number = read_number(part)
        if number is not None:
            end = read_number(value)
            if end is None or end.value != number.value:
                return None
        elif _ARITHMETIC.fullmatch(part):
            if not _comes_to(part, value):
                return None
        elif re.search(r"\d\s+[A-Za-z]", part):
            return None
        elif part is parts[0] and not _may_be_said_to_be(part):
            return None
    return value


def _comes_to(arithmetic: str, value: str) -> bool:
    """Whether a sum that was written out has the value that it is said to have."""
    end = read_number(value)
    sides = (arithmetic, value if end is None else str(end.value))
    return same_formula(*(re.sub(r"(?<=\d),(?=\d{3})|[$]", "", side) for side in sides))


def _may_be_said_to_be(name: str) -> bool:
    """Whether something can have a value: a name, but no equation's side."""
    return bool(_ASSIGNED.fullmatch(name)) and len(name.split()) < 6 and not DOUBT.search(name)


def _same_relations(answer: Shape, truth: Shape) -> bool:
    if truth.signs == ("=",) and _assigned(truth) is not None:
        # The same name, or the question's own equation would be its solution.
        name, value = truth.parts
        sides = (answer.parts[0], answer.parts[-1])
        if set(answer.signs) != {"="}:
            return False
        for one, other in (sides, sides[::-1]):
            if _same_but_for_spaces(one, name):
                return same(other, value)
        if len(answer.parts) != 2 or not _has_variables(value):
            return False
        return proportional((answer.parts[0], answer.parts[1]), (name, value), positive=False)
    if len(truth.parts) > 2 or len(answer.parts) > 2:
        return _same_chain(answer, truth)
    one, other = answer.parts
    sign = answer.signs[0]
    left, right = truth.parts
    if sign == truth.signs[0]:
        return proportional((one, other), (left, right), positive=sign in _FLIPPED)
    if _FLIPPED.get(sign) == truth.signs[0]:
        return proportional((other, one), (left, right), positive=True)
    return False


def _has_variables(value: str) -> bool:
    """2x + 3 has, so that y = 2x + 3 is a line, but neither 3i nor 5 cm has."""
    if read_number(value, strict=True) is not None or not is_formula(value):
        return False
    return bool(re.search(r"(?<![A-Za-z\\])[a-df-hj-zA-Z](?![A-Za-z])", value))


def _same_chain(answer: Shape, truth: Shape) -> bool:
    """-1 < x < 2 and 2 > x > -1."""
    if len(answer.parts) != len(truth.parts):
        return False
    if answer.signs != truth.signs:
        answer = Shape(
            "relation",
            answer.parts[::-1],
            tuple(_FLIPPED.get(sign, sign) for sign in answer.signs[::-1]),
        )
    return answer.signs == truth.signs and _all_same(answer.parts, truth.parts)


_FLIPPED = {"<": ">", ">": "<", "le": "ge", "ge": "le"}
_NAME = re.compile(r"[A-Za-z]|\\[a-z]+")


def _interval(relation: Shape) -> str | None:
    """x > 3 as (3, \\infty)."""
    parts, signs = relation.parts, relation.signs
    if not set(signs) <= set(_FLIPPED):
        return None
    if len(parts) == 3 and signs[0] in (">", "ge"):
        parts, signs = parts[::-1], tuple(_FLIPPED[sign] for sign in signs[::-1])
    if len(parts) == 3:
        left, right = signs
        if not _NAME.fullmatch(parts[1]) or not {left, right} <= {"<", "le"}:
            return None
        return _brackets(left == "le", f"{parts[0]}, {parts[2]}", right == "le")
    if len(parts) != 2 or bool(_NAME.fullmatch(parts[0])) == bool(_NAME.fullmatch(parts[1])):
        return None
    bound, sign = parts[1], signs[0]
    if _NAME.fullmatch(parts[1]):
        bound, sign = parts[0], _FLIPPED[sign]
    if sign in ("<", "le"):
        return _brackets(False, f"-\\infty, {bound}", sign == "le")
    return _brackets(sign == "ge", f"{bound}, \\infty", False)


def _brackets(closed_left: bool, bounds: str, closed_right: bool) -> str:
    return ("[" if closed_left else "(") + bounds + ("]" if closed_right else ")")
