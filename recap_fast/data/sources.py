"""Where rows come from: JSON Lines and Parquet files, hub datasets, reasoning-gym.

What a source's rows must look like is checked when it is opened, as far as that is possible without
generating all of them. Messages name the source, the file and the line.
"""

from __future__ import annotations

import difflib
import json
import mmap
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recap_fast.config import SourceConfig
from recap_fast.data.row_columns import DataError, RowError, check_columns, check_row, column_of
from recap_fast.data.seeds import permutation, seed_of

_FILE_ENDINGS = (".jsonl", ".parquet")
_FIRST_ROWS = 20
"""Of a table: if none of them can be used, the mapping of its columns is wrong."""
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


class Rows(Protocol):
    """The rows of one source, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping[str, Any]: ...

    def where(self, row: int) -> str:
        """Where a row comes from, for messages."""
        ...


def open_rows(config: SourceConfig, seed: int) -> Rows:
    """Opens a source.

    Raises:
        DataError: it is missing, malformed, empty, or lacks a column that is needed.
    """
    if config.reasoning_gym is not None:
        return _ProceduralRows(config, seed)
    if config.digit_scenes is not None:
        return _open_scenes(config, seed)
    assert config.path is not None
    path = Path(config.path)
    if path.suffix in _FILE_ENDINGS:
        return _select(_open_file(config, path), config, seed)
    looks_like_file = path.is_absolute() or config.path.startswith(".") or path.exists()
    if looks_like_file or re.search(r"\.(json|csv|tsv|txt|arrow|gz|zst|zip)$", config.path):
        raise DataError(
            f"source {config.name!r}: {config.path}: wanted a file ending in .jsonl or .parquet, "
            f"or a hub dataset's name, got {_describe_path(path)}"
        )
    if not _HUB_NAME.fullmatch(config.path):
        raise DataError(
            f"source {config.name!r}: {config.path!r} is neither a file ending in .jsonl or "
            f".parquet nor a hub dataset's name (owner/name)"
        )
    subsets = config.subset if isinstance(config.subset, list) else [config.subset]
    parts = [_select(_open_hub(config, subset), config, seed, subset) for subset in subsets]
    return parts[0] if len(parts) == 1 else _JoinedRows(parts)


def _open_scenes(config: SourceConfig, seed: int) -> Rows:
    from recap_fast.data.digit_scenes import SceneRows

    assert config.digit_scenes is not None
    rows = SceneRows(
        config.digit_scenes,
        size=config.size,
        held_out=config.held_out,
        seed=seed_of(seed, config.name),
    )
    check_row(rows[0], config, rows.where(0))
    return rows


def image_folder(config: SourceConfig) -> Path | None:
    """What paths of a source's images are relative to; None is the current folder."""
    if config.image_folder is not None:
        return Path(config.image_folder)
    is_file = config.path is not None and Path(config.path).suffix in _FILE_ENDINGS
    return Path(str(config.path)).parent if is_file else None


