"""What a server is told about the weights that it gets: which run's they are, and of which step.

Step numbers alone would be those of any run, and two that attach to one server would take each
other's tokens for their own.
"""

from __future__ import annotations

import secrets

from recap_fast.rollout.protocol import EngineError

_NOT_GIVEN = "default"
"""What vLLM says before anybody has given it weights."""


class OtherRunError(EngineError):
    """A server has weights of another run: the two would take it from each other in turns."""


def new_run() -> str:
    """The id of a run, or of a part of it: an engine's, from its start to its end."""
    return secrets.token_hex(4)


def label(run: str, version: int) -> str:
    return f"{run}:{version}"


def is_of_another(text: str, run: str) -> bool:
    """Whether a server's label is anybody's but this run's: another run's, or unknown."""
    return text != _NOT_GIVEN and text.rpartition(":")[0] != run


def check(text: str, run: str, url: str) -> None:
    """Raises `OtherRunError` for a label of another run, on the server at `url`."""
    if is_of_another(text, run):
        raise taken(text, run, url)


def taken(text: str, run: str, url: str) -> OtherRunError:
    """That the server at `url` has what `text` names, and not this run's."""
    return OtherRunError(
        f"the server at {url} has weights of another run ({text!r}, and this run is {run!r}): "
        f"a server serves one run at a time; let the other one end, or start another server"
    )
