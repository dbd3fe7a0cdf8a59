"""Prompts that were solved, and when each comes back.

Training makes problems unsolvable that it had solved, and what it costs to restore one grows with
the time until it is seen again (correct-set turnover, arXiv 2606.03087). So solved prompts come
back in the place of new ones, before anything is sampled. This follows that paper's abstract: when
a prompt comes back, and for how long, is our own choice.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any, NamedTuple

from recap_fast.config import ReviewConfig

_REPAIRS = 4
"""How often in a row a prompt that is not solved any more comes back at once. One that was solved
by luck shall not take the place of others for good."""


class _Solved(NamedTuple):
    """A prompt that was solved. A tuple: they may be many, and each step copies their table."""

    due: int | None  # the step in which it may come back; None while it is being sampled
    interval: int  # steps until it is due again, were it not solved now
    failures: int = 0  # since it was solved


class ReviewQueue:
    """The solved prompts of one source, by row number.

    Args:
        config: what is reviewed, and when.
    """

    def __init__(self, config: ReviewConfig) -> None:
        self._config = config
        self._solved: dict[int, _Solved] = {}
        self._allowance = 0.0  # of rows, less than one, that earlier steps have left

    def take(self, count: int, step: int) -> list[int]:
        """Rows that come back in the place of some of a step's next `count` rows of the source.

        What is lost goes first, and then what is due for longest. What is not used of the share
        is gone: a queue that was empty makes up for nothing.
        """
        self._allowance += self._config.share * count
        most = int(self._allowance)
        self._allowance -= most
        due = (
            (one.failures == 0, one.due, row)
            for row, one in self._solved.items()
            if one.due is not None and one.due <= step
        )
        rows = [row for _, _, row in heapq.nsmallest(most, due)] if most else []
        for row in rows:
            one = self._solved[row]
            self._solved[row] = one._replace(due=None)
        return rows

    def forget(self, row: int) -> None:
        """A row that cannot be used any more."""
        del self._solved[row]

    def report(self, row: int, is_solved: bool | None, step: int) -> bool:
        """Takes in what became of a prompt, reviewed or not. Whether it was reviewed.

        Args:
            is_solved: None: nobody knows. A prompt under review then waits as long again.
            step: the next one that is drawn.
        """
        before = self._solved.get(row)
        was_reviewed = before is not None and before.due is None
        after = self._config.after
        if is_solved is None:
            if before is not None and was_reviewed:
                self._solved[row] = before._replace(due=step + before.interval)
        elif is_solved:
            interval = after
            if before is not None and not before.failures:
                # It lasted that long where a review says so. A small source's row comes every step.
                interval = 2 * before.interval if was_reviewed else before.interval
            self._solved[row] = _Solved(step + interval, interval)
        elif before is not None and before.failures < _REPAIRS:
            self._solved[row] = _Solved(step, after, before.failures + 1)
        elif before is not None:
            del self._solved[row]
        return was_reviewed

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"allowance": self._allowance, "solved": dict(self._solved)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._allowance = state["allowance"]
        # JSON makes texts of the row numbers.
        self._solved = {int(row): _Solved(*one) for row, one in state["solved"].items()}
