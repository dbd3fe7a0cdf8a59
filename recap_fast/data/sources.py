"""Where rows come from: JSON Lines, JSON and Parquet files, hub datasets, reasoning-gym.

What a source's rows must look like is checked when it is opened, as far as that is possible without
generating all of them. Messages name the source, the file and the line.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recap_fast.config import SourceConfig
from recap_fast.data.gym_rows import GymRows
from recap_fast.data.json_rows import JsonlRows, open_json
from recap_fast.data.row_columns import (
    DataError,
    RowError,
    check_columns,
    check_row,
    column_of,
    first_line,
    shorten,
)
from recap_fast.data.seeds import permutation, seed_of
from recap_fast.paths import absolute, has_file_ending, is_pattern, is_url, names_files, shown

_WANTED = "a file ending in .jsonl, .json or .parquet, or a hub dataset's name (owner/name)"
_FIRST_ROWS = 20
"""Of a table: if none of them can be used, the mapping of its columns is wrong."""
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_LONGEST_HUB_NAME = 200


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
        rows = GymRows(config, seed_of(seed, config.name))
        check_row(rows[0], config, rows.where(0))
        return rows
    if config.digit_scenes is not None:
        return _open_scenes(config, seed)
    if files := find_files(config):
        return _select(_joined([_open_file(config, path) for path in files]), config, seed)
    subsets = config.subset if isinstance(config.subset, list) else [config.subset]
    return _joined([_select(_open_hub(config, x), config, seed, x) for x in subsets])


def find_files(config: SourceConfig) -> list[Path]:
    """The files of a source in the order of their mention, those of a pattern by name, each once;
    none for a hub dataset.

    Raises:
        DataError: a path that is neither, or a pattern that fits no file.
    """
    paths = config.path if isinstance(config.path, list) else [str(config.path)]
    files: dict[str, Path] = {}
    for path in paths:
        found = _matches(config, path)
        if not found and isinstance(config.path, list):
            raise DataError(
                f"source {config.name!r}: {shown(path)!r}: a list of paths holds files ending in "
                f".jsonl, .json or .parquet, or patterns; a hub dataset is a source of its own"
            )
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def _matches(config: SourceConfig, path: str) -> list[Path]:
    """The files that a path or a pattern names; none for a hub dataset's name."""
    where = f"source {config.name!r}: {shown(path)!r}"
    if is_url(path):
        raise DataError(
            f"{where}: URLs are not read: give a file on this machine, or a hub dataset by its "
            f"name (owner/name)"
        )
    if "\0" in path:
        raise DataError(f"{where}: no such file")
    if not names_files(path):
        is_archive = re.search(r"\.(csv|tsv|txt|arrow|gz|zst|zip)$", path, re.IGNORECASE)
        if is_archive or not _HUB_NAME.fullmatch(path) or len(path) > _LONGEST_HUB_NAME:
            raise DataError(f"{where} is neither {_WANTED}")
        return []
    path = absolute(path)
    if is_pattern(path):
        return _fitting(where, path)
    if not has_file_ending(path):
        raise DataError(f"{where}: wanted {_WANTED}, got {_describe_path(path)}")
    if not os.path.isfile(path):
        raise DataError(f"{where}: {'a folder' if os.path.isdir(path) else 'no such file'}")
    return [Path(path)]


def _fitting(where: str, pattern: str) -> list[Path]:
    found = [name for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
    usable = [Path(name) for name in found if has_file_ending(name)]
    if not usable:
        got = f"{len(found)} files of other kinds" if found else "none"
        raise DataError(
            f"{where}: wanted files ending in .jsonl, .json or .parquet that fit this pattern, "
            f"got {got}"
        )
    return usable


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
    """What paths of a source's images are relative to; None is the current folder.

    Raises:
        DataError: the source's files lie in several folders.
    """
    if config.image_folder is not None:
        return Path(absolute(config.image_folder))
    if config.images is None or config.path is None:
        return None
    folders = {path.parent for path in find_files(config)}
    if len(folders) > 1:
        raise DataError(
            f"source {config.name!r}: its files lie in {len(folders)} folders, such as "
            f"{min(folders)}: say in image_folder what paths of images are relative to"
        )
    return folders.pop() if folders else None


def _describe_path(path: str) -> str:
    if os.path.isdir(path):
        return "a folder"
    ending = Path(path).suffix
    return f"the ending {shorten(ending)}" if ending else "no ending"


def _open_file(config: SourceConfig, path: Path) -> Rows:
    if config.subset is not None or config.split != "train":
        raise DataError(
            f"source {config.name!r}: subset and split are for hub datasets; {path} is a file"
        )
    ending = path.suffix.lower()
    if ending == ".jsonl":
        return JsonlRows(config, path)
    if ending == ".json":
        return open_json(config, path)
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
            f"source {config.name!r}: {path}: cannot be read as Parquet: {first_line(cause)}"
        ) from error
    return _TableRows(config, table, str(path))


def _open_hub(config: SourceConfig, subset: str | None) -> Rows:
    import datasets

    assert isinstance(config.path, str)
    shown = f", subset {subset!r}" if isinstance(config.subset, list) else ""
    name = f"hub dataset {config.path!r}{shown}, split {config.split!r}"
    try:
        table = datasets.load_dataset(config.path, subset, split=config.split)
    except Exception as error:  # the hub, the network and the loaders share no base class
        raise DataError(
            f"source {config.name!r}: {name} could not be loaded: {type(error).__name__}: "
            f"{first_line(error)}"
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


def _joined(parts: list[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 else _JoinedRows(parts)


class _JoinedRows:
    """The rows of several files or subsets, one after another."""

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


def _is_media(feature: Any) -> bool:
    """Whether a feature of the `datasets` library is an image, audio or video, or lists some."""
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ in ("Image", "Audio", "Video") or (
        inner is not None and _is_media(inner)
    )
