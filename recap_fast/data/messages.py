"""Conversations as rows hold them: contents that are texts or lists of parts, and their images.

Inside of the package a message's content is a text with `IMAGE_MARKER` where an image stands;
`place_images` makes parts of it again, the same ones for every row.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from recap_fast.data.prompts import IMAGE_MARKER, Message, count_markers

_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")
_PAYLOADS = ("image", "image_url", "url", "path", "bytes", "base64")
"""Keys under which an image's part may hold the image itself, in the conventions of transformers,
Qwen's and OpenAI's."""


def without_none(value: Any) -> Any:
    """A value without mappings' keys that are None, at any depth.

    Parquet gives every message all keys that any message of the file has; chat templates ask
    whether a key is there.
    """
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_conversation(value: Any) -> list[Message]:
    """Messages whose contents are texts. They keep their other keys.

    Raises:
        ValueError: it is no list of messages, or a content is of another kind.
    """
    turns = without_none(value)
    if not isinstance(turns, list) or not turns:
        raise ValueError("wanted a list of messages")
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise ValueError(f"turn {number} is no message with a role")
        messages.append({**turn, "content": _flatten(turn, number)})
    return messages


def conversation_images(value: Any) -> list[Any]:
    """The images that the parts of a conversation hold, in order."""
    parts = [part for turn in _turns(value) for part in _parts(turn)]
    return [_payload(part) for part in parts if _kind(part) == "image" and _payload(part)]


def count_placeholders(value: Any) -> int:
    """How many images the parts of a conversation stand for without holding them."""
    parts = [part for turn in _turns(value) for part in _parts(turn)]
    return sum(_kind(part) == "image" and not _payload(part) for part in parts)


def _turns(value: Any) -> Sequence[Any]:
    return [turn for turn in value if isinstance(turn, Mapping)] if isinstance(value, list) else []


def _parts(turn: Mapping[str, Any]) -> list[Any]:
    content = turn.get("content")
    return list(content) if isinstance(content, list | tuple) else []


def _flatten(turn: Mapping[str, Any], number: int) -> str:
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return ""  # as OpenAI's API writes a turn that only calls tools
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"turn {number}: its content is neither a text nor a list of parts")
    texts = []
    for part in content:
        kind = _kind(part)
        if kind == "image" and turn["role"] != "user":
            raise ValueError(f"turn {number}: an image in the {turn['role']}'s turn")
        if kind is None:
            shown = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"turn {number}: a part of type {shown!r}, neither text nor image")
        texts.append(part if isinstance(part, str) else part.get("text") or "")
        if kind == "image":
            texts[-1] = IMAGE_MARKER
    return "".join(texts)


def _kind(part: Any) -> str | None:
    """ "text", "image", or None for what is neither."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type")
    if kind is None:  # Qwen's shorthand: {"image": ...}, {"text": ...}
        kind = next((key for key in ("text", "image", "image_url") if key in part), None)
    if kind in _TEXTS:
        return "text" if isinstance(part.get("text", ""), str) else None
    return "image" if kind in _IMAGES else None


def _payload(part: Mapping[str, Any]) -> Any:
    """The image that a part holds, as `read_image` takes it; None for a mere placeholder."""
    for key in _PAYLOADS:
        held = part.get(key)
        if key == "image_url" and isinstance(held, Mapping):
            held = held.get("url")
        if held:
            return f"data:;base64,{held}" if key == "base64" else held
    return None


def question_key(question: str | Sequence[Message]) -> str:
    """What makes two questions the same, whatever shape their rows have.

    A text equals a conversation of one turn. System messages, where images stand, case, Unicode's
    variants of a character and how whitespace is written make no difference.
    """
    if isinstance(question, str):
        return _squeeze(question)
    turns = [turn for turn in question if turn["role"] not in ("system", "developer")]
    if len(turns) == 1:
        return _squeeze(turns[0]["content"])
    return "\n".join(f"{turn['role']}: {_squeeze(turn['content'])}" for turn in turns)


def question_keys(question: str | Sequence[Message]) -> list[tuple[str, slice]]:
    """`question_key` of everything that a conversation asks, with which of its images belong there:
    of the whole, of its beginning up to each of the user's turns, and of each such turn alone."""
    if isinstance(question, str):
        return [(question_key(question), slice(None))]
    has_markers = count_markers(question) > 0
    keys, images = [(question_key(question), slice(None))], 0
    for number, turn in enumerate(question):
        before, images = images, images + turn["content"].count(IMAGE_MARKER)
        if turn["role"] != "user":
            continue
        is_first = all(earlier["role"] != "user" for earlier in question[:number])
        upto, own = slice(0, images), slice(before, images)
        if not has_markers:  # all images stand in the first user's turn
            upto, own = slice(None), slice(None) if is_first else slice(0)
        keys.append((question_key(question[: number + 1]), upto))
        keys.append((question_key(turn["content"]), own))
    return keys


def _squeeze(text: str) -> str:
    text = unicodedata.normalize("NFKC", text.replace(IMAGE_MARKER, " ")).casefold()
    return " ".join(unicodedata.normalize("NFKC", text).split())
