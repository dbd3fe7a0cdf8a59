"""Rows of JSON files: one object a line, or a whole document with a list of them."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recap_fast.config import SourceConfig
from recap_fast.data.row_columns import DataError, check_row


class JsonlRows:
    """A JSON Lines file. All of it is parsed and checked once; afterwards only the rows' offsets
    are kept, and rows are parsed again as they are drawn."""

    def __init__(self, config: SourceConfig, path: Path) -> None:
        self._path = path
        self._starts = array("Q")
        self._lines = array("Q")
        if path.stat().st_size == 0:
            raise DataError(f"source {config.name!r}: {path}: the file is empty")
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for start, number, line in self._scan():
            where = f"{path}:{number}"
            check_row(_parse_line(line, config, where), config, where)
            self._starts.append(start)
            self._lines.append(number)
        if not self._starts:
            raise DataError(f"source {config.name!r}: {path}: no rows, only blank lines")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        start = self._starts[row]
        end = self._bytes.find(b"\n", start)
        line = self._bytes[start : end if end >= 0 else len(self._bytes)]
        entry: dict[str, Any] = json.loads(line)
        return entry

    def where(self, row: int) -> str:
        return f"{self._path}:{self._lines[row]}"

    def _scan(self) -> Iterator[tuple[int, int, bytes]]:
        """Offset, line number (from 1) and bytes of every line that is not blank."""
        start, number = 0, 0
        if self._bytes[:3] == b"\xef\xbb\xbf":  # a byte order mark is not JSON
            start = 3
        self._bytes.seek(start)
        while line := self._bytes.readline():
            number += 1
            if line.strip():
                yield start, number, line
            start += len(line)


class JsonRows:
    """A JSON document: a list of objects, or an object with such a list in it, as in
    {"data": [...]}. It is held in memory; for large files JSON Lines are better."""

    def __init__(self, config: SourceConfig, path: Path, document: Any) -> None:
        self._path = path
        self._rows = self._find_rows(document, config)
        for row, entry in enumerate(self._rows):
            check_row(_check_object(entry, config, self.where(row)), config, self.where(row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        entry: Mapping[str, Any] = self._rows[row]
        return entry

    def where(self, row: int) -> str:
        return f"{self._path}: row {row}"

    def _find_rows(self, document: Any, config: SourceConfig) -> list[Any]:
        lists = [document]
        if isinstance(document, dict):
            inner = document.get("data")
            # Whatever the list is called, if there is only one.
            found = [value for value in document.values() if isinstance(value, list)]
            lists = [inner] if isinstance(inner, list) else found
        if len(lists) != 1 or not isinstance(lists[0], list):
            got = type(document).__name__
            if isinstance(document, dict):
                got = f"an object with {len(lists)} lists and the keys {_listed(document)}"
            raise DataError(
                f"source {config.name!r}: {self._path}: wanted a list of objects, or an object "
                f'with one, as in {{"data": [...]}}; got {got}'
            )
        if not lists[0]:
            raise DataError(f"source {config.name!r}: {self._path}: no rows")
        return list(lists[0])


def open_json(config: SourceConfig, path: Path) -> JsonRows | JsonlRows:
    """A .json file: a document, or JSON Lines under the wrong ending."""
    where = str(path)
    if path.stat().st_size == 0:
        raise DataError(f"source {config.name!r}: {path}: the file is empty")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    first = content.lstrip()[:1]
    try:
        document = _load(content, config, where)
    except DataError:
        lines = content.splitlines()
        if first == b"{" and len(lines) > 1 and _is_object(lines[0]):
            return JsonlRows(config, path)
        raise
    if isinstance(document, dict) and not any(isinstance(x, list) for x in document.values()):
        document = [document]  # JSON Lines of a single line
    return JsonRows(config, path, document)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse_line(line: bytes, config: SourceConfig, where: str) -> dict[str, Any]:
    return _check_object(_load(line, config, where), config, where)


def _load(content: bytes, config: SourceConfig, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"source {config.name!r}: {where}: not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(
            f"source {config.name!r}: {where}: not valid JSON: {error.msg} at "
            f"{line}column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, or lists too deep, to read
        raise DataError(f"source {config.name!r}: {where}: cannot be read: {error}") from None


def _check_object(entry: Any, config: SourceConfig, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(
            f"source {config.name!r}: {where}: wanted a JSON object, got {type(entry).__name__}"
        )
    return entry


def _listed(document: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in document]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
