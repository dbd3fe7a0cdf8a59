"""What a step consists of: how many groups, and how long their completions are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Lengths:
    """The completion lengths of one step, as quantiles.

    Attributes:
        shares: [Q] of the completions, from 0 to 1, ascending.
        tokens: [Q] lengths that so many are not longer than.
        mean: tokens.
    """

    shares: tuple[float, ...]
    tokens: tuple[float, ...]
    mean: float

    @property
    def longest(self) -> float:
        return self.tokens[-1]

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[count] lengths in random order: one from each of `count` equal shares, and the longest,
        scaled to the mean. So a step of any size has the tail that was seen, and no longer one."""
        places = (np.arange(count) + 0.5) / count
        lengths = np.interp(places, self.shares, self.tokens)
        for _ in range(4):  # scaling meets the bounds, which moves the mean again
            lengths = np.clip(lengths * (self.mean / lengths.mean()), self.tokens[0], self.longest)
        lengths[-1] = self.longest
        return rng.permutation(np.maximum(np.rint(lengths), 1.0))

    def cut(self, limit: float) -> Lengths:
        """The same where no completion may be longer than `limit` tokens."""
        if limit >= self.longest:
            return self
        fine = np.linspace(0, 1, 1001)
        before = np.interp(fine, self.shares, self.tokens)
        scale = float(np.minimum(before, limit).mean() / before.mean())
        return Lengths(self.shares, tuple(min(t, limit) for t in self.tokens), self.mean * scale)


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of a run's steps.

    Attributes:
        groups: prompts that a step samples.
        group_size: completions of each.
        lengths: of measured steps; each simulated step takes one of them, in turns.
        trained_per_sampled: in each of them, tokens in the trained batch (prompts and supervised
            rows included) for each sampled one.
    """

    groups: int
    group_size: int
    lengths: Sequence[Lengths]
    trained_per_sampled: Sequence[float]

    def draw_step(self, turn: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
        """[groups, group_size] lengths of the step that is drawn in that turn, and its trained
        tokens for each sampled one."""
        count = len(self.lengths)
        # Near the golden section, which spreads few turns over the whole run, and prime to the
        # count, so that `count` turns take each step once.
        stride = round(0.618 * count) or 1
        while math.gcd(stride, count) > 1:
            stride += 1
        place = turn * stride % count
        drawn = self.lengths[place].draw(self.groups * self.group_size, rng)
        return drawn.reshape(self.groups, self.group_size), self.trained_per_sampled[place]


def clipped_lognormal(mean: float, longest: float, sigma: float) -> Lengths:
    """Lengths of which only a mean and a limit are known: log-normal, cut at the limit, with
    `sigma` the standard deviation of their logarithm before the cut."""
    shares = np.linspace(0, 1, 401)
    normal = _standard_normal_quantiles(shares)
    low, high = 0.0, float(np.log(longest)) + 6 * sigma
    for _ in range(60):
        middle = (low + high) / 2
        tokens = np.minimum(np.exp(middle + sigma * normal), longest)
        low, high = (middle, high) if tokens.mean() < mean else (low, middle)
    return Lengths(tuple(shares), tuple(np.maximum(tokens, 1.0)), mean)


def _standard_normal_quantiles(shares: np.ndarray) -> np.ndarray:
    from statistics import NormalDist

    inside = np.clip(shares, 1e-4, 1 - 1e-4)
    return np.array([NormalDist().inv_cdf(float(share)) for share in inside])
