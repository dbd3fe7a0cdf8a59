"""Rewards of groups that are sampled ahead: computed as they come, while the trainer trains."""

from __future__ import annotations

import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread

from recap_fast.rewards.scorer import RewardScorer, Scoring
from recap_fast.training.scored_rollouts import ScoredRollouts
from recap_fast.types import Rollout

_LOOKS_EVERY = 0.5
"""Seconds between looks at whether the reward workers are there."""


@dataclass(slots=True, eq=False)
class _Group:
    sampled: Future[list[Rollout]]
    scored: Future[ScoredRollouts]
    scoring: Scoring | None = None  # once it is sampled
    started: float = 0.0


class ScoringAhead:
    """Hands each group to the reward workers as it comes, whatever they have of others.

    All of it is done by one thread, which waits for no group in particular: it is told that a group
    was sampled, or has rewards.
    """

    def __init__(self, scorer: RewardScorer, max_new_tokens: int) -> None:
        self._scorer = scorer
        self._max_new_tokens = max_new_tokens
        self._told: SimpleQueue[_Group] = SimpleQueue()
        self._open: set[_Group] = set()  # with the workers
        self._closed = False
        # A daemon: a source that nobody has closed does not keep the process.
        Thread(target=self._run, name="scoring", daemon=True).start()

    def score(self, sampled: Future[list[Rollout]]) -> Future[ScoredRollouts]:
        """The group with its rewards, or what sampling or scoring it raised. Never done if `close`
        comes first, or if sampling is cancelled. Too many failures are for `RewardScorer.judge`."""
        scored: Future[ScoredRollouts] = Future()
        scored.set_running_or_notify_cancel()  # whoever waits for it shall not cancel it
        group = _Group(sampled, scored)
        sampled.add_done_callback(lambda _: self._told.put(group))  # the engine must not wait
        return scored

    def close(self) -> None:
        """Gives up what is being scored, without waiting."""
        self._closed = True

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._closed:
            with suppress(Empty):
                self._advance(self._told.get(timeout=_LOOKS_EVERY))
            if time.monotonic() - looked >= _LOOKS_EVERY:
                for group in list(self._open):  # a pool that is lost tells nothing
                    self._advance(group)
                looked = time.monotonic()

    def _advance(self, group: _Group) -> None:
        """Begins to score a group that was sampled, or takes what the workers made of it."""
        if group.scored.done() or group.sampled.cancelled():
            return
        try:
            rollouts = group.sampled.result()
            if group.scoring is None:
                group.started = time.monotonic()
                group.scoring = self._scorer.start(
                    self._max_new_tokens, judged=False, on_done=lambda: self._told.put(group)
                )
                self._open.add(group)
                group.scoring.add(rollouts)
            table = group.scoring.collect()
            if table is None:
                return
            seconds = time.monotonic() - group.started
            group.scored.set_result(ScoredRollouts(rollouts, table, 0.0, seconds))
        except BaseException as error:  # noqa: BLE001 (whoever waits for the future gets it)
            group.scored.set_exception(error)
        self._open.discard(group)