def _describe_path(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return f"the ending {path.suffix!r}" if path.suffix else "no ending"


def _open_file(config: SourceConfig, path: Path) -> Rows:
    if not path.is_file():
        raise DataError(f"source {config.name!r}: {path}: no such file")
    if config.subset is not None or config.split != "train":
        raise DataError(
            f"source {config.name!r}: subset and split are for hub datasets; {path} is a file"
        )
    if path.suffix == ".jsonl":
        return _JsonlRows(config, path)
    import datasets
    from pyarrow.parquet import ParquetFile

    try:
        # Looked into first: of a file with no rows, `datasets` says something misleading.
        if ParquetFile(path).metadata.num_rows == 0:
            raise DataError(f"source {config.name!r}: {path}: no rows")
        table = datasets.Dataset.from_parquet(str(path))
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets share no base class for a bad file
        cause = error.__cause__ or error
        raise DataError(
            f"source {config.name!r}: {path}: cannot be read as Parquet: {_first_line(cause)}"
        ) from error
    return _TableRows(config, table, str(path))


def _open_hub(config: SourceConfig, subset: str | None) -> Rows:
    import datasets

    shown = f", subset {subset!r}" if isinstance(config.subset, list) else ""
    name = f"hub dataset {config.path!r}{shown}, split {config.split!r}"
    try:
        table = datasets.load_dataset(config.path, subset, split=config.split)
    except Exception as error:  # the hub, the network and the loaders share no base class
        raise DataError(
            f"source {config.name!r}: {name} could not be loaded: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error
    return _TableRows(config, table, name)


def _select(rows: Rows, config: SourceConfig, seed: int, subset: str | None = None) -> Rows:
    """At most `max_rows` of them."""
    if config.max_rows is None or len(rows) <= config.max_rows:
        return rows
    order = permutation(len(rows), seed, config.name, subset, "max_rows")
    return _SelectedRows(rows, np.sort(order[: config.max_rows]))


class _SelectedRows:
    """Some of another source's rows."""

    def __init__(self, rows: Rows, numbers: np.ndarray) -> None:
        self._rows = rows
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self._rows[int(self._numbers[row])]

    def where(self, row: int) -> str:
        return self._rows.where(int(self._numbers[row]))


class _JoinedRows:
    """The rows of several subsets, one after another."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        part, number = self._locate(row)
        return part[number]

    def where(self, row: int) -> str:
        part, number = self._locate(row)
        return part.where(number)

    def _locate(self, row: int) -> tuple[Rows, int]:
        index = int(np.searchsorted(self._ends, row, side="right"))
        return self._parts[index], row - int(self._ends[index]) + len(self._parts[index])


class _JsonlRows:
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


def _parse_line(line: bytes, config: SourceConfig, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"source {config.name!r}: {where}: not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"source {config.name!r}: {where}: not valid JSON: {error.msg} at column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, or lists too deep, to read
        raise DataError(f"source {config.name!r}: {where}: cannot be read: {error}") from None
    if not isinstance(entry, dict):
        raise DataError(
            f"source {config.name!r}: {where}: wanted a JSON object, got {type(entry).__name__}"
        )
    return entry


class _TableRows:
    """A table of the `datasets` library: a Parquet file or a hub dataset."""

    def __init__(self, config: SourceConfig, table: Any, name: str) -> None:
        self._name = name
        check_columns(table.column_names, config, name)
        if len(table) == 0:
            raise DataError(f"source {config.name!r}: {name}: no rows")
        # Pictures and sounds that nobody asked for would be decoded with every row, and sent to
        # the reward workers.
        wanted = None if config.images is None else column_of(config.images, table.column_names)
        unused = [c for c, feature in table.features.items() if c != wanted and _is_media(feature)]
        table = table.remove_columns(unused)
        # Read as it is stored: an image is then {"bytes", "path"}, and decoded where it is used.
        self._table = table if wanted is None else table.with_format("arrow")
        self._check_first_rows(config)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        entry: Any = self._table[row]
        if not isinstance(entry, Mapping):  # a table of one row
            entry = entry.to_pylist()[0]
        assert isinstance(entry, Mapping)
        return entry

    def where(self, row: int) -> str:
        return f"{self._name}: row {row}"

    def _check_first_rows(self, config: SourceConfig) -> None:
        """One bad row is skipped when its turn comes; a wrong mapping of columns spoils all."""
        errors = []
        for row in range(min(_FIRST_ROWS, len(self))):
            try:
                check_row(self[row], config, self.where(row))
            except RowError as error:
                errors.append(error)
            else:
                return
        raise errors[0]


class _ProceduralRows:
    """A reasoning-gym dataset: row i is generated from the source's seed and i when it is asked
    for."""

    def __init__(self, config: SourceConfig, seed: int) -> None:
        from reasoning_gym.factory import DATASETS

        name = config.reasoning_gym
        assert name is not None
        if name not in DATASETS:
            raise DataError(
                f"source {config.name!r}: reasoning-gym has no dataset {name!r}"
                f"{nearest(name, DATASETS)}"
            )
        self._name = name
        self._dataset = self._create(config, DATASETS[name][1], seed_of(seed, config.name))
        check_row(self[0], config, self.where(0))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        try:
            entry: dict[str, Any] = self._dataset[row]
        except Exception as error:  # whatever a generator raises for parameters it cannot meet
            raise DataError(
                f"{self.where(row)} cannot be generated: {type(error).__name__}: "
                f"{_first_line(error)}"
            ) from error
        return entry

    def where(self, row: int) -> str:
        return f"reasoning-gym {self._name!r}: row {row}"

    @staticmethod
    def _create(config: SourceConfig, config_class: type, seed: int) -> Any:
        from reasoning_gym import create_dataset

        known = [field.name for field in fields(config_class)]
        for parameter in config.parameters:
            if parameter == "size":
                raise DataError(
                    f"source {config.name!r}: `size` is a key of the source, not of its parameters"
                )
            if parameter not in known:
                raise DataError(
                    f"source {config.name!r}: reasoning-gym {config.reasoning_gym!r} has no "
                    f"parameter {parameter!r}{nearest(parameter, known)}"
                )
        try:
            return create_dataset(
                config.reasoning_gym, **{"seed": seed, **config.parameters, "size": config.size}
            )
        except Exception as error:  # validated by assertions, type errors come from anywhere
            raise DataError(
                f"source {config.name!r}: reasoning-gym {config.reasoning_gym!r} refuses the "
                f"parameters {config.parameters}: {_first_line(error) or type(error).__name__}"
            ) from error


def _is_media(feature: Any) -> bool:
    """Whether a feature of the `datasets` library is an image, audio or video, or lists some."""
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ in ("Image", "Audio", "Video") or (
        inner is not None and _is_media(inner)
    )


def nearest(word: str, valid: Any) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    names = sorted(valid)
    more = ", ..." if len(names) > 12 else ""
    return f"; valid are {', '.join(names[:12])}{more}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
