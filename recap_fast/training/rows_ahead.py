"""The rows that were drawn ahead of the trainer, and how to draw them again.

Steps and refills draw from one cursor, in an order that a resumed run cannot find out by itself:
which groups were dropped, and between which steps, was told by their rewards. So was what the mix
follows. The order is therefore written down, from the oldest step on that is not trained on yet,
and is drawn again as it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from recap_fast.data.mix import DataStream
from recap_fast.types import Prompt, StepFeedback, StepRows, SupervisedRow

AHEAD = "drawn_ahead"
"""Key of a data cursor under which stands what was drawn behind it."""

Key = tuple[int, int]
"""A group's step and number in it, which its seed follows from. Refills go on counting."""


@dataclass(frozen=True, slots=True)
class DrawnPrompt:
    """A prompt whose group is to be trained on, or replaced."""

    step: int
    number: int
    place: int  # among the prompts of its step: its own, or that of the one that it came for
    refills: int  # how many groups were dropped from the place before
    prompt: Prompt

    @property
    def key(self) -> Key:
        return self.step, self.number


@dataclass(slots=True, eq=False)
class _Draw:
    """The rows of one step, and the stream before them."""

    step: int
    before: dict[str, Any]
    rows: StepRows
    groups: int  # so far


@dataclass(frozen=True, slots=True)
class _Refill:
    """Groups that others were drawn for, as (step, number, source)."""

    dropped: list[tuple[int, int, str]]


@dataclass(frozen=True, slots=True)
class _Followed:
    """What a step told the stream."""

    feedback: StepFeedback


class RowsAhead:
    """Draws from a stream, step by step and refill by refill. Alike in all processes of a run.

    Attributes:
        pending: what was drawn and is neither trained on nor dropped, by key.
        next_step: the first one that is not drawn.
    """

    def __init__(self, stream: DataStream) -> None:
        self.pending: dict[Key, DrawnPrompt] = {}
        self.next_step = 0
        self._stream = stream
        self._log: deque[_Draw | _Refill | _Followed] = deque()  # begins with a draw, or is empty
        self._trained: set[Key] = set()  # of the steps in the log

    def draw(self) -> None:
        """The rows of the next step."""
        before = self._stream.state_dict()
        rows = self._stream.next_step()
        draw = _Draw(self.next_step, before, rows, len(rows.prompts))
        self._log.append(draw)
        for place, prompt in enumerate(rows.prompts):
            if (draw.step, place) not in self._trained:
                drawn = DrawnPrompt(draw.step, place, place, 0, prompt)
                self.pending[drawn.key] = drawn
        self.next_step += 1

    def refill(self, dropped: Iterable[Key]) -> None:
        """Another prompt of the same source in the place of each of these groups, in their
        order."""
        found = [(*key, self.pending[key].prompt.source) for key in sorted(dropped)]
        if found:
            self._replace(found)

    def _replace(self, dropped: list[tuple[int, int, str]]) -> None:
        self._log.append(_Refill(dropped))
        new = self._stream.refill([source for _, _, source in dropped])
        for (step, number, _), prompt in zip(dropped, new, strict=True):
            old = self.pending.pop((step, number), None)
            if old is None:  # drawn again, and of an older step than what is drawn again
                continue
            draw = self._draw_of(step)
            drawn = DrawnPrompt(step, draw.groups, old.place, old.refills + 1, prompt)
            draw.groups += 1
            if drawn.key not in self._trained:
                self.pending[drawn.key] = drawn

    def _draw_of(self, step: int) -> _Draw:
        return next(one for one in self._log if isinstance(one, _Draw) and one.step == step)

    def supervised(self, step: int) -> list[SupervisedRow]:
        return self._draw_of(step).rows.supervised

    def prompts(self, step: int) -> list[Prompt]:
        """Those that the step has drawn first."""
        return self._draw_of(step).rows.prompts

    def trained(self, step: int, keys: Iterable[Key]) -> None:
        """These groups are trained on, and the supervised rows of all steps before `step`."""
        for key in keys:
            del self.pending[key]
            self._trained.add(key)
        open_steps = {one.step for one in self.pending.values()}
        while self._log:
            first = self._log[0]
            if isinstance(first, _Draw):
                if first.step >= step or first.step in open_steps:
                    break
                self._trained = {key for key in self._trained if key[0] != first.step}
            self._log.popleft()

    def follow(self, feedback: StepFeedback) -> None:
        """Tells the stream what a step gave: rows that are drawn already stay what they are."""
        self._stream.follow(feedback)
        if self._log and feedback != StepFeedback():
            self._log.append(_Followed(feedback))

    def state_dict(self) -> dict[str, Any]:
        """From where to draw again, JSON-able, and what of it is trained on or dropped already."""
        if not self._log:
            return self._stream.state_dict()
        oldest = self._log[0]
        assert isinstance(oldest, _Draw)
        log = [_encoded(one) for one in self._log]
        while log and log[-1] is None:
            log.pop()  # steps that nothing stands behind are drawn when they are due
        ahead = {
            "step": oldest.step,
            "trained": sorted(map(list, self._trained)),
            "log": log,
        }
        return {**oldest.before, AHEAD: ahead}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Goes on where `state_dict` was taken, after `step` optimizer steps."""
        ahead = state.get(AHEAD, {"step": step, "trained": []})
        self._stream.load_state_dict(without_ahead(state))
        self.next_step = ahead["step"]
        self.pending, self._log = {}, deque()
        self._trained = {(step, number) for step, number in ahead["trained"]}
        for entry in ahead.get("log", []):
            if entry is None:
                self.draw()
            elif isinstance(entry, Mapping):
                groups = [(source, row, is_solved) for source, row, is_solved in entry["groups"]]
                self.follow(StepFeedback(entry["weights"], groups))
            else:
                self._replace([(step, number, source) for step, number, source in entry])


def _encoded(entry: _Draw | _Refill | _Followed) -> Any:
    """JSON-able: nothing for a draw, a list for a refill, a mapping for what the mix follows."""
    if isinstance(entry, _Draw):
        return None
    if isinstance(entry, _Refill):
        return list(map(list, entry.dropped))
    feedback = entry.feedback
    return {"weights": dict(feedback.weights), "groups": list(map(list, feedback.groups))}


def without_ahead(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != AHEAD}


def is_in_order(state: Mapping[str, Any]) -> bool:
    """Whether nothing behind the cursor was trained on, dropped, or has changed the mix."""
    ahead = state.get(AHEAD, {})
    return not ahead.get("trained") and not ahead.get("log")
