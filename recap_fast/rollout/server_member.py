"""One server of a pool, and what is done with several at a time."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_client import ServerClient, ServerTrouble
from recap_fast.rollout.server_process import ServerProcess
from recap_fast.rollout.server_request import Completion

logger = logging.getLogger(__name__)

_ABSENT = 30.0
"""Seconds for which nobody may listen at an address that a run attaches to."""
_TOLD_EVERY = 60.0
_REFUSES_WITHIN = 1.0
"""Seconds in which this host refuses a connection to a port of its own."""


class Starter(Protocol):
    def __call__(self) -> ServerProcess:
        """Starts a server of ours, and has its client ask where it then is."""
        ...


@dataclass(eq=False)
class Member:
    """One server.

    Attributes:
        start: how to start it; None for one that somebody else has started.
        locate: for one that another process of the run starts: has its client ask where it is.
        is_attached: whether it is no server of the run's.
        is_given: whether the run has given it weights.
        state: "out": being brought back; "lost": given up.
        trouble: why it was given up, until it does well again.
        rest: seconds for which it is left alone once it is given up, where nobody starts it again.
        rests_until: when that ends.
        sampled: tokens that it had sampled when it was last asked, once requests take long.
        tokens: that requests under way there may cost.
    """

    client: ServerClient
    start: Starter | None = None
    process: ServerProcess | None = None
    locate: Callable[[], None] | None = None
    is_attached: bool = False
    is_given: bool = False
    state: Literal["starting", "up", "out", "lost"] = "starting"
    trouble: str = ""
    rest: float = 0.0
    rests_until: float = 0.0
    sampled: float | None = None
    tokens: int = 0
    under_way: set[asyncio.Task[list[Completion]]] = field(default_factory=set)
    last_sign: float = 0.0
    silent: int = 0
    failures: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever gives it weights."""
    recovery: asyncio.Task[None] | None = None

    @property
    def is_own(self) -> bool:
        """Whether a process of the run's starts it, this one or another."""
        return self.start is not None or self.locate is not None

    def __str__(self) -> str:
        return f"the server at {self.client.url}"

    def does_well(self) -> None:
        """It has answered a request, or taken an update like others: what was before is past."""
        self.trouble, self.rest = "", 0.0


async def wait_ready(member: Member, seconds: float, health_wait: float) -> None:
    """Waits until a server answers, and says in the log what is waited for.

    Args:
        health_wait: seconds that it may take to answer once.

    Raises:
        EngineError: it has ended, did not answer within `seconds`, or is none.
    """
    started = time.monotonic()
    told = -_TOLD_EVERY
    while True:
        process = member.process
        if process is not None and process.exit_status is not None:
            raise EngineError(
                f"{member} ended with status {process.exit_status} before it was ready; its "
                f"log, {process.log}, ends with:\n{process.said()}"
            )
        if member.locate is not None:
            member.locate()
        status = await member.client.health(health_wait)
        if status == 200 and await is_itself(member):
            return
        if status is not None and status < 500 and member.is_attached:
            raise EngineError(
                f"{member} answers /health with {status}, and vLLM's would with 200: something "
                f"else listens there; name a server of vLLM's in rollout.server.urls"
            )
        where = "" if process is None else f"; see its log, {process.log}"
        passed = time.monotonic() - started
        if passed > seconds:
            raise EngineError(f"{member} was not ready within {seconds:g} s{where}")
        if passed - told > _TOLD_EVERY:
            since = f", for {passed:.0f} s" if passed > _TOLD_EVERY else ""
            logger.info("waiting for %s to be ready%s%s", member, since, where)
            told = passed
        await asyncio.sleep(0.25)


async def is_itself(member: Member) -> bool:
    """Whether no other than the run's own server has answered: who has taken its port may be
    healthy too, and has not its key."""
    if not member.is_own:
        return True
    with suppress(ServerTrouble, EngineError):
        await member.client.weight_version()
        return True
    return False


async def has_died(member: Member, status: int | None) -> bool:
    """Whether a server that was up is certainly dead, and not merely slow.

    Args:
        status: as it has answered /health. vLLM's HTTP process says 503 once its engine is dead;
            what stands before a server of somebody else's may say so for a moment, or refuse.
    """
    if not member.is_own:
        return False
    if status is None:
        return await member.client.is_refusing(_REFUSES_WITHIN)
    return status == 503


async def wait_listening(member: Member) -> None:
    """Waits until somebody listens where a run attaches, for a short while.

    Raises:
        EngineError: nobody did.
    """
    started = time.monotonic()
    is_told = False
    while (problem := await member.client.why_absent()) is not None:
        problem = f"{member} cannot be reached: {problem}; is `recap-fast serve` running there?"
        if time.monotonic() - started > _ABSENT:
            raise EngineError(problem)
        if not is_told:
            logger.warning("%s Waiting for up to %g s", problem, _ABSENT)
            is_told = True
        await asyncio.sleep(0.25)


def was_killed(status: int) -> bool:
    """Whether a process was ended by a signal, as its parent or its parent's parent sees it."""
    return status < 0 or status >= 256 - signal.NSIG


async def in_full(work: Iterable[Awaitable[None]]) -> None:
    """Waits for all, and raises the first error then: nothing is left half done."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
