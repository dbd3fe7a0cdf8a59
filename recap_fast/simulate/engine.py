"""Continuous batching: each decode step gives every request in flight one token.

A decode step of n requests takes `step + n * request` seconds: weights are read once, caches and
activations for each. A request's progress is therefore the same as that of all others of its
engine, and one counter an engine tells when each of them ends.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Request:
    """A completion being sampled."""

    group: int
    tokens: float
    begins: float = 0.0  # the engine's counter when it was admitted


class Engine:
    """One engine.

    Args:
        step: seconds of a decode step, whatever is in flight.
        request: seconds that each request in flight adds to it.
        slots: requests that fit at a time; others wait their turn. None: any number.
    """

    def __init__(self, step: float, request: float, slots: int | None = None) -> None:
        self._step, self._request = step, request
        self._slots = slots
        self._now = 0.0
        self._counter = 0.0  # tokens that a request here since the start would have by now
        self._order = 0
        self._active: list[tuple[float, int, Request]] = []  # by the counter at which they end
        self._waiting: deque[Request] = deque()
        self._marks, self._versions = [0.0], [0]  # the counter from which a version samples
        self.changes = 0
        """Grows whenever the time of the next end may have moved."""
        self.idle_seconds = 0.0
        self.request_seconds = 0.0
        """Integral of the requests in flight over time, pauses left out."""

    @property
    def in_flight(self) -> int:
        return len(self._active)

    @property
    def load(self) -> int:
        """Requests in flight or waiting."""
        return len(self._active) + len(self._waiting)

    def advance(self, time: float) -> None:
        """Samples until `time`."""
        elapsed = time - self._now
        if elapsed <= 0:
            return
        self._now = time
        count = len(self._active)
        if count:
            self._counter += elapsed / (self._step + count * self._request)
            self.request_seconds += count * elapsed
        else:
            self.idle_seconds += elapsed

    def pause(self, until: float) -> None:
        """Samples nothing from the present time of the engine until another."""
        self._now = until
        self.changes += 1

    def set_version(self, version: int) -> None:
        """From now on tokens are of this version of the policy."""
        self._marks.append(self._counter)
        self._versions.append(version)

    def admit(self, requests: Sequence[Request]) -> None:
        self._waiting.extend(requests)
        self._fill()

    def next_end(self) -> float:
        """When the next request ends if nothing is admitted before; inf without requests."""
        if not self._active:
            return float("inf")
        left = self._active[0][0] - self._counter
        return self._now + max(left, 0.0) * (self._step + len(self._active) * self._request)

    def collect(self) -> list[Request]:
        """Takes out the requests that have ended by now."""
        ended: list[Request] = []
        while self._active and self._active[0][0] <= self._counter + 1e-6:
            ended.append(heapq.heappop(self._active)[2])
        if ended:
            self._fill()
        return ended

    def tokens_by_version(self, request: Request) -> list[tuple[int, float]]:
        """(version, tokens) of a request that has ended."""
        begins, end = request.begins, request.begins + request.tokens
        if begins >= self._marks[-1]:
            return [(self._versions[-1], request.tokens)]
        found = []
        for place in range(bisect_right(self._marks, begins) - 1, len(self._marks)):
            after = self._marks[place + 1] if place + 1 < len(self._marks) else end
            tokens = min(after, end) - max(self._marks[place], begins)
            if tokens > 0:
                found.append((self._versions[place], tokens))
        return found

    def _fill(self) -> None:
        while self._waiting and (self._slots is None or len(self._active) < self._slots):
            request = self._waiting.popleft()
            request.begins = self._counter
            self._order += 1
            heapq.heappush(self._active, (self._counter + request.tokens, self._order, request))
        self.changes += 1


def spread(engines: Sequence[Engine], requests: Sequence[Request]) -> None:
    """Gives each request to the engine with the fewest."""
    heap = [(engine.load, place) for place, engine in enumerate(engines)]
    heapq.heapify(heap)
    dealt: list[list[Request]] = [[] for _ in engines]
    for request in requests:
        load, place = heap[0]
        dealt[place].append(request)
        heapq.heapreplace(heap, (load + 1, place))
    for engine, own in zip(engines, dealt, strict=True):
        if own:
            engine.admit(own)
