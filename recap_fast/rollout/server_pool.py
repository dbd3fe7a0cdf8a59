"""Several servers as one: requests go where least is under way, and survive the servers.

All of it runs in one event loop. A server that dies, hangs, answers nonsense or samples from old
weights is taken out; what it was asked is asked of another, or of itself once it is back: restarted
where it is ours, waited for where it is not. It comes back with the newest weights or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Literal

from torch import Tensor

from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_adapters import NamedAdapters
from recap_fast.rollout.server_client import ServerClient, ServerTrouble, each
from recap_fast.rollout.server_label import OtherRunError, label
from recap_fast.rollout.server_member import (
    Member,
    has_died,
    in_full,
    is_itself,
    wait_listening,
    wait_ready,
    was_killed,
)
from recap_fast.rollout.server_request import Completion, Request
from recap_fast.rollout.shared_weights import DIGEST_COLUMNS, Comparison, WrittenWeights
from recap_fast.rollout.transfer import Transfer

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
"""How often a request is asked before the run ends."""
_STARTS = 3
"""How often a server is started in a row without having answered a request."""
_WATCHED_EVERY = 2.0
_LONGEST_REST = 60.0
"""Seconds after which a server that is given up is tried again at the latest, if it is healthy."""
_HEALTH_WAIT = 10.0
_GOING = 60.0
"""Seconds for which a server that was stopped is waited for to be gone."""
_SILENT = 2
"""Health checks in a row without an answer, after which a server counts as dead."""

_Refusals = dict[Member, tuple[EngineError, asyncio.Task[None] | None]]
"""What servers said that took no fault of theirs to be the reason, and what had last brought each
back."""


class ServerPool:
    """Args:
    members: at least one.
    transfer: how this process gives servers their weights, and starts them again; None for the
        run's other processes, which only sample.
    timeout: seconds in which a server with requests under way must answer one of them or sample a
        token, in which an update must end, but for the transfer, which has a bound of its own, and
        for which a server of somebody else's is waited for.
    start_timeout: seconds in which a server must be ready.
    recompute: whether an update has requests in flight recompute their keys and values.
    has_images: whether servers cache features of images.
    adapters: what this process gives servers in the place of weights, by name; None as `transfer`.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        transfer: Transfer | None,
        timeout: float,
        start_timeout: float,
        recompute: bool,
        has_images: bool,
        adapters: NamedAdapters | None = None,
    ) -> None:
        self.members = list(members)
        self.reissued = 0
        """Requests that were asked again."""
        self._transfer = transfer
        self._leads = transfer is not None or adapters is not None
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._recompute = recompute
        self._has_images = has_images
        self._adapters = adapters
        self._busy, self._busy_since, self._waiting = 0.0, 0.0, 0
        self._weights: WrittenWeights | None = None
        self._comparison = Comparison()
        self._version: int | None = None
        self._newest = 0
        """The version that servers may have by now: while an update is under way, newer than the
        other."""
        self._adapter: str | None = None
        """The name of this version's, where there are adapters."""
        self._writing = False
        self._readers = 0
        self._changed = asyncio.Condition()
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self._taken: OtherRunError | None = None
        """A server was taken by another run, which ends this one."""

    async def start(self, check: Callable[[ServerClient], Awaitable[None]]) -> None:
        """Waits until all servers are ready, and checks each.

        Raises:
            EngineError: one is not, with the end of its log.
        """
        await in_full(self._start_member(member, check) for member in self.members)
        self._watch = asyncio.create_task(in_full(map(self._watch_over, self.members)))

    async def _start_member(
        self, member: Member, check: Callable[[ServerClient], Awaitable[None]]
    ) -> None:
        if member.is_attached:
            await wait_listening(member)
        try:
            await self._wait_ready(member, self._start_timeout)
        except EngineError:
            if member.process is None:
                raise
            status = member.process.exit_status
            if status is not None and not was_killed(status):
                if not await member.client.is_listening():
                    raise  # it would say the same again
                logger.warning("%s ended, and another listens there: it is started again", member)
            # A process of vLLM's that is killed as it starts can leave the others waiting for it.
            await self._start_again(member)
        try:
            await check(member.client)
        except ServerTrouble as error:
            raise EngineError(str(error)) from None

    async def _wait_ready(self, member: Member, seconds: float) -> None:
        await wait_ready(member, seconds, _HEALTH_WAIT)

    # Sampling

    def busy_seconds(self) -> float:
        """In which at least one request was under way, so far."""
        since = time.monotonic() - self._busy_since if self._waiting else 0.0
        return self._busy + since

    async def sample(self, request: Request) -> list[Completion]:
        """Completions of one prompt, from weights no older than those of the last update.

        Raises:
            EngineError: no server could do it, or another run has taken one.
        """
        if not self._waiting:
            self._busy_since = time.monotonic()
        self._waiting += 1
        try:
            return await self._sample(request)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._busy += time.monotonic() - self._busy_since

    async def _sample(self, request: Request) -> list[Completion]:
        trouble, failures, asked = "", 0, 0
        refusals: _Refusals = {}
        while failures < _ATTEMPTS:
            member = await self._choose(refusals)
            version = self._version
            if version is None:
                raise EngineError("the servers were asked for completions before they got weights")
            self.reissued += asked > 0
            asked += 1
            if not member.under_way:
                member.last_sign = time.monotonic()
            task = asyncio.create_task(member.client.generate(request, version, self._adapter))
            member.under_way.add(task)
            member.tokens += request.tokens
            try:
                completions = await task
                oldest = min(min(one.versions) for one in completions)
                if oldest < version:
                    raise ServerTrouble(
                        f"{member} sampled from the weights of step {oldest}, where those of step "
                        f"{version} were wanted"
                    )
                newest = max(max(one.versions) for one in completions)
                if newest > self._newest:
                    raise ServerTrouble(
                        f"{member} says that it sampled from the weights of step {newest}, and the "
                        f"newest are those of step {self._newest}"
                    )
            except OtherRunError as error:
                self._taken = error
                raise
            except EngineError as error:
                if await is_itself(member):  # its fault, or the request's: another server will say
                    refusals[member] = error, member.recovery
                else:
                    trouble = str(error)
                    failures += 1
                    self._take_out(member, trouble)
                continue
            except ServerTrouble as error:
                trouble = str(error)
                failures += 1
                self._take_out(member, trouble)
                continue
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is not None and current.cancelling():
                    task.cancel()
                    raise
                trouble = f"{member} was taken out"  # and the request with it
                failures += 1
                continue
            finally:
                member.under_way.discard(task)
                member.tokens -= request.tokens
            member.last_sign = time.monotonic()
            member.failures = 0
            member.does_well()
            for other, (refusal, recovery) in refusals.items():
                if other.recovery is recovery:
                    self._take_out(other, str(refusal))
            return completions
        raise EngineError(f"{trouble}; asked {asked} times")

    async def _choose(self, refusals: _Refusals | None = None) -> Member:
        """The server with the least under way, once there is one.

        Args:
            refusals: servers that are not to be asked, until they have been brought back.

        Raises:
            EngineError: all are given up, with the reasons, or have refused, or another run has
                taken one.
        """
        async with self._changed:
            while True:
                if self._taken is not None:
                    raise self._taken
                up = [member for member in self.members if member.state == "up"]
                refused = {
                    member: error
                    for member, (error, recovery) in (refusals or {}).items()
                    if member.recovery is recovery
                }
                ready = [member for member in up if member not in refused]
                if ready:
                    return min(ready, key=lambda member: member.tokens)
                if up and all(member.state in ("up", "lost") for member in self.members):
                    raise next(iter(refused.values()))
                if all(member.state == "lost" for member in self.members):
                    why = "; ".join(member.trouble for member in self.members)
                    raise EngineError(f"no server is left: {why}")
                await self._changed.wait()

    # Weights

    def is_out(self) -> bool:
        """Whether there is no server to sample from, for now at least."""
        return all(member.state != "up" for member in self.members)

    async def hold(self) -> None:
        """Waits until no server reads the weights, and keeps all from it until `update`, or
        `let_go` where there will be none."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._readers)
            self._writing = True

    async def let_go(self, weights: WrittenWeights | None = None) -> None:
        """Weights may be read again: these, or none where the writing of others failed."""
        async with self._changed:
            self._weights = weights
            self._writing = False
            self._changed.notify_all()

    @asynccontextmanager
    async def _read(self) -> AsyncIterator[WrittenWeights]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._writing)
            self._readers += 1
            weights = self._weights
        try:
            if weights is None:
                raise EngineError("there are no weights to give")
            yield weights
        finally:
            async with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    async def update(self, weights: WrittenWeights) -> None:
        """Gives every server new weights, after `hold`. Those that fail at it are taken out and
        brought back.

        Raises:
            EngineError: none is left, or another run has taken one.
        """
        self.announce(weights.version)
        await self.let_go(weights)
        # Those that are out will come back with these weights.
        members = [member for member in self.members if member.state in ("starting", "up")]
        assert self._transfer is not None
        together = [members] if self._transfer.is_joint else [[member] for member in members]
        await in_full(self._update_members(some) for some in together if some)
        await self._choose()
        self._version = weights.version

    def announce(self, version: int) -> None:
        """From now on servers may have weights of this version. Those that do not lead say so
        before the process that leads gives them: servers answer from them while others still wait
        for theirs."""
        self._newest = max(self._newest, version)

    def withhold(self) -> None:
        """An update was given up: nothing shall be sampled from what is there."""
        self._version = None

    async def update_adapters(self) -> str:
        """Gives every server the newest adapters, and returns their name. What is under way goes
        on meanwhile. Raises as `update` does."""
        assert self._adapters is not None
        newest = self._adapters.newest
        assert newest is not None
        self.announce(newest.version)
        members = [member for member in self.members if member.state in ("starting", "up")]
        await in_full(self._give_adapters(member) for member in members)
        await self._choose()
        self._version, self._adapter = newest.version, newest.name
        return newest.name

    async def _give_adapters(self, member: Member) -> None:
        assert self._adapters is not None
        async with member.lock:
            if member.state == "out":  # and will come back with these
                return
            try:
                async with self._bounded(member, "giving it adapters", self._deadline()):
                    await self._adapters.give(member.client)
            except (ServerTrouble, EngineError) as error:
                self._note(error)
                self._take_out(member, str(error))
            else:
                await self._has_newest(member)

    async def _update_members(self, members: Sequence[Member]) -> None:
        async with AsyncExitStack() as stack:
            for member in members:
                await stack.enter_async_context(member.lock)
            _, failed = await self._install(members)
        for member in members:
            if member in failed:
                self._note(failed[member])
                self._take_out(member, str(failed[member]))
            else:
                await self._has_newest(member)

    async def _has_newest(self, member: Member) -> None:
        if member.state != "out":  # taken out meanwhile for what a request met: it is restarted
            member.does_well()
            await self._set(member, "up")

    async def _install(self, members: Sequence[Member]) -> tuple[int, Mapping[Member, Exception]]:
        """Gives servers the newest weights, sees what they have then, and returns the version and
        those that failed, which stay paused: nobody shall sample from half of an update."""
        assert self._transfer is not None
        by_client = {member.client: member for member in members}
        failed: dict[Member, Exception] = {}
        async with self._read() as weights:
            until = self._deadline()

            async def all_but_failed(stage: str, work: Callable[[Member], Awaitable[None]]) -> None:
                async def bounded(member: Member) -> None:
                    async with self._bounded(member, stage, until):
                        await work(member)

                failed.update(await each([m for m in members if m not in failed], bounded))

            await all_but_failed("pausing", lambda x: self._ready(x, weights.version))
            ready = [member.client for member in members if member not in failed]
            began = time.monotonic()
            lost = await self._transfer.send(ready, weights) if ready else {}
            until += time.monotonic() - began
            failed |= {by_client[client]: error for client, error in lost.items()}
            await all_but_failed("finishing", lambda x: self._finish(x, weights.version))
        await all_but_failed("checking", lambda x: self._check(x, weights))
        return weights.version, failed

    def _deadline(self) -> float:
        """Of an update that begins now."""
        return time.monotonic() + self._timeout

    @asynccontextmanager
    async def _bounded(self, member: Member, stage: str, until: float) -> AsyncIterator[None]:
        """Raises `ServerTrouble` where a server's part of an update has not ended by then. Each
        route has a bound too, but an update takes several."""
        try:
            async with asyncio.timeout(until - time.monotonic()):
                yield
        except TimeoutError:
            raise ServerTrouble(
                f"{member} did not end its update within {self._timeout:g} s: {stage}"
            ) from None

    def _note(self, error: Exception) -> None:
        if isinstance(error, OtherRunError):
            self._taken = error

    async def _ready(self, member: Member, version: int) -> None:
        if member.is_given:  # whatever a run that has ended has left is taken over, but once
            await member.client.own_version()
        await member.client.pause(recompute=self._forgets(member))
        if member.state != "up":  # or its last update has ended
            await member.client.end_update()
        await member.client.start_update(version)

    async def _finish(self, member: Member, version: int) -> None:
        await member.client.finish_update(version)
        member.is_given = True

    def _forgets(self, member: Member) -> bool:
        """Whether what a server has computed from its old weights is of no use."""
        return self._recompute or member.state != "up"

    async def _check(self, member: Member, weights: WrittenWeights) -> None:
        """Sees what a server has, and lets it go on."""
        client = member.client
        if self._has_images and self._forgets(member):
            await client.drop_image_caches()
        text = await client.own_version()
        if text != label(client.run, weights.version):
            raise ServerTrouble(
                f"{member} says that it has weights {text!r} after those of {weights.version}"
            )
        found = await client.digests(weights.shapes, DIGEST_COLUMNS)
        wrong = self._comparison.differing(client.url, found, weights.digests)
        if wrong:
            raise ServerTrouble(
                f"{member} does not hold the values that it was sent of {len(wrong)} of "
                f"{len(found)} weights: {', '.join(wrong[:5])}"
            )
        await client.resume()

    def follow(self, version: int, adapter: str | None = None) -> None:
        """For processes that do not lead: the servers have the weights of this version, or the
        adapters of this name."""
        self.announce(version)
        self._version, self._adapter = version, adapter
        for member in self.members:
            if member.state == "starting":
                member.state = "up"

    async def columns(self, shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, Tensor]:
        """See `ServerClient.columns`: those of the first server that answers; nothing where none
        does."""
        for member in self.members:
            if member.state == "up":
                with suppress(ServerTrouble, EngineError):
                    return await member.client.columns(shapes, count)
        return {}

    # Bringing servers back

    def _take_out(self, member: Member, why: str) -> None:
        if member.state in ("out", "lost") or self._closing:
            return
        logger.warning("%s is taken out: %s", member, why)
        member.state = "out"
        member.failures += 1
        if self._transfer is not None:
            self._transfer.forget(member.client)
        for task in list(member.under_way):
            task.cancel()
        member.recovery = asyncio.create_task(self._recover(member, why))

    async def _recover(self, member: Member, why: str) -> None:
        ours = member.start is not None and self._leads
        while member.failures <= _STARTS:
            try:
                async with member.lock:
                    await self._bring_back(member)
            except Exception as error:
                is_known = isinstance(error, ServerTrouble | EngineError)
                why = str(error) if is_known else f"{type(error).__name__}: {error}"
                self._note(error)
                if not ours:
                    break
                logger.warning(
                    "%s could not be brought back: %s", member, why, exc_info=not is_known
                )
                member.failures += 1
            else:
                member.silent = 0
                logger.warning("%s is back", member)
                await self._set(member, "up")
                return
        # A server may be healthy and fail at its weights each time, which all are read for.
        member.rest = min(max(_WATCHED_EVERY, 2 * member.rest), _LONGEST_REST)
        member.rests_until = time.monotonic() + member.rest
        if why != member.trouble:
            logger.error("%s is given up: %s", member, why)
        member.trouble = why
        await self._set(member, "lost")

    async def _bring_back(self, member: Member) -> None:
        """Raises `ServerTrouble` or `EngineError` where it is not back with the newest weights."""
        if member.start is not None and self._leads:
            await self._start_again(member)
        else:
            # Whoever only samples does not know whether the leader starts it again meanwhile.
            patience = self._timeout if self._leads else max(self._timeout, self._start_timeout)
            await self._wait_ready(member, patience)
        if self._adapters is not None:
            async with self._bounded(member, "giving it adapters", self._deadline()):
                await self._adapters.give(member.client)
        elif self._transfer is not None and self._weights is not None:
            self._transfer.forget(member.client)  # what it held before may be gone
            version = None
            while version != self._weights.version:  # an update in the meantime has passed it by
                version, failed = await self._install([member])
                for error in failed.values():
                    raise error
        elif not self._leads:
            await self._wait_for_weights(member)

    async def _start_again(self, member: Member) -> None:
        assert member.process is not None
        assert member.start is not None
        await asyncio.to_thread(member.process.stop)
        if was_killed(member.process.exit_status or 0):  # maybe the keeper, and nothing else
            await self._wait_gone(member)
        member.process = await asyncio.to_thread(member.start)
        await self._wait_ready(member, self._start_timeout)

    async def _wait_gone(self, member: Member) -> None:
        """What has lost its keeper takes a while to end, and has the port, and a GPU's memory,
        until then. Another who has taken the port keeps it."""
        until = time.monotonic() + _GOING
        while await member.client.is_listening():
            if time.monotonic() > until:
                logger.warning("%s was stopped, and somebody still listens there", member)
                return
            await asyncio.sleep(0.1)

    async def _wait_for_weights(self, member: Member) -> None:
        """Until the leader has given it those that are known here, or newer ones. What it starts
        with, or had when it was lost, is older."""
        until = time.monotonic() + self._timeout
        while True:
            text = await member.client.weight_version()
            run, _, step = text.rpartition(":")
            is_ours = run == member.client.run and step.isdecimal()
            if self._adapter is not None:
                if self._adapter in await member.client.adapters():
                    return
            elif is_ours and int(step) >= (self._version or 0):
                return
            if time.monotonic() > until:
                raise EngineError(
                    f"{member} has weights {text!r} and was given none of step {self._version} "
                    f"within {self._timeout:g} s"
                )
            await asyncio.sleep(0.5)

    async def _set(self, member: Member, state: Literal["up", "lost"]) -> None:
        member.state = state
        member.last_sign = time.monotonic()
        async with self._changed:
            self._changed.notify_all()

    async def _watch_over(self, member: Member) -> None:
        while True:
            await asyncio.sleep(_WATCHED_EVERY)
            try:
                await self._look_at(member)
            except Exception:
                logger.exception("looking after %s failed; it goes on", member)

    async def _look_at(self, member: Member) -> None:
        if self._taken is not None:
            return
        if member.state == "lost" and member.start is None:
            if time.monotonic() < member.rests_until:
                return
            if member.locate is not None:
                member.locate()
            if await member.client.is_healthy(_HEALTH_WAIT):  # it may join again
                member.failures, member.state = 0, "out"
                member.recovery = asyncio.create_task(self._recover(member, "it was lost"))
            return
        if member.state != "up" or member.lock.locked():
            return
        process = member.process
        if process is not None and process.exit_status is not None:
            self._take_out(member, f"it ended with status {process.exit_status}")
            return
        status = await member.client.health(_HEALTH_WAIT)
        member.silent = 0 if status == 200 else member.silent + 1
        if member.silent >= _SILENT or (member.silent and await has_died(member, status)):
            self._take_out(member, "it does not answer")
        elif member.under_way:
            await self._look_at_progress(member)

    async def _look_at_progress(self, member: Member) -> None:
        """A server that samples may take longer than `timeout` for its longest requests."""
        quiet = time.monotonic() - member.last_sign
        if quiet < self._timeout / 2:
            member.sampled = None
            return
        before, member.sampled = member.sampled, await member.client.sampled_tokens()
        if before is not None and member.sampled is not None and member.sampled > before:
            member.last_sign = time.monotonic()
        elif quiet > self._timeout and member.under_way and member.state == "up":
            count = len(member.under_way)
            self._take_out(
                member,
                f"none of {count} requests was answered, and no token sampled, for "
                f"{self._timeout:g} s",
            )

    async def close(self) -> None:
        self._closing = True
        tasks = [m.recovery for m in self.members if m.recovery] + [self._watch]
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)
        await in_full(self._stop(member) for member in self.members)

    async def _stop(self, member: Member) -> None:
        await member.client.close()
        if member.process is not None:
            await asyncio.to_thread(member.process.stop)
