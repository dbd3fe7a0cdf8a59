"""What the sections of a configuration have in common, and what is wrong with one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from recap_fast.types import UserError


class ConfigError(UserError):
    """A configuration that cannot be run."""


class MissingGpuError(ConfigError):
    """There is no GPU for this process of its host.

    Attributes:
        is_first: whether the process before it has one, so that this one is to say so.
    """

    def __init__(self, text: str, is_first: bool) -> None:
        super().__init__(text)
        self.is_first = is_first


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False,
        validate_by_name=True, validate_by_alias=True, serialize_by_alias=True,
    )  # fmt: skip


def nearest(word: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(sorted(valid))}"
