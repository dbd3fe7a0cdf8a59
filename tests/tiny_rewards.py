"""Rewards of the tiny runs. Their own module, since workers import it: no torch here."""

from __future__ import annotations

from recap_fast.types import RewardSample


def length(sample: RewardSample) -> float:
    return 1.0 if sample.finish_reason == "stop" else len(set(sample.completion)) / 10


def vowels(sample: RewardSample) -> float:
    return sum(letter in "aeiou" for letter in sample.completion) / 8


def constant(sample: RewardSample) -> float:
    return 0.5


def none(sample: RewardSample) -> None:
    return None
