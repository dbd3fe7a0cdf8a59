"""What is in a row: its question, its target, and columns inside of columns.

Messages name the source, the row and the column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recap_fast.config import SourceConfig
from recap_fast.data.prompts import Message
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
        # Rewards look `choices` up by its name alone.
        head = column if column is None or key == "choices" else column_of(column, columns)
        if head is not None and head not in columns:
            raise DataError(
                f"source {config.name!r}: {where}: no column {column!r} (`{key}` of the source); "
                f"columns there: {', '.join(map(str, columns)) or 'none'}"
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
                f"{path!r} leads nowhere: no {step!r} in {type(value).__name__} {_shorten(value)}",
            )
    return value


def read_question(
    entry: Mapping[str, Any], config: SourceConfig, where: str
) -> str | list[Message]:
    """The question: a text, or a conversation that ends with the user's turn. A source's `choices`
    are written below it."""
    columns = _question_columns(config)
    if len(columns) == 1:
        question = _one_question(entry, columns[0], config, where)
    else:
        question = _joined_question(entry, columns, config, where)
    options = _options(entry, config, where)
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
                f"several that make the question, got {type(text).__name__} {_shorten(text)}",
            )
    question = "\n".join(text for text in texts if text and text.strip())
    if not question:
        raise RowError(config, where, f"no text in any of the columns {list(columns)}")
    return question


def _options(entry: Mapping[str, Any], config: SourceConfig, where: str) -> str:
    """A line for each option, each beginning with a newline; nothing where a row has none."""
    if config.choices is None:
        return ""
    options = entry[config.choices]
    if options is None:
        return ""
    if not isinstance(options, list | tuple) or len(options) > 26:
        raise RowError(
            config,
            where,
            f"column {config.choices!r} (`choices` of the source):"
            f" wanted a list of up to 26 options, got {type(options).__name__} {_shorten(options)}",
        )
    return "".join(f"\n({chr(ord('A') + i)}) {option}" for i, option in enumerate(options))


def _one_question(
    entry: Mapping[str, Any], column: str, config: SourceConfig, where: str
) -> str | list[Message]:
    question = read_column(entry, column, config, where)
    if isinstance(question, str) and question.strip():
        return question
    if isinstance(question, list) and question and all(map(_is_message, question)):
        if question[-1]["role"] == "user":
            return question
        got = f"a conversation whose last turn is the {question[-1]['role']}'s, not the user's"
    else:
        got = f"{type(question).__name__} {_shorten(question)}"
    raise RowError(
        config,
        where,
        f"column {column!r}: wanted a text or a list of "
        f'{{"role": ..., "content": text}} messages, got {got}',
    )


def _is_message(turn: Any) -> bool:
    return (
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
    )


def read_target(entry: Mapping[str, Any], config: SourceConfig, where: str) -> str:
    """The target text of a supervised row; numbers are written out."""
    assert config.answer is not None
    answer = read_column(entry, config.answer, config, where)
    if isinstance(answer, str):
        return answer
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    raise RowError(
        config,
        where,
        f"column {config.answer!r}: wanted a text or a number, "
        f"got {type(answer).__name__} {_shorten(answer)}",
    )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
