"""What is in a row: its question, its target, and columns inside of columns.

Messages name the source, the row and the column.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from recap_fast.config import SourceConfig
from recap_fast.data.messages import (
    conversation_images,
    count_placeholders,
    read_conversation,
    without_none,
)
from recap_fast.data.prompts import Message
from recap_fast.rewards.options import Options, read_options
from recap_fast.types import UserError


class DataError(UserError):
    """A source that cannot be used."""


class RowError(DataError):
    """A row that cannot be used. Of a file it ends the run before it begins; of what is read later
    it is skipped and counted."""

    def __init__(self, config: SourceConfig, where: str, problem: str) -> None:
        super().__init__(f"source {config.name!r}: {where}: {problem}")
        self.problem = problem


def check_row(entry: Mapping[str, Any], config: SourceConfig, where: str) -> None:
    """Raises `DataError` where a row lacks what its source says that it has."""
    check_columns(list(entry), config, where)
    read_question(entry, config, where)
    if config.kind == "sft":
        read_target(entry, config, where)


def check_columns(columns: Sequence[str], config: SourceConfig, where: str) -> None:
    """Raises `DataError`, with the columns that there are, for one that is missing."""
    keys = [("question", column) for column in _question_columns(config)]
    keys += [(key, getattr(config, key)) for key in ("answer", "choices", "images")]
    for key, column in keys:
        if key == "answer" and config.kind == "sft":
            continue  # a conversation may bring its target: `read_target` sees the row
        head = column if column is None else column_of(column, columns)
        if head is not None and head not in columns:
            raise _missing(key, column, columns, config, where)


def _missing(
    key: str, column: str | None, columns: Sequence[str], config: SourceConfig, where: str
) -> DataError:
    hint = ""
    if key == "answer" and config.kind == "sft":
        hint = "; without one the question is a conversation that ends with the assistant's turn"
    return DataError(
        f"source {config.name!r}: {where}: no column {column!r} (`{key}` of the source); "
        f"columns there: {', '.join(map(str, columns)) or 'none'}{hint}"
    )


def _question_columns(config: SourceConfig) -> list[str]:
    return [config.question] if isinstance(config.question, str) else config.question


def column_of(path: str, columns: Sequence[str]) -> str:
    """The column that a path begins with. One whose own name has dots in it comes first."""
    return path if path in columns else path.partition(".")[0]


def without_column(entry: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A row without the column that a path leads into."""
    head = column_of(path, list(entry))
    return {column: value for column, value in entry.items() if column != head}


def read_column(entry: Mapping[str, Any], path: str, config: SourceConfig, where: str) -> Any:
    """The value of a column, or of what a path with dots leads to inside of it: keys of mappings
    and numbers of list items ("conversations.0.value").

    Raises:
        DataError: the path leads nowhere.
    """
    head = column_of(path, list(entry))
    value = entry[head]
    for step in filter(None, path[len(head) :].split(".")):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list | tuple) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise RowError(
                config,
                where,
                f"{path!r} leads nowhere: no {step!r} in {type(value).__name__} {shorten(value)}",
            )
    return value


def read_question(
    entry: Mapping[str, Any], config: SourceConfig, where: str
) -> str | list[Message]:
    """The question: a text, or a conversation that ends with the user's turn. A source's `choices`
    are written below it. Of a supervised row's conversation that ends with the assistant's turn,
    that turn is the target, and left out here."""
    columns = _question_columns(config)
    if len(columns) == 1:
        question = _one_question(entry, columns[0], config, where)
    else:
        question = _joined_question(entry, columns, config, where)
    choices = read_choices(entry, config, where)
    lines = zip(choices.labels, choices.texts, strict=True)
    options = "".join(f"\n({label}) {text}" for label, text in lines)
    if not options:
        return question
    if isinstance(question, str):
        return question + options
    last = question[-1]
    return [*question[:-1], {**last, "content": last["content"] + options}]


def _joined_question(
    entry: Mapping[str, Any], columns: Sequence[str], config: SourceConfig, where: str
) -> str:
    texts = [read_column(entry, column, config, where) for column in columns]
    for column, text in zip(columns, texts, strict=True):
        if not isinstance(text, str | None):
            raise RowError(
                config,
                where,
                f"column {column!r}: wanted a text, one of "
                f"several that make the question, got {type(text).__name__} {shorten(text)}",
            )
    question = "\n".join(text for text in texts if text and text.strip())
    if not question:
        raise RowError(config, where, f"no text in any of the columns {list(columns)}")
    return question


