"""What every integration asks of its peer first: is it there, and is it the release we tested?"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

__all__ = ["TESTED", "require_peer"]

TESTED = {"trl": "1.16", "liger-kernel": "0.8.5", "verl": "0.9.1"}
"""Distribution -> the release whose equality tests pass. "1.16" stands for 1.16.*."""


def require_peer(distribution: str) -> str:
    """The installed release of a peer, a name in `TESTED`.

    Warns (UserWarning, naming both releases) where it is not the tested one.

    Raises:
        ImportError: it is not installed; says what to type.
    """
    tested = TESTED[distribution]
    pin = f"{distribution}=={tested}" + (".*" if tested.count(".") < 2 else "")
    module = f"recap_fast.integrations.{distribution.split('-')[0]}"
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        raise ImportError(
            f"{module} needs {distribution}, which is not installed: pip install '{pin}'",
            name=distribution.replace("-", "_"),
        ) from None
    parts = tested.split(".")
    # Compared as text: nothing here may need more than torch. A pre-release is another release.
    if installed.partition("+")[0].split(".")[: len(parts)] != parts:
        warnings.warn(
            f"{module} is tested with {distribution} {tested}, and {installed} is installed: "
            f"what it replaces there may have changed (pip install '{pin}')",
            stacklevel=3,
        )
    return installed
