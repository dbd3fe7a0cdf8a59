"""What an answer is worth on which its verifier broke."""

from __future__ import annotations


class Unreadable(float):
    """The reward 0 for an answer that made a built-in reward raise: a wrong answer like any other
    to who calls the function, and counted apart by the scorer.

    Args:
        reason: the error, on one line.
    """

    reason: str

    def __new__(cls, reason: str) -> Unreadable:
        self = super().__new__(cls, 0.0)
        self.reason = reason
        return self
