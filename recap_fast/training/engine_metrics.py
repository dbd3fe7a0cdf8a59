"""What servers did for a run between two batches, of all its processes together."""

from __future__ import annotations

import time
from collections.abc import Callable

from recap_fast.training.distributed import World


class EngineMetrics:
    """Args:
    take: what this process's engine reports since the last call, see `ServerEngine.take_metrics`.
    world: the processes that call `take` together.
    """

    def __init__(self, take: Callable[[], dict[str, float]], world: World) -> None:
        self._take = take
        self._world = world
        self._since = time.monotonic()

    def take(self) -> dict[str, float]:
        """Since the last call, or the start: counts are summed over processes. Of seconds it is the
        most of any process, for requests of several overlap; the rest is `time/engine_idle`."""
        found: dict[str, float] = {}
        for _, own in self._world.exchange(lambda: ({}, self._take())):
            for key, value in own.items():
                before = found.get(key, 0)
                is_time = key.startswith("time/")
                found[key] = max(before, value) if is_time else before + value
        now = time.monotonic()
        if "time/engine_busy" in found:
            busy = found["time/engine_busy"]
            found["time/engine_idle"] = max(0.0, now - self._since - busy)
        self._since = now
        return found
