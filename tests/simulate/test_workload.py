from __future__ import annotations

import numpy as np
import pytest

from recap_fast.simulate.workload import Lengths, Workload, clipped_lognormal

SOME = Lengths((0, 0.5, 0.9, 1), (10, 60, 200, 512), 88.0)


@pytest.mark.parametrize("count", [16, 64, 1000])
def test_drawn_lengths_have_the_mean_and_the_longest(count):
    drawn = SOME.draw(count, np.random.default_rng(0))
    assert drawn.max() == 512
    assert drawn.min() >= 10
    assert drawn.mean() == pytest.approx(88, rel=0.35 if count == 16 else 0.07)


def test_drawing_is_seeded_and_shuffled():
    first, again, other = (SOME.draw(50, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(np.sort(first), np.sort(other))


def test_a_lower_limit_shortens_the_longest():
    cut = SOME.cut(100)
    assert cut.longest == 100
    fine = np.interp(np.linspace(0, 1, 10_001), SOME.shares, SOME.tokens)
    assert cut.mean / 88 == pytest.approx(np.minimum(fine, 100).mean() / fine.mean(), rel=0.01)
    assert SOME.cut(512) is SOME


@pytest.mark.parametrize(
    ("mean", "longest"), [(3053, 3946), (551, 1386), (6000, 28672), (3900, 3946)]
)
def test_a_log_normal_has_the_published_mean(mean, longest):
    lengths = clipped_lognormal(mean, longest, 0.8)
    assert np.mean(lengths.tokens) == pytest.approx(mean, rel=0.01)
    assert lengths.longest == pytest.approx(longest)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 12, 100])
def test_each_measured_step_is_taken_once_in_turn(count):
    steps = tuple(Lengths((0, 1), (k + 1, k + 1), k + 1) for k in range(count))
    work = Workload(1, 1, steps, tuple(10.0 * (k + 1) for k in range(count)))
    drawn = [work.draw_step(turn, np.random.default_rng(0)) for turn in range(count)]
    assert sorted(lengths.item() for lengths, _ in drawn) == [k + 1 for k in range(count)]
    for lengths, trained in drawn:
        assert trained == 10 * lengths.item()
