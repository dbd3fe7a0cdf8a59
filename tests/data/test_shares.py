from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from recap_fast.config import DataConfig, SourceConfig
from recap_fast.data.shares import AdaptiveShares, allocate, bounded_shares, mixing_shares


def rl(name):
    return SourceConfig(name=name, kind="rl", path="r.jsonl", rewards={"accuracy": "accuracy"})


def sft(name):
    return SourceConfig(name=name, kind="sft", path="s.jsonl")


def shares(mixing, sizes=(300, 100, 50)):
    config = DataConfig(sources=[rl("a"), rl("b"), sft("c")], mixing=mixing)
    return mixing_shares(config, dict(zip("abc", sizes, strict=True)))


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        ("uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("proportional", [300 / 450, 100 / 450, 50 / 450]),
        ("coreset", [1 / 3, 1 / 3, 1 / 3]),  # two reasoning sources share 2/3
        ({"a": 1.0, "c": 3.0}, [0.25, 0.0, 0.75]),
    ],
)
def test_shares(mixing, expected):
    assert shares(mixing) == pytest.approx(expected)


def test_coreset_is_half_the_reasoning_volume():
    sources = [rl("a"), *(sft(name) for name in "bcd")]
    config = DataConfig(sources=sources, mixing="coreset")
    assert mixing_shares(config, {}) == pytest.approx([2 / 3, 1 / 9, 1 / 9, 1 / 9])


@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 3, 1), (0.01, 0.49, 0.5), (1, 0, 2)])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_allocation_keeps_to_its_shares(weights, batch_size):
    expected = [weight / sum(weights) for weight in weights]
    totals = [0, 0, 0]
    for step in range(1, 301):
        counts = allocate(expected, totals, batch_size)
        assert sum(counts) == batch_size
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        for total, share in zip(totals, expected, strict=True):
            assert abs(total - share * step * batch_size) < 1.5
    assert all(total > 0 for total, weight in zip(totals, weights, strict=True) if weight)


def test_adaptive_shares_start_from_those_that_are_given():
    sources = [rl("a"), *(sft(name) for name in "bcd")]
    plain = mixing_shares(DataConfig(sources=sources, mixing="coreset"), {})
    adaptive = DataConfig(sources=sources, mixing="adaptive", adaptive={"shares": "coreset"})
    assert mixing_shares(adaptive, {}) == plain


# -- bounds


def clipped(base, pulls, most):
    """Oracle: the scale at which the clipped shares add up to 1, by bisection of its logarithm."""
    base, pulls = np.array(base), np.maximum(pulls, 1e-6)
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        shares = base * np.clip(np.exp(middle) * pulls, 1 / most, most)
        low, high = (middle, high) if shares.sum() < 1 else (low, middle)
    return shares


@pytest.mark.parametrize("seed", range(40))
def test_bounded_shares_are_clipped_at_one_scale(seed):
    random = np.random.default_rng(seed)
    count = random.integers(1, 7)
    base = random.dirichlet(np.ones(count)) * (random.random(count) < 0.9)
    base = base / base.sum() if base.sum() else np.ones(count) / count
    pulls = np.exp(random.normal(size=count) * random.choice([0.1, 1.0, 6.0]))
    pulls[random.random(count) < 0.1] = 0
    most = 1 + random.exponential()
    found = np.array(bounded_shares(base.tolist(), pulls.tolist(), most))
    np.testing.assert_allclose(found, clipped(base, pulls, most), rtol=1e-7, atol=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found >= base / most * (1 - 1e-12)).all()
    assert (found <= base * most * (1 + 1e-12)).all()


def test_equal_pulls_leave_the_shares_as_they_were():
    assert bounded_shares([0.2, 0.3, 0.5], [3.0, 3.0, 3.0], 2.0) == pytest.approx([0.2, 0.3, 0.5])
    assert bounded_shares([1.0], [0.0], 1.5) == pytest.approx([1.0])


def test_a_bound_is_paid_for_by_those_within_theirs():
    # By hand: 8 of 10 parts are cut to twice a quarter; the rest of a half goes to 3 equal ones.
    assert bounded_shares([0.25] * 4, [8.0, 1, 1, 1], 2.0) == pytest.approx([0.5] + 3 * [1 / 6])


# -- adaptive


NAMES = [["one"], ["two", "three"], ["four"], ["four"]]
BASE = [0.4, 0.3, 0.2, 0.1]


