"""The process in which reasoning-gym's rows are generated, always with the same hash seed.

Some of its datasets go through sets of texts, whose order Python draws anew in each process, and
some ask Python's or NumPy's global random state. Here the first is fixed by the environment that
`gym_rows` starts the process with, and the second is seeded anew for every row: so a row depends on
its dataset, parameters and number alone. The trainer's own random state is left alone besides.

Requests and replies are pickles on standard input and output. Nothing here imports torch.
"""

from __future__ import annotations

import os
import pickle  # noqa: TID251 (between the trainer and this process of its own)
import random
import signal
import sys
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple


class Request(NamedTuple):
    """Asks for one row, or for the names that there are."""

    dataset: str = ""
    parameters: bytes = b""  # a pickled mapping, which is hashed as it is
    row: int | None = None  # None: how many rows there are


class Reply(NamedTuple):
    value: Any
    error: str | None = None  # type and text of what a dataset raised


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's, which ends us by EOF
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # some datasets print
    serve(sys.stdin.buffer, replies)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers requests until there are no more."""
    while True:
        try:
            request = pickle.load(requests)  # noqa: S301 (from the process that started this one)
        except EOFError:
            return
        try:
            reply = pickle.dumps(Reply(_answer(request)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (generators raise anything)
            reply = pickle.dumps(Reply(None, describe(error)))
        try:
            replies.write(reply)
            replies.flush()
        except BrokenPipeError:  # nobody waits for it any more
            return


def describe(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _answer(request: Request) -> Any:
    if not request.dataset:
        return _names()
    _fix_random_state(request)
    dataset = _open(request.dataset, request.parameters)
    return len(dataset) if request.row is None else dataset[request.row]


def _names() -> Mapping[str, list[str]]:
    """Every dataset's name, and its parameters'."""
    from reasoning_gym.factory import DATASETS

    return {name: [x.name for x in fields(config)] for name, (_, config) in DATASETS.items()}


def _fix_random_state(request: Request) -> None:
    import numpy as np

    random.seed(repr(request))  # of a text, by its SHA-512
    np.random.seed(random.getrandbits(32))


@lru_cache(maxsize=256)
def _open(name: str, parameters: bytes) -> Any:
    from reasoning_gym import create_dataset

    return create_dataset(name, **pickle.loads(parameters))  # noqa: S301 (as above)
