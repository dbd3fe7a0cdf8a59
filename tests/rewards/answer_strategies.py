"""Truths of many shapes, for tests/rewards/test_answers.py: each with notations of the right answer
and with answers that are wrong."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from hypothesis import strategies as st

LAYOUTS = (
    "{}",
    "<answer>{}</answer>",
    "So \\boxed{{{}}}",
    "<think>Is it 0, 1 or 2? A or B?</think>\n\n{}",
    "<think>Is it 0, 1 or 2? A or B?</think>\n<answer>\n{}\n</answer>",
)


@dataclass(frozen=True)
class Case:
    truth: object
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    choices: object = None


def spread(digits: str, separator: str) -> str:
    """1234567 with separators of thousands."""
    head = len(digits) % 3
    groups = [digits[:head]] * bool(head) + [digits[i : i + 3] for i in range(head, len(digits), 3)]
    return separator.join(groups)


def listed(right: str, other: str) -> tuple[str, ...]:
    """How policies name several candidates."""
    return (
        f"{right} or {other}",
        f"{other}, {right}",
        f"{other} and {right}",
        f"either {other} or {right}",
        f"not {right}",
        f"It is not {right}.",
        f"maybe {right}",
        f"anything but {right}",
        f"It is {other} or it is {right}.",
        f"{right}; {other}",
        f"\\boxed{{{other}}} \\boxed{{{right}}}",
        f"<answer>{other}</answer><answer>{right}</answer>",
        f"The answer is {right}. No wait, it is {other}.",
        f"<think>{right}",
        f"<answer>{right}",
    )


@st.composite
def integers(draw: st.DrawFn) -> Case:
    n = draw(st.integers(-(10**9), 10**9).filter(lambda n: abs(n) > 1))
    minus, digits = "-" * (n < 0), str(abs(n))
    unit = draw(st.sampled_from(["apples", "cm", "km", "dollars", "\\text{ m}", "\\mathrm{~kg}"]))
    right = [
        f"{n}",
        f"{n}.0",
        f"{n}.",
        f"${n}$",
        f"\\({n}\\)",
        f"**{n}**",
        f"x = {n}",
        f"{n} {unit}",
        f"{minus}{spread(digits, ',')}",
        f"{minus}{spread(digits, '{,}')}",
        minus + spread(digits, "\\,"),
        f"{n}e0",
        f"{minus}{digits[0]}.{digits[1:] or '0'}e{len(digits) - 1}",
        f"{minus}{digits[0]}.{digits[1:] or '0'} \\times 10^{{{len(digits) - 1}}}",
        f"The answer is {n}.",
        f"So it is **{n}**.",
        f"{n - 7} + 7 = {n}",
        f"\\text{{{n}}}",
        f"{n}^\\circ",
        f"{n}\u200b",
        f"n={n}",
    ]
    if n > 0:
        right += [f"+{n}", f"\\${n}", f"€{n}", f"${n}", f"{n} €"]
    else:
        right += [f"\u2212{-n}", f"\u2013{-n}", f"- {-n}"]
    wrong = [
        f"{n + 1}",
        f"{-n}",
        f"{n}0",
        f"{n}x",
        f"{n}i",
        f"{n} - 7 + 7",
        f"{2 * n}/2",
        f"{n}\\sqrt{{2}}",
        f"2x = {n}",
        f"x > {n}",
        f"{n - 1} = {n}",
        f"{n - 1} {n}",
        f"\\pm {n}",
        f"{n}^2",
        f"({n}, {n + 1})",
        f"{n - 1}, {n}, {n + 1}",
        f"x = {n - 1}, x = {n}",
        f"{n}{n}",
        f"{n}!",
        f"{n - 7} + 7",
        f"{n} to {n + 5}",
        f"more than {n}",
        f"\\int_0^{{{n}}} dx",
        "",
        "I do not know",
        *listed(str(n), str(n + 1)),
    ]
    return Case(draw(st.sampled_from([n, str(n), f"#### {n}"])), tuple(right), tuple(wrong))


@st.composite
def decimals(draw: st.DrawFn) -> Case:
    whole, part = draw(st.integers(0, 9999)), draw(st.integers(1, 999).filter(lambda n: n % 10))
    text = f"{whole}.{part:03d}"
    value = Fraction(text)
    right = [
        text,
        f"{text}0",
        f"{value.numerator}/{value.denominator}",
        f"{float(value)!r}",
        f"\\frac{{{value.numerator}}}{{{value.denominator}}}",
        f"{value * 1000}e-3",
        f"{value * 1000} \\times 10^{{-3}}",
        f"${text}$",
        f"{text} m/s",
        f"x = {text}",
        f"It is {text}.",
    ]
    wrong = [
        f"{whole}",
        f".{part:03d}" if whole else "1",
        f"{whole}.{part + 1:03d}",
        f"{text}x",
        f"-{text}",
        f"{text[:-1]}",
        f"{text}1",
        f"{whole},{part:03d}" if whole else "7",
        *listed(text, "0.5"),
    ]
    return Case(draw(st.sampled_from([text, float(value)])), tuple(right), tuple(wrong))


@st.composite
def powers_of_ten(draw: st.DrawFn) -> Case:
    head, exponent = draw(st.integers(11, 99).filter(lambda n: n % 10)), draw(st.integers(-30, 30))
    value = float(f"{head / 10}e{exponent}")
    right = [
        f"{head / 10}e{exponent}",
        f"{head / 10}E{exponent}",
        f"{head}e{exponent - 1}",
        f"{head / 10} \\times 10^{{{exponent}}}",
        f"{head / 10} \\cdot 10^{{{exponent}}}",
        f"{head / 10} * 10^{exponent}",
        f"{head / 10} x 10^{exponent}",
        f"{value!r}",
        f"{Fraction(head) * Fraction(10) ** (exponent - 1)}" if exponent > 0 else f"{value:.40f}",
    ]
    wrong = [
        f"{head / 10}" if exponent else "0",
        f"{head / 10}e{exponent + 1}",
        f"{head / 10}e{-exponent - 1}",
        "10",
        f"{exponent}" if exponent not in (head, 0) else "0.25",
        f"10^{{{exponent}}}",
        *listed(f"{head / 10}e{exponent}", "3"),
    ]
    return Case(value, tuple(right), tuple(wrong))


@st.composite
def fractions(draw: st.DrawFn) -> Case:
    value = draw(st.fractions(-20, 20, max_denominator=97).filter(lambda f: f.denominator > 1))
    top, bottom = value.numerator, value.denominator
    minus, up = "-" * (top < 0), abs(top)
    right = [
        f"{top}/{bottom}",
        f"\\frac{{{top}}}{{{bottom}}}",
        f"\\dfrac{{{top}}}{{{bottom}}}",
        f"{minus}\\frac{{{up}}}{{{bottom}}}",
        f"${minus}\\tfrac{{{up}}}{{{bottom}}}$",
        f"x = {top}/{bottom}",
        f"{2 * top}/{2 * bottom}",
        f"\\text{{{top}/{bottom}}}",
        f"The answer is {top}/{bottom}.",
    ]
    if up > bottom:
        right += [
            f"{minus}{up // bottom} {up % bottom}/{bottom}",
            f"{minus}{up // bottom}\\frac{{{up % bottom}}}{{{bottom}}}",
        ]
    wrong = [
        f"{top}",
        f"{bottom}",
        f"{bottom}/{top}" if up != 1 else "0",
        f"{top + 1}/{bottom}",
        f"{float(value):.4f}1",
        f"{-top}/{bottom}",
        f"\\frac{{{top}}}{{{bottom}}}x",
        f"1 + \\frac{{{top - bottom}}}{{{bottom}}}",
        *listed(f"{top}/{bottom}", "1/101"),
    ]
    truth = draw(st.sampled_from([f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}"]))
    return Case(truth, tuple(right), tuple(wrong))


@st.composite
def formulas(draw: st.DrawFn) -> Case:
    """Roots, multiples of pi, complex numbers, polynomials."""
    a, b = (
        draw(st.integers(2, 40)),
        draw(st.integers(2, 40).filter(lambda n: n not in (4, 9, 16, 25, 36))),
    )
    kind = draw(st.sampled_from(["root", "pi", "complex", "polynomial"]))
    if kind == "root":
        right = [
            f"{a}\\sqrt{{{b}}}",
            f"{a}*sqrt({b})",
            f"\\sqrt{{{a * a * b}}}",
            f"{a} \\cdot \\sqrt{{{b}}}",
            f"{a}√{b}",
        ]
        wrong = [
            f"{a}",
            f"{b}",
            f"\\sqrt{{{b}}}",
            f"{a}\\sqrt{{{b + 1}}}",
            f"-{a}\\sqrt{{{b}}}",
            f"{a * b**0.5:.3f}",
        ]
    elif kind == "pi":
        right = [
            f"{a}\\pi",
            f"{a}π",
            f"{a}*pi",
            f"\\pi \\cdot {a}",
            f"x = {a}\\pi",
            f"{a}\\pi \\text{{ cm}}",
        ]
        wrong = [f"{a}", "\\pi", f"{a + 1}\\pi", f"{a * 3.14}", f"{a}\\pi^2", f"-{a}\\pi"]
    elif kind == "complex":
        right = [f"{a}+{b}i", f"{b}i + {a}", f"{a} + {b} i", f"z = {a}+{b}i"]
        wrong = [f"{a}", f"{b}i", f"{a}-{b}i", f"{b}+{a + 1}i", f"{a}+{b}", f"{a + 1}+{b}i"]
    else:
        right = [
            f"{a}x^2+{b}x-1",
            f"-1 + {b}x + {a}x^2",
            f"{a}*x**2 + {b}*x - 1",
            f"{a}x²+{b}x-1",
            f"f(x) = {a}x^2 + {b}x - 1",
        ]
        wrong = [
            f"{a}",
            f"{a}x^2",
            f"{a}x^2+{b}x",
            f"{a}x^2-{b}x-1",
            f"{a}x+{b}x-1",
            f"{a + 1}x^2+{b}x-1",
        ]
    return Case(
        right[0],
        (*right, f"${right[0]}$", f"It is ${right[0]}$."),
        (*wrong, *listed(right[0], "3")),
    )


@st.composite
def structures(draw: st.DrawFn) -> Case:
    """Pairs, intervals, sets, lists, matrices, equations, ratios."""
    a = draw(st.integers(-50, 50).filter(bool))
    b, c = a + draw(st.integers(1, 9)), a + draw(st.integers(10, 20))
    kind = draw(
        st.sampled_from(
            ["open", "half", "set", "list", "matrix", "line", "assignment", "union", "two"]
        )
    )
    if kind == "open":
        right = [f"({a}, {b})", f"({a},{b})", f"\\left({a}, {b}\\right)", f"({a}.0, {b})"]
        wrong = [
            f"[{a}, {b}]",
            f"({b}, {a})",
            f"{a}",
            f"({a}, {b}]",
            f"({a}, {b}, {c})",
            f"({a}, {c})",
            f"{a}, {b}",
        ]
    elif kind == "half":
        right = [
            f"[{a}, {b})",
            f"\\left[{a},{b}\\right)",
            f"{a} \\le x < {b}",
            f"{a} ≤ x < {b}",
            f"x \\in [{a},{b})",
        ]
        wrong = [f"({a}, {b})", f"[{a}, {b}]", f"{a} < x < {b}", f"{a}", f"[{a}, {c})", f"x < {b}"]
    elif kind == "set":
        right = [
            f"\\{{{a}, {b}, {c}\\}}",
            f"{{{c}, {a}, {b}}}",
            f"{a}, {b}, {c}",
            f"\\left\\{{{b},{a},{c}\\right\\}}",
        ]
        wrong = [
            f"\\{{{a}, {b}\\}}",
            f"\\{{{a}, {b}, {c}, {c + 1}\\}}",
            f"{a}",
            f"\\{{{a}, {b}, {c + 1}\\}}",
        ]
    elif kind == "list":
        right = [
            f"{a}, {b}, {c}",
            f"{a}, {b} and {c}",
            f"x = {a}, x = {b}, x = {c}",
            f"{c}; {b}; {a}",
        ]
        wrong = [
            f"{c}",
            f"{a}, {b}",
            f"{a}, {b}, {c}, {c + 1}",
            f"{a}, {b}, {c + 1}",
            f"{a} {b} {c} {c + 1}",
        ]
    elif kind == "matrix":
        right = [
            f"\\begin{{pmatrix}} {a} & {b} \\\\ {c} & 0 \\end{{pmatrix}}",
            f"\\begin{{bmatrix}}{a}&{b}\\\\{c}&0\\end{{bmatrix}}",
            f"\\begin{{pmatrix}}\n{a} & {b}\\\\\n{c} & 0\n\\end{{pmatrix}}",
            f"[[{a}, {b}], [{c}, 0]]",
        ]
        wrong = [
            f"{a}",
            f"\\begin{{pmatrix}} {a} & {c} \\\\ {b} & 0 \\end{{pmatrix}}",
            f"\\begin{{pmatrix}} {a} & {b} \\end{{pmatrix}}",
            f"\\begin{{pmatrix}} {a} & {b} \\\\ {c} & 1 \\end{{pmatrix}}",
        ]
    elif kind == "line":
        right = [
            f"3x + {c + 60}y = {b}",
            f"{c + 60}y + 3x = {b}",
            f"6x + {2 * (c + 60)}y = {2 * b}",
            f"3x+{c + 60}y-({b})=0",
        ]
        wrong = [
            f"{b}",
            f"3x + {c + 60}y = {b + 1}",
            f"3x + {c + 60}y",
            f"3x - {c + 60}y = {b}",
            f"x = {b}",
        ]
    elif kind == "assignment":
        right = [f"x = {a}", f"{a}", f"x={a}.0", f"{a} = x", f"$x = {a}$"]
        wrong = [
            f"y = {a}",
            f"2x = {2 * a}",
            f"x + 1 = {a + 1}",
            f"x = {b}",
            "x",
            f"x = {a}, {b}",
            f"x > {a}",
            f"x \\ne {a}",
        ]
    elif kind == "union":
        right = [
            f"(-\\infty, {a}] \\cup ({b}, \\infty)",
            f"({b}, ∞) ∪ (-∞, {a}]",
            f"\\left(-\\infty,{a}\\right]\\cup\\left({b},\\infty\\right)",
        ]
        wrong = [
            f"(-\\infty, {a}]",
            f"(-\\infty, {a}) \\cup ({b}, \\infty)",
            f"({b}, \\infty)",
            f"(-\\infty, {a}] \\cap ({b}, \\infty)",
            f"{a}",
        ]
    else:
        right = [
            f"\\pm {abs(a)}",
            f"{a}, {-a}",
            f"±{abs(a)}",
            f"{a} and {-a}",
            f"x = {a} or x = {-a}",
        ]
        wrong = [f"{a}", f"{-a}", f"{abs(a)}", f"{a}, {-a}, 0", f"\\pm {abs(a) + 1}"]
    return Case(right[0], tuple(right), (*wrong, "", f"not {right[0]}"))


UNITS = [
    ("\\text{ inches}", "inches", "cm"),
    ("\\text{ cm}", "centimeters", "km"),
    (" \\mbox{ inches}^2", "square inches", "cm"),
    ("\\text{ mph}", "miles per hour", "feet"),
    (" dollars", "dollars", "euros"),
    ("^\\circ", "degrees", "radians"),
    ("\\,\\mathrm{kg}", "kilograms", "g"),
    ("\\text{ hours}", "h", "minutes"),
]


@st.composite
def quantities(draw: st.DrawFn) -> Case:
    n, (unit, said, other) = draw(st.integers(2, 10**6)), draw(st.sampled_from(UNITS))
    right = (
        f"{n}{unit}",
        f"{n}",
        f"{n} {said}",
        f"${n}{unit}$",
        f"{spread(str(n), ',')} {said}",
        f"It is {n} {said}.",
    )
    wrong = (
        f"{n} {other}",
        f"{n + 1} {said}",
        said,
        f"{n + 1}",
        *listed(f"{n} {said}", f"{n + 1} {said}"),
    )
    return Case(f"{n}{unit}", right, wrong)


@st.composite
def percentages(draw: st.DrawFn) -> Case:
    n = draw(st.integers(2, 99))
    right = (
        f"{n}%",
        f"{n}\\%",
        f"{n} percent",
        f"{n}",
        f"{n} %",
        f"{n / 100}",
        f"{n}/100",
        f"${n}\\%$",
    )
    wrong = (f"{n * 100}%", f"{n * 100}", f"{n + 1}%", f"{n / 100}%", *listed(f"{n}%", f"{n + 1}%"))
    return Case(draw(st.sampled_from([f"{n}%", f"{n}\\%"])), right, wrong)


WORDS = ["east", "Paris", "New York", "Evelyn", "mitochondria", "blue", "no solution", "Ähre"]


@st.composite
def texts(draw: st.DrawFn) -> Case:
    word, other = draw(st.permutations(WORDS))[:2]
    right = (
        word,
        word.upper(),
        f"{word}.",
        f"\\text{{{word}}}",
        f"$\\text{{{word}}}$",
        f"**{word}**",
        f'"{word}"',
        f"\\(\\text{{{word}}}\\)",
        f"The answer is {word}.",
        f"It is {word}.",
        f"So the answer is **{word}**.",
        f"\\textbf{{{word}}}",
    )
    wrong = (
        other,
        word[::-1],
        word[:-1],
        f"{word}{word}",
        "",
        f"{word}, {other}",
        f"all but {word}",
        f"It is {other}, it is {word}",
        f"Both {word} and {other}",
        *listed(word, other),
    )
    return Case(draw(st.sampled_from([word, f"\\text{{{word}}}"])), right, wrong)


MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August"]


@st.composite
def dates(draw: st.DrawFn) -> Case:
    y, m, d = draw(st.integers(1900, 2099)), draw(st.integers(1, 8)), draw(st.integers(2, 27))
    name = MONTHS[m - 1]
    right = (
        f"{y}-{m:02d}-{d:02d}",
        f"{name} {d}, {y}",
        f"{d} {name} {y}",
        f"{name[:3]} {d}, {y}",
        f"{y}/{m:02d}/{d:02d}",
        f"The answer is {name} {d}, {y}.",
        f"\\text{{{name} {d}, {y}}}",
    )
    wrong = (
        f"{y}-{m:02d}-{d + 1:02d}",
        f"{y + 1}-{m:02d}-{d:02d}",
        f"{name} {y}",
        f"{y}",
        f"{y - m - d}",
        f"{MONTHS[m % 8]} {d}, {y}",
        *listed(f"{name} {d}, {y}", f"{name} {d + 1}, {y}"),
    )
    return Case(draw(st.sampled_from(right[:3])), right, wrong)


@st.composite
def times(draw: st.DrawFn) -> Case:
    hour, minute = draw(st.integers(13, 23)), draw(st.integers(10, 59))
    right = (
        f"{hour}:{minute}",
        f"{hour - 12}:{minute} PM",
        f"{hour - 12}:{minute} p.m.",
        f"{hour - 12}:{minute}pm",
    )
    wrong = (
        f"{hour - 12}:{minute} AM",
        f"{hour}:{(minute + 1) % 60:02d}",
        f"{hour}",
        f"{hour}{minute}",
        f"{hour} or {minute}",
    )
    return Case(draw(st.sampled_from(right[:2])), right, wrong)


OPTION_TEXTS = [
    ["London", "Paris", "Rome", "Berlin"],
    ["A mammal", "A reptile", "A bird", "A fish"],
    ["10", "20", "30", "40"],
    ["\\frac{1}{2}", "\\frac{1}{3}", "2", "\\sqrt{2}"],
    ["5 cm", "6 cm", "7 cm", "8 cm"],
    ["red and blue", "red", "blue", "none of these"],
]


def _shapes(texts: list[str]) -> list[object]:
    letters = "ABCD"
    return [
        texts,
        dict(zip(letters, texts, strict=True)),
        {"text": texts, "label": list(letters)},
        [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)],
        [f"{letter}){text}" for letter, text in zip(letters, texts, strict=True)],
    ]


@st.composite
def options(draw: st.DrawFn) -> Case:
    texts = draw(st.sampled_from(OPTION_TEXTS))
    index, other = draw(st.permutations(range(4)))[:2]
    letter, text, wrong_letter = "ABCD"[index], texts[index], "ABCD"[other]
    right = (
        letter,
        f"({letter})",
        f"{letter}.",
        f"{letter})",
        f"[{letter}]",
        f"**{letter}**",
        f"${letter}$",
        f"\\({letter}\\)",
        f"\\text{{{letter}}}",
        f"\\textbf{{({letter})}}",
        f"\\mathrm{{{letter}}}",
        text,
        f"{letter}) {text}",
        f"{letter}. {text}",
        f"{letter}: {text}",
        f"{letter} - {text}",
        f"({letter}) {text}",
        f"Answer: {letter}",
        f"**Answer:** {letter}",
        f"The answer is ({letter}).",
        f"Option {letter}",
        f"The correct answer is **{letter}**.",
        f"**{letter}**. {text}",
        f"The answer is {text}.",
        f"So the correct option is {letter}) {text}",
        letter.lower(),
    )
    wrong = (
        wrong_letter,
        texts[other],
        f"{letter} or {wrong_letter}",
        f"({letter}) or ({wrong_letter})",
        "ABCD",
        "A) B) C) D)",
        "A/B/C/D",
        "A, B, C, D",
        f"{letter}, {wrong_letter}",
        f"not {letter}",
        f"It is not {letter}.",
        f"{letter}) {texts[other]}",
        f"either {letter} or {wrong_letter}",
        f"{letter} and {wrong_letter}",
        "",
        f"anything but {letter}",
        f"{text}, {texts[other]}",
        f"{letter}. {text} or {wrong_letter}. {texts[other]}",
        " ".join(f"({letter}) {text}" for letter, text in zip("ABCD", texts, strict=True)),
        f"\\boxed{{{letter}}} \\boxed{{{wrong_letter}}}",
        "The answer is a difficult one.",
        f"<think>{letter}",
    )
    truth = draw(
        st.sampled_from([letter, index, text, f"({letter})", f"<answer>{letter}</answer>"])
    )
    return Case(truth, right, wrong, draw(st.sampled_from(_shapes(texts))))


@st.composite
def several_options(draw: st.DrawFn) -> Case:
    texts = OPTION_TEXTS[0]
    first, second = sorted(draw(st.permutations("ABCD"))[:2])
    left = next(letter for letter in "ABCD" if letter not in (first, second))
    right = (
        f"{first}, {second}",
        f"{first} and {second}",
        f"{first}{second}",
        f"({first}), ({second})",
        f"{second}, {first}",
        f"The answer is {first} and {second}.",
        f"\\text{{{first}, {second}}}",
    )
    wrong = (
        first,
        second,
        f"{first}, {left}",
        f"{first}, {second}, {left}",
        "ABCD",
        "A, B, C, D",
        "",
        f"{first} or {left}",
    )
    truth = draw(st.sampled_from([f"{first}, {second}", f"{first}{second}", [first, second]]))
    return Case(truth, right, wrong, texts)