def read_choices(entry: Mapping[str, Any], config: SourceConfig, where: str) -> Options:
    """The options of a row; none where a row has none.

    Raises:
        RowError: they are not of a form of `read_options`.
    """
    value = None if config.choices is None else read_column(entry, config.choices, config, where)
    try:
        return read_options(value)
    except (TypeError, ValueError) as error:
        raise RowError(
            config,
            where,
            f"column {config.choices!r} (`choices` of the source): wanted a list of up to 26 "
            f"options, or labels with their texts, got {type(value).__name__} "
            f"{shorten(value)}: {error}",
        ) from None


def _one_question(
    entry: Mapping[str, Any], column: str, config: SourceConfig, where: str
) -> str | list[Message]:
    question = read_column(entry, column, config, where)
    if isinstance(question, str) and question.strip():
        return question
    turns = _conversation(question, column, config, where)
    if config.kind == "sft" and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if turns and turns[-1]["role"] == "user":
        if not turns[-1]["content"].strip():
            raise RowError(config, where, f"column {column!r}: the user's last turn is empty")
        return turns
    last = f"last turn is the {turns[-1]['role']}'s" if turns else "only turn is the assistant's"
    hint = "" if config.kind == "sft" else " (only an sft source has targets in it)"
    raise RowError(
        config, where, f"column {column!r}: a conversation whose {last}, not the user's{hint}"
    )


def _conversation(value: Any, column: str, config: SourceConfig, where: str) -> list[Message]:
    try:
        turns = read_conversation(value)
    except ValueError as error:
        raise RowError(
            config,
            where,
            f'column {column!r}: wanted a text or a list of {{"role": ..., "content": text or '
            f"parts}} messages, got {type(value).__name__} {shorten(value)}: {error}",
        ) from None
    value = without_none(value)
    own, other = len(conversation_images(value)), count_placeholders(value)
    problem = None
    if own + other and config.images is None:
        problem = "has images, but the source says of no column that it has (`images`)"
    elif own and config.images != column:
        problem = f"holds images itself: set `images: {column}`"
    elif other and config.images == column:
        problem = "has a part of type image without an image"
    if problem:
        raise RowError(config, where, f"column {column!r}: the conversation {problem}")
    return turns


def read_images(entry: Mapping[str, Any], config: SourceConfig, where: str) -> Any:
    """What holds a row's images: the cell of its column, or the list of those that stand in the
    conversation itself, where `images` names the question's column."""
    assert config.images is not None
    value = read_column(entry, config.images, config, where)
    if config.images != config.question:
        return value
    return [] if isinstance(value, str) else conversation_images(without_none(value))


def read_target(entry: Mapping[str, Any], config: SourceConfig, where: str) -> str:
    """The target text of a supervised row: the last turn of a conversation that ends with the
    assistant's, or else the answer; numbers are written out."""
    own = _own_target(entry, config, where)
    if own is not None:
        return own
    if config.answer is None or column_of(config.answer, list(entry)) not in entry:
        raise _missing("answer", config.answer, list(entry), config, where)
    answer = read_column(entry, config.answer, config, where)
    if isinstance(answer, str):
        return answer
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    raise RowError(
        config,
        where,
        f"column {config.answer!r}: wanted a text or a number, "
        f"got {type(answer).__name__} {shorten(answer)}",
    )


def _own_target(entry: Mapping[str, Any], config: SourceConfig, where: str) -> str | None:
    """The assistant's turn that a row's conversation ends with."""
    columns = _question_columns(config)
    value = read_column(entry, columns[0], config, where) if len(columns) == 1 else None
    if not isinstance(value, list):
        return None
    last = _conversation(value, columns[0], config, where)[-1]
    if last["role"] != "assistant":
        return None
    for key in ("tool_calls", "reasoning_content"):
        if last.get(key):
            raise RowError(
                config,
                where,
                f"column {columns[0]!r}: the target, its last turn, has {key!r}, "
                f"which is not trained on: wanted a text alone",
            )
    return str(last["content"])


def nearest(word: str, valid: Any) -> str:
    """The end of a message about a name that is unknown: what was meant, or what there is."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    names = sorted(valid)
    more = ", ..." if len(names) > 12 else ""
    return f"; valid are {', '.join(names[:12])}{more}"


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def shorten(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
