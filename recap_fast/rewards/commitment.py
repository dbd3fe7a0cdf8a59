"""What a completion commits to: one final answer, after a finished thought.

Policies under reinforcement find every reading that pays for more than one answer. So an answer is
never looked for among candidates: either a completion says which one it means, or it has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_THOUGHT = re.compile(r"</?think>")
_ANSWER_TAG = re.compile(r"</?answer>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_LONGEST_STATEMENT = 500  # characters; of longer texts the end is read


def extract_answer(completion: str) -> str:
    """The answer that a completion commits to; "" where it commits to none, or to several.

    It stands in <answer>...</answer>, or else in \\boxed{...}, or else after "####", or else it is
    all that follows the thought. A thought or an answer that was opened and never closed is
    unfinished, and so there is none.
    """
    found = commitments(completion)
    return found[0] if len({" ".join(text.split()) for text in found}) == 1 else ""


def commitments(completion: str) -> list[str]:
    """All texts that a completion gives as its final answer: each must be right."""
    text = spoken(completion)
    if "answer>" in text:
        tagged = _in_tags(text)
        if tagged is None:
            return []
        contents, rest = tagged
        boxed = _in_boxes(rest)
        return [] if boxed is None else _distinct([unboxed(c) for c in contents] + boxed)
    boxed = _in_boxes(text)
    if boxed is None:
        return []
    if boxed:
        return _distinct(boxed)
    marked = [line.strip() for line in re.findall(r"^\s*####(.*)", text, re.MULTILINE)]
    return _distinct([line for line in marked if line] or [text.strip()])


def spoken(completion: str) -> str:
    """What follows the thought; nothing if that is unfinished."""
    last = 0
    open_thought = False
    for tag in _THOUGHT.finditer(completion):
        open_thought = tag[0] == "<think>"
        last = tag.end()
    return "" if open_thought else completion[last:]


def _in_tags(text: str) -> tuple[list[str], str] | None:
    """Contents of the answer tags and what follows the last; None if an answer is unfinished."""
    contents: list[str] = []
    start: int | None = None
    end = 0
    for tag in _ANSWER_TAG.finditer(text):
        if tag[0] == "<answer>":
            start = tag.end()
        elif start is not None:
            contents.append(text[start : tag.start()].strip())
            start, end = None, tag.end()
        else:
            return None
    if start is not None or not contents:
        return None
    # "in <answer> </answer> tags" and "<answer>...</answer>" speak of the tags.
    said = [c for c in contents if any(map(str.isalnum, c))] or [c for c in contents if c]
    return said, text[end:]


def _in_boxes(text: str) -> list[str] | None:
    """Contents of the outermost boxes; None if one is unfinished."""
    contents = []
    position = 0
    while match := _BOX.search(text, position):
        end = closing(text, match.end())
        if end is None:
            return None
        contents.append(unboxed(text[match.end() + 1 : end].strip()))
        position = end
    return [content for content in contents if content]


def unboxed(text: str) -> str:
    """A text with boxes replaced by what stands in them."""
    while match := _BOX.search(text):
        end = closing(text, match.end())
        if end is None:
            return ""
        text = text[: match.start()] + text[match.end() + 1 : end] + text[end + 1 :]
    return text.strip()


def closing(text: str, start: int) -> int | None:
    """Where the bracket at `start` is closed, all kinds of brackets of LaTeX taken as one but for
    their escapes."""
    depth = 0
    for index in range(start, len(text)):
        if index and text[index - 1] == "\\" and (index < 2 or text[index - 2] != "\\"):
            continue
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return index
    return None


def _distinct(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))


_DOUBT = re.compile(
    r"\b(?:not|never|no|none|nor|neither|either|or|cannot|without|nothing|nobody|isnt|except"
    r"|unless|if|whether|suppose|assume|assuming|maybe|perhaps|possibly|might|(?-i:may)|could|doubt"
    r"|unlikely|impossible|wrong|incorrect|false|rather|instead|but|between|anything|other)\b|n't\b",
    re.IGNORECASE,
)
"""What makes a statement no plain one: negations, conditions, alternatives, hedges."""
_RETRACTION = re.compile(
    r"\d|\\[A-Za-z]|\b(?:wait|no|not|actually|however|but|or|alternatively|also|instead|maybe"
    r"|perhaps|hmm|unless|except|[B-HJ-Z])\b",
    re.IGNORECASE,
)
_CORRECTION = re.compile(r"(?:(?:so|rather|wait|no)\b,?\s*)*(?:it|I|we)\b", re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?:answer|option|choice|solution|result)\b[^.,=:\n]{0,60}?"
    r"(?:\b(?:is|are|be)\b\s*:?|[:=])\s*(?=\S)",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"(?:the )?(?:(?:final|correct|right|best) )*answer(?: is)?\s*:?", re.IGNORECASE
)
_SAID = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|gives?|gets?|becomes?|makes?|yields?|means?|say|choose"
    r"|pick|select|go with|(?:it|that)'s)\b(?!\s*:)"
    r"|(?<![<>!])=|:(?!//)|\\approx\b|\\Rightarrow\b|->)\s*(?=\S)(?:equal to\s+|exactly\s+)?",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"\b(?:so|thus|hence|therefore|consequently|then|which)\b[,:]?", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Za-z]\.)\s+(?=[^\s.!?])|\n+")


def claims(text: str) -> Iterator[str]:
    """What the final statement of a text claims, from the whole claim to its core: of "So the
    answer is easy: 42." first "easy: 42", then "42".

    Only words may be left out on the way: no number, no comma, no alternative, no negation.
    """
    sentences = _sentences(text)
    if not sentences or _assigns_twice(sentences):
        return
    claim = _named_claim(sentences)
    if claim is None:
        claim = _last_claim(sentences[-1])
    for _ in range(3):
        claim = (claim or "").rstrip(" .")
        if not claim:
            return
        yield claim
        match = _SAID.search(claim)
        if match is None or not _is_mere_words(claim[: match.start()]):
            return
        claim = _what_is_said(claim, match)


def _sentences(text: str) -> list[str]:
    text = text[-_LONGEST_STATEMENT:].strip()
    # The rows of a matrix are no statements.
    text = re.sub(r"\\begin\{.*\\end\{[^}]*\}", lambda m: " ".join(m[0].split()), text, flags=re.S)
    return [part for part in (p.strip() for p in _SENTENCE_END.split(text)) if part]


def _assigns_twice(sentences: list[str]) -> bool:
    """Whether lines give one variable several values: a list of candidates."""
    values: dict[str, set[str]] = {}
    for sentence in sentences:
        if match := re.fullmatch(r"([A-Za-z]\w*)\s*=\s*([-+]?[\d.,/]+)", sentence):
            values.setdefault(match[1], set()).add(match[2].rstrip(".,"))
    return any(len(found) > 1 for found in values.values())


def _named_claim(sentences: list[str]) -> str | None:
    """Of the last "the answer is ..."; where something takes it back, of what is said last."""
    for index in range(len(sentences) - 1, -1, -1):
        sentence = sentences[index]
        if _HEADING.fullmatch(sentence) and index == len(sentences) - 2:
            return sentences[-1]
        match = _NAMED.search(sentence)
        if match is None:
            continue
        before = re.split(r"[,;]", sentence[: match.end()])[-1]
        if _DOUBT.search(before) or sentence.endswith("?"):
            return ""
        if _RETRACTION.search(" ".join(sentences[index + 1 :])):
            return (_CORRECTION.match(sentences[-1]) and _last_claim(sentences[-1])) or ""
        return sentence[match.end() :].strip()
    return None


def _last_claim(sentence: str) -> str | None:
    """Of a statement such as "so it is 42"."""
    if sentence.endswith("?"):
        return None
    concluded = _CONCLUSION.split(sentence)
    last = concluded[-1].strip()
    match = _SAID.search(last)
    if match is None:
        return last if len(concluded) > 1 else None
    if _DOUBT.search(last[: match.start()]):
        return None
    return _what_is_said(last, match)


def _what_is_said(text: str, match: re.Match[str]) -> str:
    """What follows a verb; of an equation in a sentence the equation."""
    said = text[match.end() :].strip()
    left = _left_side(text[: match.start()]) if match[0][0] in "=\\" else ""
    return f"{left} = {said}" if left else said


def _left_side(before: str) -> str:
    """The formula at the end of a text: "48 + 24" of "she sold 48 + 24"."""
    tokens = before.split()
    start = len(tokens)
    while (
        start
        and not _WORD_IN_PROSE.fullmatch(tokens[start - 1])
        and tokens[start - 1][-1] not in ",;:"
    ):
        start -= 1
    return " ".join(tokens[start:])


_WORD_IN_PROSE = re.compile(r"[A-Za-z]?[a-z']+[a-z]")


def _is_mere_words(text: str) -> bool:
    return not re.search(r"[\d,;\\]|\band\b|\b[A-Z]\.\s", text) and not _DOUBT.search(text)


_NUMBER_IN_PROSE = re.compile(
    r"(?<![\w.,^/*+\-\\)(\[{}])[-+]?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?\s?%?"
    r"(?![\w^/*+\\)(\[{]|[.,]\d|-\d|!\s*\.)"
)
_INEXACT = re.compile(
    r"\b(?:more|less|fewer|greater|smaller|larger|bigger) than\b|\bat (?:least|most)\b|\bup to\b"
    r"|\b(?:under|over|above|below|almost|nearly|about|around)\b|[<>]|\bto\s+\d",
    re.IGNORECASE,
)


def only_number(text: str) -> tuple[str, str] | None:
    """The number of a final statement in words that has no other, as it is claimed, and the word
    behind it: "48 + 24 = 72" and "clips" of "She sold 48 + 24 = 72 clips in May." """
    sentences = _sentences(text)
    if not sentences or "?" in sentences[-1]:
        return None
    last = sentences[-1]
    if len(re.findall(r"\b[a-z]{2,}\b", last)) < 2 or _DOUBT.search(last) or _INEXACT.search(last):
        return None
    before, equals, after = last.rpartition("=")
    if equals and ("=" in before) and re.search(r"[,;]|\band\b", before[before.index("=") :]):
        return None
    if re.search(r"\\(?![$%,;! ])", after):
        return None
    found = list(_NUMBER_IN_PROSE.finditer(after))
    if len(found) != 1 or len(re.findall(r"\d[\d.,/]*", after)) != 1:
        return None
    left = _left_side(before) if equals else ""
    unit = re.match(r"\s*-?([A-Za-z]+|\^\S+)", after[found[0].end() :])
    number = found[0][0].strip()
    return f"{left} = {number}" if left else number, unit[1] if unit else ""