def followed(steps, batch_size, most=3.0, seed=0):
    """Shares and counts of steps whose weights jump from one objective to another."""
    random = np.random.default_rng(seed)
    adaptive = AdaptiveShares(BASE, most, NAMES)
    for step in range(steps):
        yield list(adaptive.shares), adaptive.allocate(batch_size)
        weights = np.full(4, 1e-3)
        weights[(step // 17) % 4] = random.uniform(1, 4)
        adaptive.follow(dict(zip(("one", "two", "three", "four"), weights, strict=True)))


def test_pulls_are_smoothed_means_of_the_weights():
    adaptive = AdaptiveShares(BASE, 10.0, NAMES)
    assert adaptive.shares == BASE
    pulls = np.ones(4)
    for weights in ([2.0, 0.5, 1.5, 0.25], [1.0, 1.0, 2.0, 0.5]):
        adaptive.follow(dict(zip(("one", "two", "three", "four"), weights, strict=True)))
        mean = np.array([weights[0], (weights[1] + weights[2]) / 2, weights[3], weights[3]])
        pulls = 0.9 * pulls + 0.1 * mean / (np.array(BASE) @ mean)
        np.testing.assert_allclose(adaptive.shares, np.array(BASE) * pulls, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rows_follow_shares_that_change(batch_size):
    """What a source has given is what its shares promised, up to less than one row a source,
    however they jump; and no source waits for longer than that allows."""
    smallest = np.array(BASE) / 3
    promised, given = np.zeros(4), np.zeros(4)
    rows = []
    seen = []
    for shares, counts in followed(400, batch_size):
        shares = np.array(shares)
        seen.append(shares)
        assert shares.sum() == pytest.approx(1, abs=1e-12)
        assert (shares >= smallest * (1 - 1e-9)).all()
        assert (shares <= np.array(BASE) * 3 * (1 + 1e-9)).all()
        assert sum(counts) == batch_size
        promised += shares * batch_size
        given += counts
        assert (np.abs(promised - given) < 3).all()
        assert (given - promised < 1).all()
        rows.append(counts)
    assert np.ptp(seen, axis=0).min() > 0.05, "all shares move"
    for source, share in enumerate(smallest):
        last = [-1, *(step for step, counts in enumerate(rows) if counts[source]), 400]
        longest = max(after - before for before, after in pairwise(last))
        assert (longest - 1) * batch_size <= 4 / share


def test_a_change_acts_at_once_and_leaves_no_backlog():
    adaptive = AdaptiveShares([0.5, 0.5], 9.0, [["a"], ["b"]])
    for _ in range(200):
        adaptive.allocate(10)
        adaptive.follow({"a": 1.9, "b": 0.1})
    before = list(adaptive.shares)
    assert before[0] > 0.9
    assert adaptive.allocate(10)[0] >= 9
    for _ in range(60):
        adaptive.follow({"a": 1.0, "b": 1.0})
    # By the counts of all rows so far, b would get all of the next hundreds.
    assert [adaptive.allocate(10)[0] for _ in range(4)] == [5, 5, 5, 5]


def test_sources_without_a_share_stay_without():
    adaptive = AdaptiveShares([0.0, 0.5, 0.5], 4.0, [["a"], ["b"], ["c"]])
    for _ in range(50):
        adaptive.follow({"a": 2.9, "b": 0.05, "c": 0.05})
        assert adaptive.shares == pytest.approx([0, 0.5, 0.5])
        assert adaptive.allocate(3)[0] == 0
    adaptive.follow({"a": 3.0, "b": 0.0, "c": 0.0})
    assert adaptive.shares == pytest.approx([0, 0.5, 0.5])


def test_the_state_goes_on_to_the_bit():
    def run(adaptive, steps):
        found = []
        for step in steps:
            found.append((list(adaptive.shares), adaptive.allocate(3)))
            adaptive.follow({name: 1 + (step + len(name)) % 3 for row in NAMES for name in row})
        return found

    whole = run(AdaptiveShares(BASE, 2.0, NAMES), range(40))
    stopped = AdaptiveShares(BASE, 2.0, NAMES)
    run(stopped, range(23))
    resumed = AdaptiveShares(BASE, 2.0, NAMES)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert run(resumed, range(23, 40)) == whole[23:]
