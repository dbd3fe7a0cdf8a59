"""Rewards of the tiny runs. Their own module, since workers import it: no torch here."""

from __future__ import annotations

from recap_fast.types import RewardSample


def length(sample: RewardSample) -> float:
    return 1.0 if sample.finish_reason == "stop" else len(set(sample.completion)) / 10


def vowels(sample: RewardSample) -> float:
    return sum(letter in "aeiou" for letter in sample.completion) / 8


def even_only(sample: RewardSample) -> float:
    """Tells completions apart where the answer is an even number, and nowhere else."""
    return 1.0 if int(sample.answer) % 2 else len(set(sample.completion)) / 10


def constant(sample: RewardSample) -> float:
    return 0.5


def none(sample: RewardSample) -> None:
    return None
