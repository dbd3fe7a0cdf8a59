"""One spelling for what looks the same: Unicode, Markdown, LaTeX's delimiters and wrappers."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT = re.compile(r"[₀₁₂₃₄₅₆₇₈₉]+")
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta",
    "λ": "lambda", "μ": "mu", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi",
    "ω": "omega",
}  # fmt: skip
_GREEK_LETTER = re.compile(r"(?<![α-ω])[αβγδεθλμπρστφω](?![α-ω])")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−‐‑‒–—―﹣－", "-"),
        **dict.fromkeys("⋅·∙•", r"\cdot "),
        **dict.fromkeys("“”„«»〝〞", '"'),
        **dict.fromkeys("‘’‚`´", "'"),
        "×": r"\times ", "÷": "/", "∕": "/", "⁄": "/", "√": r"\sqrt ", "∞": r"\infty ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ",
        "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "°": r"^\circ ", "º": r"^\circ ",
        "⟨": "(", "⟩": ")", "→": r"\to ", "⇒": r"\Rightarrow ", "∶": ":", "٪": "%",
    }
)  # fmt: skip


def _ascii(text: str) -> str:
    """A text with Unicode's variants and mathematical signs spelled as in LaTeX."""
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc"))
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _SUBSCRIPT.sub(lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = "".join(
        f" {unicodedata.normalize('NFKC', c)}"
        if unicodedata.decomposition(c)[:10] == "<fraction>"
        else c
        for c in text
    )  # 2½ is 2 1/2, not 21/2
    text = text.translate(_CHARACTERS)
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    return _GREEK_LETTER.sub(lambda m: f"\\{_GREEK[m[0]]} ", text)


SET_OPEN, SET_CLOSE = "⦃", "⦄"
"""Stand for \\{ and \\}, which are no grouping."""

_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|textsf|emph|mathrm|mathbf|mathit|mathsf|mbox|hbox"
    r"|operatorname\*?|bm|boldsymbol|underline)\s*\{([^{}]*)\}"
)
_PATTERNS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\[()]|(?<!\\)\\[\[\]]", " "),
        (r"\{,\}|,\\!", ","),
        (r"\\[!/]|\\(?:displaystyle|limits|nolimits)(?![A-Za-z])", ""),
        (r"\\(?:left|right)\s*\.", " "),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z])|thinspace|enspace)|~", " "),
        (r"\\(?:[dtc]|nice|s|x)frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(?:leq|leqslant|le)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geq|geqslant|ge)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:neq|ne)(?![A-Za-z])|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:degrees?)(?![A-Za-z])", r"^\\circ "),
        (r"\\(?:langle)(?![A-Za-z])", "("),
        (r"\\(?:rangle)(?![A-Za-z])", ")"),
        (r"\\(?:varnothing|empty)(?![A-Za-z])", r"\\emptyset"),
        (r"\\(?:lbrace(?![A-Za-z])|\{)", SET_OPEN),
        (r"\\(?:rbrace(?![A-Za-z])|\})", SET_CLOSE),
        (r"\\([%#_&])", r"\1"),
        (r"(?<![\w)}])(?:\*\*(?=\S)(.*?\S)\*\*|__(?=\S)(.*?\S)__)(?![\w({])", r"\1\2"),
    )
]  # fmt: skip
_INFINITY = re.compile(r"(?<![A-Za-z\\])(?:infinity|oo)(?![A-Za-z])", re.IGNORECASE)
_MARKED = re.compile(r"[\\*$_~{<>=]")
_PAIRS = [("'", "'"), ('"', '"'), ("*", "*"), ("_", "_"), ("``", "''")]


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """A text without what has no meaning for it: delimiters of formulas, bold, quotes, \\text,
    sizes of brackets, spaces of LaTeX, invisible characters."""
    if not text.isascii() or "`" in text:
        text = _ascii(text)
    text = _INFINITY.sub(r"\\infty ", text.strip())
    if _MARKED.search(text):
        text = _without_dollars(_without_display(text))
        for _ in range(8):  # a wrapper may stand in another
            text, replaced = _WRAPPER.subn(_unwrap, text)
            if not replaced:
                break
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
    text = " ".join(re.sub(r"^#{1,6}\s+", "", text).split())
    for _ in range(4):
        text = _without_quotes(text)
    return text


def clean_lines(text: str) -> str:
    """A text cleaned line by line."""
    return "\n".join(clean(line) for line in text.splitlines())


def _unwrap(match: re.Match[str]) -> str:
    """What \\text{...} holds, apart from a number before it: 5\\text{m}."""
    before = match.string[: match.start()].rstrip()[-1:]
    return f" {match[1]}" if before.isalnum() or before in ("}", ")") else match[1]


_DISPLAY = re.compile(r"\\(?:begin|end)\{(?:align|aligned|equation|gather)\*?\}")


def _without_display(text: str) -> str:
    return _DISPLAY.sub(" ", text).replace("&", "") if _DISPLAY.search(text) else text


def _without_dollars(text: str) -> str:
    """Takes off the $ of formulas and leaves those of amounts."""
    amounts = text.replace(r"\$", "\0")
    if amounts.count("$") % 2 == 0:
        amounts = amounts.replace("$", " ")
    return amounts.replace("\0", "$")


def _without_quotes(text: str) -> str:
    for left, right in _PAIRS:
        inner = text[len(left) : -len(right)]
        if len(text) > 2 and text.startswith(left) and text.endswith(right) and left not in inner:
            return inner.strip()
    return text


_ARTICLE = re.compile(r"(?:the|an?) (?=\w{2})")


@lru_cache(maxsize=4096)
def words(text: str) -> str:
    """A text to be compared letter by letter: without case, closing punctuation, the article."""
    text = clean(text).casefold().rstrip(".,;: ")
    if text[-2:-1].isalpha():
        text = text.rstrip("!")
    return _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text


def split_top(text: str, separators: re.Pattern[str]) -> list[str]:
    """Parts of a text between separators that stand in no bracket."""
    parts: list[str] = []
    start = 0
    depths = _depths(text)
    for match in separators.finditer(text):
        if depths[match.start()] == 0 and match.start() >= start:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def enclosed(text: str) -> bool:
    """Whether the first bracket of a text is closed by its last character. [0, 1) counts."""
    if len(text) < 2 or text[0] not in _OPEN or text[-1] not in _CLOSE:
        return False
    return all(depth > 0 for depth in _depths(text)[1:-1])


_OPEN, _CLOSE = "([{" + SET_OPEN, ")]}" + SET_CLOSE


def _depths(text: str) -> list[int]:
    """How many brackets are open at each character; an opening one is outside of itself."""
    depths = []
    depth = 0
    for character in text:
        if character in _CLOSE:
            depth -= 1
        depths.append(depth)
        if character in _OPEN:
            depth += 1
    return depths
