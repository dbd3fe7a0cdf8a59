"""What the names of a source's files mean on this machine: patterns, `~`, endings, URLs."""

from __future__ import annotations

import glob
import os
import re

FILE_ENDINGS = (".jsonl", ".json", ".parquet")
"""Of files with rows, in lower case."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{1,}")


def has_file_ending(path: str) -> bool:
    """Whether a name ends as files with rows do, in whatever case."""
    return path.lower().endswith(FILE_ENDINGS)


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def is_pattern(path: str) -> bool:
    """Whether a name means all files that fit it, and is not that of a file itself."""
    # Of os.path here and below: pathlib raises for names that are too long for the system.
    return any(sign in path for sign in "*?[") and not os.path.exists(path)


def names_files(path: str) -> bool:
    """Whether a source's path means something on this machine, not a dataset of the hub. What it
    means need not exist."""
    if is_url(path):
        return False
    is_explicit = path.startswith((".", "/", "~")) or has_file_ending(path) or is_pattern(path)
    return is_explicit or os.path.exists(path)


def absolute(path: str) -> str:
    """A file, folder or pattern as it is named from anywhere, with `~` as the home folder.

    A file that is a link keeps its own name: that of what it leads to may have no ending.
    """
    path = os.path.expanduser(path)
    if "\0" in path:
        return path  # names nothing: whoever opens it says so
    if is_pattern(path):
        return path if os.path.isabs(path) else os.path.join(glob.escape(os.getcwd()), path)
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(folder or "."), name)


def shown(path: object) -> str:
    """A path as messages show it. Its end says more than its middle."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:60]}...{text[-60:]}"
