"""What a completion commits to: one final answer, after a finished thought.

Policies under reinforcement find every reading that pays for more than one answer. So an answer is
never looked for among candidates: either a completion says which one it means, or it has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from recap_fast.rewards.doubt import DOUBT

_THOUGHT = re.compile(r"</?think>")
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_MARKED_LINE = re.compile(r"^[ \t]*####(.*)", re.MULTILINE)
_DENIAL = re.compile(
    r"(?:\b(?:not|never|neither|either|maybe|perhaps|possibly|unlikely|except|than)|n't)"
    r"[\s$\\(\[*:]*$",
    re.IGNORECASE,
)
"""What takes an answer back before it is given."""
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
    found, rest = written_answers(completion)
    text = spoken(completion)
    first = _ANSWER_TAG.search(text) or _BOX.search(text)
    if first and _DENIAL.search(text[: first.start()][-_LONGEST_STATEMENT:]):
        return []
    return [] if _takes_back(rest) else _distinct([*found, *_said_after(rest, found)])


def written_answers(completion: str) -> tuple[list[str], str]:
    """The texts that stand where answers do, and what is said after the last tag or box."""
    text = spoken(completion)
    if _ANSWER_TAG.search(text):
        tagged = _in_tags(text)
        boxed = tagged and _in_boxes(tagged[1])
        if not tagged or not boxed:
            return [], ""
        return _distinct([unboxed(c) for c in tagged[0]] + boxed[0]), boxed[1]
    boxed = _in_boxes(text)
    if boxed is None:
        return [], ""
    if boxed[0]:
        return _distinct(boxed[0]), boxed[1]
    marked = [line for line in _MARKED_LINE.finditer(text) if line[1].strip()]
    if not marked:
        return _distinct([text.strip()]), ""
    return _distinct([line[1].strip() for line in marked]), text[marked[-1].end() :]


def is_marked(completion: str) -> bool:
    """Whether an answer stands in tags, in a box or after ####, and is no prose."""
    text = spoken(completion)
    return any(pattern.search(text) for pattern in (_ANSWER_TAG, _BOX, _MARKED_LINE))


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
        if tag[0][1] != "/":
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


def _in_boxes(text: str) -> tuple[list[str], str] | None:
    """Contents of the outermost boxes, and what follows the last; None if one is unfinished."""
    contents = []
    position = 0
    while match := _BOX.search(text, position):
        end = closing(text, match.end())
        if end is None:
            return None
        contents.append(unboxed(text[match.end() + 1 : end].strip()))
        position = end + 1
    return [content for content in contents if content], text[position:]


def unboxed(text: str) -> str:
    """A text with boxes replaced by what stands in them; "" if one is unfinished."""
    kept: list[str] = []
    open_boxes: list[bool] = []  # of each open bracket, whether it is a box's
    position = 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            box = _BOX.match(text, position)
            if box:
                open_boxes.append(True)
            else:
                kept.append(text[position : position + 2])
            position = box.end() + 1 if box else position + 2
            continue
        if character == "{":
            open_boxes.append(False)
        if character != "}" or not (open_boxes and open_boxes.pop()):
            kept.append(character)
        position += 1
    return "" if any(open_boxes) else "".join(kept).strip()


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


_RETRACTION = re.compile(r"\d|\\[A-Za-z]|\b(?:also|(?-i:[B-HJ-Z]))\b", re.IGNORECASE)
_CORRECTION = re.compile(r"(?:(?:so|rather|wait|no)\b,?\s*)*((?:it|I|we)\b.*)", re.IGNORECASE)
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


_COURTESY = re.compile(
    r"(?:please )?(?:let me know|feel free|(?:I )?hope)\b[^\d\\=]*", re.IGNORECASE
)
_PRAISE = re.compile(r"[^\d\\=]*\b(?:correct|right|above|required)[.! ]*", re.IGNORECASE)
_BARE_NUMBER = re.compile(r"^(?!.*[a-z]{2}).*\d")
_VALUE_SAID = re.compile(
    r"(?:\b(?:is|are|be|was|equals?|say|get|means?)\b|'s\b|[=:]|->)\W*(?:\d|(?-i:[A-Z]\w+)\W*$)",
    re.I,
)


def _takes_back(rest: str) -> bool:
    """Whether something is said after a box or a tag that makes its answer no plain one."""
    sentences = [s for s in _sentences(rest) if not _COURTESY.fullmatch(s)]
    return any(DOUBT.search(s) or s.endswith("?") for s in sentences)


def _said_after(rest: str, found: list[str]) -> list[str]:
    """Answers that are named after a box or a tag; they must be right, too."""
    sentences = [s for s in _sentences(rest) if not _COURTESY.fullmatch(s)]
    sentences = [
        s
        for s in sentences
        if not any(re.search(rf"(?<![\w.,-]){re.escape(text)}[\s.*$!]*$", s) for text in found)
        and not _PRAISE.fullmatch(s)
    ]
    return [s for s in sentences if any(p.search(s) for p in (_NAMED, _VALUE_SAID, _BARE_NUMBER))]


def claims(text: str, *, prose: bool = True) -> Iterator[str]:
    """What the final statement of a text claims, from the whole claim to its core: of "So the
    answer is easy: 42." first "easy: 42", then "42".

    Only words may be left out on the way: no number, no comma, no alternative, no negation.

    Args:
        prose: the text is all that was said. What stands in tags or a box is no place for
            reasons: nothing but names may go before the answer there.
    """
    sentences = _sentences(text)
    if not sentences or _assigns_twice(sentences):
        return
    if not prose and not _is_one_statement(sentences):
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


