"""reasoning-gym datasets as sources: one seed, one set of rows, in whatever process."""

from __future__ import annotations

import atexit
import os
import pickle  # noqa: TID251 (between this process and one of its own)
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from recap_fast.config import SourceConfig
from recap_fast.data.gym_process import Reply, Request
from recap_fast.data.row_columns import DataError, nearest


class GymRows:
    """A reasoning-gym dataset: row i is generated from the source's seed and i when it is asked
    for.

    Args:
        seed: of the source; a `seed` among its parameters comes before it.

    Raises:
        DataError: there is no such dataset, or it refuses its parameters.
    """

    def __init__(self, config: SourceConfig, seed: int) -> None:
        assert config.reasoning_gym is not None
        self._source = config.name
        self._name = config.reasoning_gym
        _check_names(config, self._ask(Request()).value)
        parameters = {"seed": seed, **config.parameters, "size": config.size}
        # In one order: the pickle is what the dataset is known by.
        self._parameters = pickle.dumps(dict(sorted(parameters.items())))
        reply = self._ask(Request(self._name, self._parameters))
        if reply.error is not None:
            raise DataError(
                f"source {config.name!r}: reasoning-gym {self._name!r} refuses the parameters "
                f"{config.parameters}: {reply.error.removeprefix('AssertionError: ')}"
            )
        self._size: int = reply.value

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        reply = self._ask(Request(self._name, self._parameters, row))
        if reply.error is not None:  # whatever a generator raises for what it cannot meet
            raise DataError(f"{self.where(row)} cannot be generated: {reply.error}")
        entry: Mapping[str, Any] = reply.value
        return entry

    def where(self, row: int) -> str:
        return f"reasoning-gym {self._name!r}: row {row}"

    def _ask(self, request: Request) -> Reply:
        try:
            return _generator().ask(request)
        except (OSError, EOFError) as error:
            _generator.cache_clear()
            raise DataError(
                f"source {self._source!r}: the process that generates reasoning-gym's rows died "
                f"(its own messages are above); it was asked for {self._name!r}, row {request.row}"
            ) from error


def _check_names(config: SourceConfig, known: Mapping[str, list[str]]) -> None:
    name = str(config.reasoning_gym)
    if name not in known:
        raise DataError(
            f"source {config.name!r}: reasoning-gym has no dataset {name!r}{nearest(name, known)}"
        )
    for parameter in config.parameters:
        if parameter == "size":
            raise DataError(
                f"source {config.name!r}: `size` is a key of the source, not of its parameters"
            )
        if parameter not in known[name]:
            raise DataError(
                f"source {config.name!r}: reasoning-gym {name!r} has no parameter {parameter!r}"
                f"{nearest(parameter, known[name])}"
            )


class _Generator:
    """The process of `gym_process`, one for all sources of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            # Not -m: what it pickles would then be of a module named __main__.
            [sys.executable, "-c", "from recap_fast.data.gym_process import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Spared what ends the trainer's group: the step in flight has rows to draw yet.
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONHASHSEED": "0",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "PYTHONWARNINGS": "ignore::SyntaxWarning",  # of reasoning-gym's dependencies
            },
        )
        atexit.register(self.close)

    def ask(self, request: Request) -> Reply:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(pickle.dumps(request))
            self._process.stdin.flush()
            reply: Reply = pickle.load(self._process.stdout)  # noqa: S301 (of our own process)
        return reply

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        with suppress(OSError):
            self._process.kill()
            self._process.wait(timeout=5)


@cache
def _generator() -> _Generator:
    return _Generator()
