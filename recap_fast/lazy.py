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
    """

    def resolve(name: str) -> Any:
        if name in homes:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return resolve