def _is_a_reason(sentence: str, is_named: bool) -> bool:
    """Whether a sentence may go before an answer: it says something, and proposes no answer; but
    for "the answer is ..." anything may."""
    if DOUBT.search(sentence) or _NAMED.search(sentence):
        return False
    proposes = _SAID.search(sentence) or _CONCLUSION.search(sentence)
    words = re.findall(r"\b[a-z]{2,}\b", sentence)
    return len(words) > 1 if is_named else len(words) > 2 and not proposes


def _is_one_statement(sentences: list[str]) -> bool:
    """Whether a text makes one statement, with no reasons or candidates before what it says."""
    is_named = bool(_NAMED.search(sentences[-1]))
    if not all(_HEADING.fullmatch(s) or _is_a_reason(s, is_named) for s in sentences[:-1]):
        return False
    concluded = _CONCLUSION.split(sentences[-1])
    if any(part.strip(" ,") for part in concluded[:-1]):
        return False
    match = _SAID.search(concluded[-1])
    if match is None:
        return True
    before = concluded[-1][: match.start()]
    if match[0][:2] == "->":
        return not before.strip()
    if match[0][0] == "=":  # an equation is judged as such
        return not DOUBT.search(before)
    return _is_mere_words(before.rstrip(" ,")) and not _NUMBER_WORD.search(before)


def _sentences(text: str) -> list[str]:
    is_cut = len(text) > _LONGEST_STATEMENT
    text = text[-_LONGEST_STATEMENT:].strip()
    # The rows of a matrix are no statements.
    text = re.sub(r"\\begin\{.*\\end\{[^}]*\}", lambda m: " ".join(m[0].split()), text, flags=re.S)
    parts = [part for part in (p.strip() for p in _SENTENCE_END.split(text)) if part]
    return parts[1:] if is_cut and len(parts) > 1 else parts


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
        if DOUBT.search(before) or sentence.endswith("?"):
            return ""
        after = " ".join(sentences[index + 1 :])
        if _RETRACTION.search(after) or DOUBT.search(after):
            correction = _CORRECTION.fullmatch(sentences[-1])
            return (correction and _last_claim(correction[1])) or ""
        claim = sentence[match.end() :].strip()
        return "" if _names_another(sentences[:index], claim) else claim
    return None


def _names_another(sentences: list[str], claim: str) -> bool:
    """Whether an earlier sentence names another answer. It may deny one, and say so."""
    for sentence in sentences:
        match = _NAMED.search(sentence)
        if match and "answer" in match[0].casefold() and not DOUBT.search(sentence):
            said = sentence[match.end() :].strip()
            if said.strip(" .*$").casefold() != claim.strip(" .*$").casefold():
                return True
    return False


_EXCLAIMED = re.compile(r"(\b(?:it|that)(?:'s| is) [-\d.,]+)!$", re.IGNORECASE)


def _last_claim(sentence: str) -> str | None:
    """Of a statement such as "so it is 42"."""
    sentence = _EXCLAIMED.sub(r"\1", sentence)
    if sentence.endswith("?"):
        return None
    concluded = _CONCLUSION.split(sentence)
    last = concluded[-1].strip()
    match = _SAID.search(last)
    if match is None:
        return last if len(concluded) > 1 else None
    if DOUBT.search(last[: match.start()]):
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


_NUMBER_WORD = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty"
    r"|hundred|thousand|million)\b",
    re.IGNORECASE,
)
_WORD_IN_PROSE = re.compile(r"[A-Za-z]?[a-z']+[a-z]")


def _is_mere_words(text: str) -> bool:
    return not re.search(r"[\d,;\\]|\band\b|\b[A-Z]\.\s", text) and not DOUBT.search(text)


_NUMBER_IN_PROSE = re.compile(
    r"(?<![\w.,^/*+\-\\)(\[{}])[-+]?[$€£]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?\s?%?"
    r"(?![\w^/*+\\)(\[{]|[.,]\d|-\d|!\s*\.)"
)
_INEXACT = re.compile(
    r"\b(?:more|less|fewer|greater|smaller|larger|bigger) than\b|\bat (?:least|most)\b|\bup to\b"
    r"|\b(?:under|over|above|below|almost|nearly|about|around)\b|[<>]|\bto\s+\d",
    re.IGNORECASE,
)


def only_number(text: str, *, prose: bool = True) -> tuple[str, str] | None:
    """The number of a final statement in words that has no other, as it is claimed, and what is
    behind it: "48 + 24 = 72" and " clips in May" of "She sold 48 + 24 = 72 clips in May." """
    sentences = _sentences(text)
    if not sentences or "?" in sentences[-1]:
        return None
    last = sentences[-1]
    if not prose and (len(sentences) > 1 or _NUMBER_WORD.search(last)):
        return None
    if any(_NAMED.search(sentence) for sentence in sentences[:-1]):
        return None  # which said what the answer is
    if len(re.findall(r"\b[a-z]{2,}\b", last)) < 2 or DOUBT.search(last) or _INEXACT.search(last):
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
    number = found[0][0].strip()
    behind = after[found[0].end() :]
    if not (equals or after[: found[0].start()].strip()) or _NUMBER_WORD.search(behind):
        return None  # the whole is no number with a unit, as would have been read
    return f"{left} = {number}" if left else number, behind
