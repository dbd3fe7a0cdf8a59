"""Packages that hand names on without importing the modules behind them.

`import recap_fast` and `recap_fast.ops.loss_config` then cost no import of torch: reward workers
and the command line start at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def hand_on(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562).

    Args:
        package: the package's `__name__`.
        homes: for each name that it hands on, the module below it that defines the name.

    Its ModuleNotFoundError, where that module cannot be imported, says what to install.
    """

    def resolve(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                missing(f"{package}.{name}", error), name=error.name
            ) from error

    return resolve


def missing(what: str, error: ModuleNotFoundError) -> str:
    """One line: what cannot be had without which package, and what to type.

    The losses and the reweighters need torch alone; who installed recap-fast for them, without its
    requirements, meets this where he asks for more.
    """
    return (
        f"{what} needs {error.name!r}, which is not installed: "
        f"`pip install recap-fast` brings everything that it requires"
    )
