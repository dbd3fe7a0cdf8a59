"""Reweighters against independent oracles, and the properties all of them share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recap_fast.reweighting.recap import (
    REWEIGHTERS,
    RecapReweighter,
    Reweighter,
    make_reweighter,
)
from tests.no_sync import ForbidHostSync

RETAINING = "recap with retention"
NAMES = [*sorted(REWEIGHTERS), RETAINING]
K = 3
SIGNALS = ("reward", "loss", "reward")


def build(name: str, **keywords: Any) -> Reweighter:
    if name == RETAINING:
        return make_reweighter("recap", K, signals=SIGNALS, window=4, retention=5.0, **keywords)
    if name == "static":
        keywords.setdefault("weights", [1.0, 2.0, 3.0])
    if name in ("recap", "dwa", "saw"):
        keywords.setdefault("window", 3)
    return make_reweighter(name, K, signals=SIGNALS, **keywords)


def stream(steps: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Positive values and presence for K objectives; a quarter absent, some of it as NaN."""
    generator = np.random.default_rng(seed)
    values = generator.uniform(0.1, 2.0, (steps, K)).astype(np.float32)
    values[generator.random((steps, K)) < 0.1] = np.nan
    present = generator.random((steps, K)) > 0.15
    return list(zip(torch.tensor(values), torch.tensor(present), strict=True))


# --- RECAP against a plain-Python Algorithm 2 ---


def away_from_zero(x: float) -> float:
    return math.copysign(max(abs(x), 1e-6), x) if x != 0 else 1e-6


def oracle(
    histories: list[list[float]],
    window: int,
    temperature: float,
    alpha: float | None,
    signals: list[str],
    std: str,
    max_rate: float | None,
    retention: float = 0.0,
) -> tuple[list[float], list[float], list[float], list[float], list[float]]:
    """Weights, rates, instabilities, priorities, retentions from each objective's whole history."""
    count = len(histories)
    rates, instabilities, priorities, retentions = [[math.nan] * count for _ in range(4)]
    least = window if retention > 0 else 2 * window
    ready = [k for k in range(count) if len(histories[k]) >= least]
    weight_of_rate = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    for k in ready:
        if retention > 0:
            retentions[k] = drop_below_best(histories[k], window, signals[k], max_rate)
        if len(histories[k]) < 2 * window:
            priorities[k] = weight_of_rate[0] + retention * retentions[k]
            continue
        recent = histories[k][-2 * window :]
        older, newer = math.fsum(recent[:window]) / window, math.fsum(recent[window:]) / window
        rate = (
            newer / away_from_zero(older)
            if signals[k] == "reward"
            else older / away_from_zero(newer)
        )
        if max_rate is not None:
            rate = max(-max_rate, min(max_rate, rate))
        center = newer if std == "current" else math.fsum(recent) / (2 * window)
        sigma = math.sqrt(math.fsum((x - center) ** 2 for x in recent) / (2 * window - 1))
        rates[k] = rate
        instabilities[k] = sigma / away_from_zero(newer + older)
        priorities[k] = weight_of_rate[0] * rate + weight_of_rate[1] * instabilities[k]
        if retention > 0:
            priorities[k] += retention * retentions[k]
    weights = [1.0] * count
    if ready:
        highest = max(priorities[k] for k in ready)
        exponentials = {k: math.exp((priorities[k] - highest) / temperature) for k in ready}
        for k in ready:
            weights[k] = len(ready) * exponentials[k] / math.fsum(exponentials.values())
    return weights, rates, instabilities, priorities, retentions


def drop_below_best(
    history: list[float], window: int, signal: str, max_rate: float | None
) -> float:
    """r of the last of the values, by the formulas of `RecapReweighter`."""
    values = [x if signal == "reward" else -x for x in history]  # higher is better
    best, average, r = -math.inf, 0.0, math.nan
    for count in range(2, len(values) + 1):
        share = 1 / min(count - 1, 10 * window)
        average = average * (1 - share) + (values[count - 1] - values[count - 2]) ** 2 / 2 * share
        if count < window:
            continue
        recent = values[count - window : count]
        squares = [(b - a) ** 2 for a, b in zip(recent, recent[1:], strict=False)]
        variance = max(average, math.fsum(squares) / (2 * (window - 1)))
        floor = 4 * math.sqrt(variance / window)
        mean = math.fsum(recent) / window
        best = max(best, mean - floor)
        r = max(0.0, best - floor - mean) / max(abs(best), floor, 1e-6)
    return r if max_rate is None else min(r, max_rate)


# Sixty-fourths add up exactly, so that the sign of a mean near zero is not a matter of rounding.
MIXED_SIGN = st.integers(-128, 128).map(lambda n: n / 64)
POSITIVE = st.floats(2.0**-10, 1000.0, width=32)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_recap_is_algorithm_2(data: st.DataObject) -> None:
    check_algorithm_2(data, in_one_launch=False)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.variant
def test_recap_in_one_launch_is_algorithm_2(data: st.DataObject) -> None:
    check_algorithm_2(data, in_one_launch=True)


def check_algorithm_2(data: st.DataObject, in_one_launch: bool) -> None:
    count = data.draw(st.integers(1, 6), "K")
    window = data.draw(st.integers(1, 12), "W")
    options: dict[str, Any] = {
        "window": window,
        "temperature": data.draw(st.floats(0.1, 50), "T"),
        "alpha": data.draw(st.none() | st.floats(0, 1), "alpha"),
        "signals": data.draw(
            st.lists(st.sampled_from(["loss", "reward"]), min_size=count, max_size=count)
        ),
        "std": data.draw(st.sampled_from(["window", "current"])),
        "max_rate": data.draw(st.sampled_from([10.0, 1.5, None])),
        "retention": data.draw(st.sampled_from([0.0, 3.0])) if window >= 4 else 0.0,
    }
    value = data.draw(st.sampled_from([POSITIVE, MIXED_SIGN]))
    cell = st.one_of(value, value, value, value, st.none(), st.just(math.nan))
    row = st.lists(cell, min_size=count, max_size=count)
    steps = data.draw(st.lists(row, min_size=2 * window, max_size=5 * window + 3))
    reweighter = RecapReweighter(count, **options)
    reweighter._in_one_launch = in_one_launch  # else only on CUDA
    histories: list[list[float]] = [[] for _ in range(count)]
    for step in steps:
        for history, x in zip(histories, step, strict=True):
            if x is not None and not math.isnan(x):
                history.append(x)
        weights = reweighter.update(
            torch.tensor([7.0 if x is None else x for x in step]),
            torch.tensor([x is not None for x in step]),
        )
        expected = oracle(histories, **options)
        retentions = reweighter.retentions
        if retentions is None:
            retentions = torch.full((count,), math.nan)
        rates, instabilities = reweighter.rates, reweighter.instabilities
        got = (weights, rates, instabilities, reweighter.priorities, retentions)
        for name, one, other in zip("wcisr", got, expected, strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-6, atol=1e-6, err_msg=name)
        assert weights.mean().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("window", [50, 300])
def test_recap_long_windows(window: int) -> None:
    values = np.random.default_rng(window).uniform(0.5, 3.0, (3 * window, K)).astype(np.float32)
    reweighter = RecapReweighter(K, window=window, temperature=0.01)
    for row in torch.tensor(values):
        reweighter.update(row)
    expected = oracle(values.T.tolist(), window, 0.01, None, ["loss"] * K, "window", max_rate=10.0)
    np.testing.assert_allclose(reweighter.weights.numpy(), expected[0], rtol=1e-6, atol=1e-6)


def test_a_constant_value_has_rate_1_and_no_instability() -> None:
    reweighter = RecapReweighter(K, window=500)
    for _ in range(1001):
        reweighter.update(torch.full((K,), 0.1))
    np.testing.assert_allclose(reweighter.rates.numpy(), 1, atol=1e-7)
    np.testing.assert_allclose(reweighter.instabilities.numpy(), 0, atol=1e-7)


@pytest.mark.parametrize(
    ("before", "now", "max_rate", "rate"),
    [
        (0.5, 0.0, None, 0.5e6),
        (0.5, 2.0**-30, None, 0.5e6),
        (0.5, -(2.0**-30), None, -0.5e6),
        (0.5, 2.0**-19, None, 0.5 * 2**19),  # just above the least denominator
        (0.5, -(2.0**-30), 10.0, -10.0),
        (0.5, 0.0, 10.0, 10.0),
        (0.0, 0.0, 10.0, 0.0),
    ],
)
def test_denominators_near_zero(
    before: float, now: float, max_rate: float | None, rate: float
) -> None:
    reweighter = RecapReweighter(1, window=1, max_rate=max_rate)
    for value in (before, now):
        reweighter.update(torch.tensor([value]))
    assert reweighter.rates.item() == pytest.approx(rate, rel=1e-6)


def test_instability_where_the_means_cancel() -> None:
    reweighter = RecapReweighter(1, window=1)
    for value in (0.5, -0.5):
        reweighter.update(torch.tensor([value]))
    assert reweighter.instabilities.item() == pytest.approx(math.sqrt(0.5) * 1e6, rel=1e-6)


def test_warm_up_is_per_objective() -> None:
    reweighter = RecapReweighter(3, window=2)
    never_third = torch.tensor([True, True, False])
    only_first = torch.tensor([True, False, False])
    for step in range(3):
        assert (
            reweighter.update(torch.tensor([4.0 - step, 1.0, 1.0]), never_third).tolist() == [1] * 3
        )
    # Four values against three: the first is ready alone, and 1 is its share of 1.
    assert reweighter.update(torch.tensor([1.0, 9.0, 9.0]), only_first).tolist() == [1, 1, 1]
    assert reweighter.rates.isnan().tolist() == [False, True, True]
    weights = reweighter.update(torch.tensor([1.0, 1.0, 9.0]), never_third)
    assert weights[2].item() == 1
    assert weights[0].item() > weights[1].item()
    assert weights[:2].sum().item() == pytest.approx(2)
    assert reweighter.rates.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("how", ["absent", "nan", "inf"])
def test_absent_objectives_push_nothing(how: str) -> None:
    with_gaps, without = RecapReweighter(1, window=2), RecapReweighter(1, window=2)
    bad = {"absent": 5.0, "nan": math.nan, "inf": math.inf}[how]
    for x in [3.0, 2.0, 2.5, 1.0, 0.5]:
        with_gaps.update(torch.tensor([bad]), torch.tensor([how != "absent"]))
        with_gaps.update(torch.tensor([x]))
        without.update(torch.tensor([x]))
    for name, entry in without.state_dict().items():
        torch.testing.assert_close(with_gaps.state_dict()[name], entry, rtol=0, atol=0)


def test_a_reward_that_leaves_zero_does_not_take_all_the_weight() -> None:
    reweighter = RecapReweighter(2, window=5, signals="reward")
    unclamped = RecapReweighter(2, window=5, signals="reward", max_rate=None)
    shares, unclamped_shares, rates = [], [], []
    for step in range(40):
        values = torch.tensor([max(0.0, 0.05 * (step - 15)), 0.5])
        shares.append(reweighter.update(values)[0].item() / 2)
        unclamped_shares.append(unclamped.update(values)[0].item() / 2)
        rates.append(reweighter.rates[0].item())
    assert np.nanmax(rates) == 10
    assert max(shares) < 0.92
    assert max(unclamped_shares) == 1  # what the clamp is there for
    assert all(abs(share - 0.5) < 0.1 for share in shares[-8:])


def test_the_papers_preset_is_algorithm_2_without_our_clamp() -> None:
    preset, given = [make_reweighter("recap", 2, preset="paper", **k) for k in ({}, {"window": 3})]
    assert isinstance(preset, RecapReweighter)
    assert (preset.window, preset.temperature, preset.alpha) == (10, 5.0, None)
    assert (preset.std, preset.max_rate) == ("window", None)
    assert isinstance(given, RecapReweighter)
    assert (given.window, given.max_rate) == (3, None)
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        make_reweighter("recap", 2, preset="papr")
    with pytest.raises(ValueError, match="'dwa' has no presets"):
        make_reweighter("dwa", 2, preset="paper")


# --- Retention ---


def follow(
    rows: np.ndarray, signals: Any, **options: Any
) -> tuple[np.ndarray, np.ndarray, RecapReweighter]:
    """Weights and retentions [steps, K] of values [steps, K]."""
    reweighter = RecapReweighter(rows.shape[1], signals=signals, **options)
    found = []
    for row in torch.tensor(rows):
        weights = reweighter.update(row)
        assert reweighter.retentions is not None
        found.append(torch.stack([weights, reweighter.retentions]).numpy())
    weights, retentions = np.array(found).transpose(1, 0, 2)
    return weights, retentions, reweighter


STEPS = 1500
NOISE: dict[str, Any] = {
    "normal": lambda g, k: 1 + 0.1 * g.standard_normal((STEPS, k)),
    "wide normal": lambda g, k: 1 + 0.3 * g.standard_normal((STEPS, k)),
    "uniform": lambda g, k: g.uniform(0.5, 1.5, (STEPS, k)),
    "Student": lambda g, k: 2 + 0.2 * g.standard_t(3, (STEPS, k)),
    "exponential": lambda g, k: g.exponential(1, (STEPS, k)),
    "lognormal": lambda g, k: np.exp(0.8 * g.standard_normal((STEPS, k))),
    "half of 8 rewards": lambda g, k: g.binomial(8, 0.5, (STEPS, k)) / 8,
    "all but a few of 32": lambda g, k: g.binomial(32, 0.995, (STEPS, k)) / 32,
    "one reward": lambda g, k: g.binomial(1, 0.5, (STEPS, k)),
    "negative": lambda g, k: -15 + g.standard_normal((STEPS, k)),
}


slow, variant = pytest.mark.slow, pytest.mark.variant
QUICK_NOISE = ("exponential", "one reward", "negative")


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in QUICK_NOISE else [slow, variant]) for kind in NOISE],
)
def test_noise_alone_moves_no_weight(kind: str) -> None:
    rows = NOISE[kind](np.random.default_rng(14), 5).astype(np.float64)
    signals = ["loss", "loss", "loss", "reward", "reward"]
    weights, retentions, _ = follow(rows, signals, retention=10.0)
    without = RecapReweighter(5, signals=signals)
    plain = np.array([without.update(row).numpy() for row in torch.tensor(rows)])
    assert (retentions[9:] > 0).mean() < 1e-3
    # A tenth of a percent of a weight, in the mean over the steps and at their 99.5th percentile.
    moved = np.abs(weights - plain)[19:].max(axis=1)
    assert moved.mean() < 1e-3
    assert np.quantile(moved, 0.995) < 1e-3
    if kind == "normal":
        assert np.abs(weights - 1).max() < 0.05  # c and i move them by so much


@pytest.mark.thinned(3)
@pytest.mark.parametrize("signal", ["loss", "reward"])
@pytest.mark.parametrize("steps_of_change", [1, 10, 200])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_what_is_lost_gains_weight(signal: Any, steps_of_change: int, alpha: float | None) -> None:
    noise = 1 + 0.02 * np.random.default_rng(3).standard_normal((600, 5))
    change = np.clip((np.arange(600) - 200) / steps_of_change, 0, 1) * 0.2
    noise[:, 0] += change if signal == "loss" else -change
    weights, retentions, reweighter = follow(noise, signal, retention=20.0, alpha=alpha)
    assert np.nanmax(retentions[:200]) == 0
    assert np.abs(weights[:200] - 1).max() < 0.02
    # 20 % less the noise of two means, and not for a while only.
    lasting = slice(200 + steps_of_change + 20, None)
    assert retentions[lasting, 0].min() > 0.1
    assert retentions[lasting, 0].max() < 0.2
    assert retentions[lasting, 1:].max() == 0
    assert weights[lasting, 0].min() > 1.3
    assert weights[lasting, 1:].max() < 1
    plain = RecapReweighter(5, signals=signal, alpha=alpha)
    for row in torch.tensor(noise[:220]):
        without = plain.update(row)
    assert without[0] < 1 or steps_of_change == 1  # what retention is there for


@pytest.mark.parametrize("prompts", [1, 16])
def test_what_is_seen_of_a_loss_depends_on_how_many_prompts_a_step_has(prompts: int) -> None:
    """An IoU that falls from 0.63 to 0.31 within 40 steps, as where little is replayed. Prompts
    differ by 0.2, and so do the 8 rollouts of one."""
    generator = np.random.default_rng(0)
    mean = 0.63 - 0.32 * np.clip((np.arange(120) - 30) / 40, 0, 1)[:, None]
    spread = 0.2 * np.sqrt((1 + 1 / 8) / prompts)
    values = np.clip(mean + spread * generator.standard_normal((120, 40)), 0, 1)
    _, retentions, _ = follow(values, "reward", retention=20.0)
    seen = (retentions[60:] > 0).any(0).mean()
    assert seen == 1 if prompts == 16 else 0.3 < seen < 0.8


def test_what_comes_back_loses_the_weight_again() -> None:
    values = np.full((120, 2), 0.8)
    values[40:80, 0] = 0.4
    weights, retentions, _ = follow(values, "reward", retention=10.0)
    assert retentions[60, 0] == pytest.approx(0.5, abs=0.3)
    assert weights[60:79, 0].min() > 1.1
    assert retentions[90:, 0].max() == 0
    np.testing.assert_allclose(weights[110:], 1, atol=1e-6)


def test_saturated_rewards_have_no_noise_and_any_drop_of_them_counts() -> None:
    values = np.ones((400, 3))
    values[:, 1] = 0
    values[200:, 2] = 0.96
    weights, retentions, reweighter = follow(values, "reward", retention=10.0)
    assert np.nanmax(retentions[:200]) == 0
    assert retentions[200:, :2].max() == 0
    # The step itself is a difference that has to leave the long-run noise first.
    assert retentions[-1, 2] == pytest.approx(0.04, abs=0.01)
    state = reweighter.state_dict()
    assert state["best"].tolist() == [1, 0, 1]
    assert state["noise"][:2].tolist() == [0, 0]


def test_a_loss_of_zero_that_comes_back_stays_within_bounds() -> None:
    values = np.zeros((60, 2))
    values[:, 1] = 1
    values[30:, 0] = np.random.default_rng(0).uniform(0, 1, 30)
    weights, retentions, _ = follow(values, "loss", retention=1.0)
    assert 0 < retentions[30:, 0].max() < 2  # relative to the noise, where the best is 0
    exact = values.copy()
    exact[30:, 0] = 1
    _, retentions, _ = follow(exact, "loss", retention=1.0)
    assert retentions[30:, 0].max() <= 10  # max_rate


def test_negative_means_are_lost_in_the_right_direction() -> None:
    generator = np.random.default_rng(5)
    values = -15 + 0.2 * generator.standard_normal((300, 4))
    values[100:, 0] += 3  # a worse loss
    values[100:, 1] -= 3  # a better one
    values[100:, 2] -= 3  # a worse reward
    weights, retentions, reweighter = follow(
        values, ["loss", "loss", "reward", "reward"], retention=20.0
    )
    assert retentions[120:, [0, 2]].min() > 0.1
    assert retentions[120:, [1, 3]].max() == 0
    assert weights[150:, [0, 2]].min() > 1.2
    best = reweighter.state_dict()["best"]
    assert best.dtype == torch.float64
    np.testing.assert_allclose(best, [-15, -18, -15, -15], atol=0.3)


def test_retention_is_ready_after_one_window() -> None:
    reweighter = RecapReweighter(2, window=4, retention=8.0, temperature=2.0)
    assert reweighter.retentions is not None
    for step in range(3):
        assert reweighter.update(torch.tensor([1.0, 1.0])).tolist() == [1, 1], step
        assert reweighter.retentions.isnan().all()
    for _ in range(2):
        reweighter.update(torch.tensor([1.0, 1.0]))
    for value in (1.5, 1.5):
        weights = reweighter.update(torch.tensor([value, 1.0]))
    assert reweighter.rates.isnan().all()
    assert reweighter.instabilities.isnan().all()
    # Of the values 1, 1, 1.5, 1.5: one difference of 0.5 among three, and the mean 1.25.
    floor = 4 * math.sqrt(0.25 / 6 / 4)
    r = max(0.0, 1.25 - floor - 1)
    np.testing.assert_allclose(reweighter.retentions, [r, 0], atol=1e-7)
    np.testing.assert_allclose(reweighter.priorities, [1 + 8 * r, 1], rtol=1e-6)
    for value in (1.5, 1.5):
        weights = reweighter.update(torch.tensor([value, 1.0]))
    r = reweighter.retentions[0].item()
    assert r == pytest.approx(0.5 - 4 * math.sqrt(0.25 / 2 / 8 / 4), abs=1e-6)
    assert not reweighter.rates.isnan().any()
    c, i = reweighter.rates[0].item(), reweighter.instabilities[0].item()
    assert reweighter.priorities[0].item() == pytest.approx(c + i + 8 * r, rel=1e-5)
    assert weights[0] > 1 > weights[1]


def test_without_retention_nothing_of_it_is_there() -> None:
    reweighter = make_reweighter("recap", K, preset="paper", window=3)
    assert reweighter.retentions is None
    assert set(reweighter.state_dict()) == {  # as every checkpoint from before has them
        "weights", "rates", "instabilities", "priorities", "values", "counts",
    }  # fmt: skip
    zero = RecapReweighter(K, window=3, max_rate=None, retention=0.0)
    for values, present in stream(30):
        one, other = reweighter.update(values, present), zero.update(values, present)
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    state = reweighter.state_dict()
    zero.load_state_dict(state)
    with pytest.raises(ValueError, match="has the entries .*'best'"):
        RecapReweighter(K, window=4, retention=1.0).load_state_dict(state)


# --- Curves shaped like the paper's Figure 4 ---


def figure_4(signals: list[str], deficit: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rates, instabilities and weights [500, 3] of format, accuracy and ntp.

    Format is learnt from 0.17 within some ten steps, then fails once in 300 rollouts (64 a step).
    Accuracy climbs from 0.4 to 0.65, measured on two prompts whose rollouts agree.
    """
    generator, steps = np.random.default_rng(4), np.arange(500)
    format_rate = 0.17 + (0.997 - 0.17) / (1 + np.exp(-(steps - 40) / 2))
    format_reward = generator.binomial(64, format_rate) / 64
    accuracy = generator.binomial(2, 0.4 + 0.25 * steps / 500) / 2
    ntp = 1.2 + 0.4 * np.exp(-steps / 150) + 0.03 * generator.standard_normal(500)
    reweighter = RecapReweighter(3, signals=signals)
    rows = []
    for one_format, one_accuracy, one_ntp in zip(format_reward, accuracy, ntp, strict=True):
        rewards = np.array([one_format, one_accuracy])
        values = [*(1 - rewards if deficit else rewards), one_ntp]
        weights = reweighter.update(torch.tensor(values))
        rows.append(torch.stack([reweighter.rates, reweighter.instabilities, weights]).numpy())
    rates, instabilities, weights_by_step = np.array(rows).transpose(1, 0, 2)
    return rates, instabilities, weights_by_step


def test_reward_signal_shows_what_figure_4_describes() -> None:
    rates, instabilities, weights = figure_4(["reward", "reward", "loss"], deficit=False)
    assert 3.0 < np.nanmax(rates[:, 0]) < 4.5
    saturated = slice(150, None)
    np.testing.assert_allclose(rates[saturated, 0], 1, atol=0.02)
    assert instabilities[saturated, 0].max() < 0.01
    assert 0.2 < np.median(instabilities[saturated, 1]) < 0.4
    assert np.nanargmax(weights[:, 0]) < 100
    assert weights[saturated, 1].mean() > 1.02 > 1 > weights[saturated, 0].mean()
    assert (weights[saturated, 1] > weights[saturated, 0]).mean() > 0.8


def test_deficit_as_loss_does_not() -> None:
    rates, instabilities, weights = figure_4(["loss"] * 3, deficit=True)
    saturated = slice(150, None)
    assert np.median(instabilities[saturated, 0]) > 0.5  # saturated, yet the noisiest of the three
    assert np.median(instabilities[saturated, 0]) > np.median(instabilities[saturated, 1])
    assert np.abs(rates[saturated, 0] - 1).max() > 2
    assert weights[saturated, 0].mean() > weights[saturated, 1].mean()


# --- All methods ---


@pytest.mark.parametrize("name", NAMES)
def test_weights_average_1_and_absence_is_harmless(name: str) -> None:
    reweighter = build(name)
    for values, present in stream(40):
        weights = reweighter.update(values, present)
        assert weights.dtype == torch.float32
        assert weights.mean().item() == pytest.approx(1, abs=1e-6)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights, reweighter.weights, rtol=0, atol=0)
    assert reweighter.weights.tolist() != [1, 1, 1] or name == "uniform"


@pytest.mark.parametrize("name", NAMES)
def test_non_positive_values_stay_finite(name: str) -> None:
    reweighter = build(name)
    for step in range(20):
        weights = reweighter.update(torch.tensor([0.0, -1.0 - step, (-1.0) ** step]))
        assert weights.isfinite().all()
        assert weights.mean().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_values_of_an_absent_objective_do_not_matter(name: str) -> None:
    one, other = build(name), build(name)
    for values, present in stream(30):
        one.update(values, present)
        other.update(torch.where(present, values, torch.full_like(values, math.nan)))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip_continues_identically(name: str) -> None:
    steps = stream(40)
    original, resumed = build(name), build(name)
    for values, present in steps[:17]:
        original.update(values, present)
    state = original.state_dict()
    assert all(isinstance(entry, torch.Tensor) for entry in state.values())
    resumed.load_state_dict(state)
    torch.testing.assert_close(resumed.weights, original.weights, rtol=0, atol=0)
    for values, present in steps[17:]:
        expected = original.update(values, present)
        torch.testing.assert_close(resumed.update(values, present), expected, rtol=0, atol=0)
    fresh = build(name).state_dict()
    torch.testing.assert_close(build(name).state_dict(), fresh, equal_nan=True)
    moved = original.state_dict()["weights"].tolist() != state["weights"].tolist()
    assert moved or name in ("uniform", "static")  # `state` is a snapshot, not a view


@pytest.mark.parametrize("name", NAMES)
def test_update_never_syncs_and_writes_in_place(name: str) -> None:
    reweighter = build(name)
    addresses = [buffer.data_ptr() for buffer in reweighter._state.values()]
    deviations = torch.full((K,), 0.3)
    with ForbidHostSync():
        for values, present in stream(12):
            reweighter.update(values, present)
            reweighter.update(values)
            reweighter.update(values, present, deviations)
    assert addresses == [buffer.data_ptr() for buffer in reweighter._state.values()]


@pytest.mark.parametrize("name", NAMES)
def test_returned_weights_survive_later_updates(name: str) -> None:
    reweighter = build(name)
    returned = [reweighter.update(values) for values, _ in stream(12)]
    kept = [weights.clone() for weights in returned]
    for values, _ in stream(12, seed=1):
        reweighter.update(values)
    torch.testing.assert_close(returned, kept, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_update_in_a_cuda_graph_matches_the_cpu(name: str) -> None:
    on_cpu, on_gpu, warm = build(name), build(name, device="cuda"), build(name, device="cuda")
    values_buffer = torch.ones(K, device="cuda")
    present_buffer = torch.ones(K, dtype=torch.bool, device="cuda")
    stream_of_warm_up = torch.cuda.Stream()
    with torch.cuda.stream(stream_of_warm_up):
        warm.update(values_buffer, present_buffer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captures without running
        weights = on_gpu.update(values_buffer, present_buffer)
    for values, present in stream(30):
        values_buffer.copy_(values)
        present_buffer.copy_(present)
        graph.replay()
        expected = on_cpu.update(values, present)
        torch.testing.assert_close(weights.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's sync debug mode needs CUDA")
def test_update_never_syncs_on_cuda(name: str) -> None:
    reweighter = build(name, device="cuda")
    steps = [(values.cuda(), present.cuda()) for values, present in stream(12)]
    with ForbidHostSync("cuda"):
        for values, present in steps:
            reweighter.update(values, present)


# --- Each baseline against its formula ---


def test_uniform_and_static() -> None:
    for values, present in stream(5):
        assert build("uniform").update(values, present).tolist() == [1, 1, 1]
        weights = build("static", weights=torch.tensor([1.0, 0.0, 3.0])).update(values, present)
        np.testing.assert_allclose(weights.numpy(), [0.75, 0, 2.25], rtol=1e-6)
    assert build("static").weights.tolist() == [0.5, 1.0, 1.5]  # before the first update


def test_dwa_formula_and_reward_direction() -> None:
    reweighter = build("dwa", window=2, temperature=2.0)
    for row in ([1.0, 4.0, 1.0], [1.0, 4.0, 1.0], [2.0, 2.0, 1.0], [2.0, 1.0, 1.0]):
        weights = reweighter.update(torch.tensor(row))
    ratios = np.array([1 / 2, 1.5 / 4, 1.0])  # a reward that doubled, a loss that fell, a constant
    expected = 3 * np.exp(ratios / 2) / np.exp(ratios / 2).sum()
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(reweighter.rates.numpy(), 1 / ratios, rtol=1e-6)


def test_rlw_draws_independent_standard_normals() -> None:
    reweighter = build("rlw", seed=7)
    draws = []
    for _ in range(4000):
        weights = reweighter.update(torch.ones(K))
        draws.append(reweighter.priorities.clone())
    normals = torch.stack(draws).double()  # [steps, K]
    torch.testing.assert_close(weights, 3 * torch.softmax(reweighter.priorities, 0))
    assert normals.mean(0).abs().max() < 0.06  # 4 standard errors
    assert (normals.std(0) - 1).abs().max() < 0.05
    uniform = torch.special.ndtr(normals).flatten().sort().values
    steps = torch.arange(1, uniform.numel() + 1) / uniform.numel()
    assert (uniform - steps).abs().max() < 0.018  # Kolmogorov-Smirnov at 0.1%
    columns = torch.cat([normals[1:], normals[:-1]], dim=1).T  # objectives, and the step before
    off_diagonal = torch.corrcoef(columns) - torch.eye(2 * K)
    assert off_diagonal.abs().max() < 0.065
    assert build("rlw", seed=8).update(torch.ones(K)).tolist() != draws[0].tolist()


def test_scale_invariant_weighs_by_the_inverse() -> None:
    reweighter = build("scale_invariant")
    weights = reweighter.update(torch.tensor([0.5, 4.0, 20.0]))
    inverse = np.array([2, 0.25, 0.05])
    np.testing.assert_allclose(weights.numpy(), 3 * inverse / inverse.sum(), rtol=1e-6)
    clamped = reweighter.update(torch.tensor([-1.0, 4.0, 20.0]))
    inverse[0] = 100
    np.testing.assert_allclose(clamped.numpy(), 3 * inverse / inverse.sum(), rtol=1e-6)


def test_uw_learns_log_variances_as_adam_would() -> None:
    reweighter = build("uw", learning_rate=0.05)
    log_variances = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([log_variances], lr=0.05)
    for values, _ in stream(60):
        values = values.nan_to_num(0.7).double()
        weights = reweighter.update(values)
        adam.zero_grad()
        (0.5 * (torch.exp(-log_variances) * values + log_variances)).sum().backward()
        adam.step()
        expected = torch.exp(-log_variances.detach())
        torch.testing.assert_close(weights.double(), expected / expected.mean(), rtol=1e-6, atol=0)


def test_uw_tends_to_the_inverse_value() -> None:
    reweighter = build("uw", learning_rate=0.05)
    for _ in range(600):
        weights = reweighter.update(torch.tensor([0.5, 2.0, 1.0]))
    np.testing.assert_allclose(weights.numpy(), np.array([2, 0.5, 1]) / (3.5 / 3), rtol=1e-2)


def test_famo_moves_logits_as_autograd_and_adam_would() -> None:
    reweighter = build("famo", learning_rate=0.05, gamma=0.01)
    logits = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.05, weight_decay=0.01)
    sign = torch.tensor([-1.0, 1.0, -1.0])  # progress is falling for a loss, rising for a reward
    before = None
    for values, _ in stream(60):
        values = values.nan_to_num(0.7).double()
        weights = reweighter.update(values)
        if before is not None:
            progress = sign * (before.log() - values.log())
            adam.zero_grad()
            (torch.softmax(logits, 0) * progress).sum().backward()
            adam.step()
        before = values
        expected = torch.softmax(logits.detach(), 0) / values
        torch.testing.assert_close(weights.double(), expected / expected.mean(), rtol=1e-6, atol=0)


def test_famo_raises_what_makes_no_progress() -> None:
    reweighter = make_reweighter("famo", 2, signals=["reward", "loss"])
    for step in range(60):
        reweighter.update(torch.tensor([0.2 + 0.01 * step, 1.0]))
    assert reweighter.priorities[1] > reweighter.priorities[0] + 0.5


def test_saw_weighs_by_the_coefficient_of_variation() -> None:
    reweighter = build("saw", window=3)
    values, deviations = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0.5, 0.5, 0.0])
    weights = reweighter.update(values, None, deviations)
    np.testing.assert_allclose(weights.numpy(), [2.4, 0.6, 0], atol=1e-6)
    absent = torch.tensor([True, False, True])
    kept = reweighter.update(values, absent, torch.tensor([0.5, 9.0, 0.0]))
    np.testing.assert_allclose(kept.numpy(), weights.numpy(), atol=1e-6)


def test_saw_without_deviations_uses_its_window() -> None:
    reweighter = build("saw", window=3)
    rows = np.array([[0.5, 1.0, 1.0], [1.0, 2.0, 1.0], [1.5, 6.0, 1.0]], dtype=np.float32)
    for row in torch.tensor(rows):
        weights = reweighter.update(row)
    coefficients = rows.std(axis=0, ddof=1) / rows.mean(axis=0)
    np.testing.assert_allclose(reweighter.instabilities.numpy(), coefficients, rtol=1e-6)
    np.testing.assert_allclose(
        weights.numpy(), 3 * coefficients / coefficients.sum(), rtol=1e-5, atol=1e-6
    )


# --- Bad input ---


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("recpa", {}, "did you mean 'recap'"),
        ("gradnorm", {}, "valid: recap, uniform"),
        ("recap", {"temprature": 2.0}, "did you mean 'temperature'"),
        ("uniform", {"window": 5}, "'uniform' has no parameter 'window'"),
        ("static", {}, "needs the parameter 'weights'"),
        ("static", {"weights": [1.0, 2.0]}, "3 finite numbers"),
        ("static", {"weights": [1.0, -2.0, 3.0]}, "3 finite numbers"),
        ("static", {"weights": [0.0, 0.0, 0.0]}, "one of them above 0"),
        ("recap", {"window": 0}, "window must be an integer >= 1, got 0"),
        ("recap", {"window": 2.5}, "window must be an integer >= 1, got 2.5"),
        ("recap", {"temperature": 0}, "temperature must be a finite number > 0, got 0"),
        ("recap", {"alpha": 1.5}, "alpha must be None or a number in"),
        ("recap", {"std": "old"}, "std must be one of"),
        ("recap", {"max_rate": -1.0}, "max_rate must be None or"),
        ("recap", {"retention": -1.0}, "retention must be a finite number >= 0, got -1.0"),
        ("recap", {"retention": math.inf}, "retention must be a finite number >= 0, got inf"),
        ("recap", {"retention": 1.0, "window": 3}, "window must be >= 4 with retention > 0, got 3"),
        ("recap", {"signals": ["loss"]}, "or 3 of them"),
        ("recap", {"signals": "rewards"}, "signals must be one of"),
        ("rlw", {"seed": -1}, "seed must be an integer"),
        ("saw", {"window": 1}, "window must be an integer >= 2"),
        ("famo", {"gamma": -1.0}, "gamma must be a finite number >= 0"),
        ("uw", {"floor": 0.0}, "floor must be a finite number > 0"),
    ],
)
def test_bad_arguments(name: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_reweighter(name, K, **keywords)


def test_bad_number_of_objectives() -> None:
    with pytest.raises(ValueError, match="num_objectives must be an integer >= 1, got 0"):
        RecapReweighter(0)


def test_bad_tensors() -> None:
    reweighter = RecapReweighter(K)
    with pytest.raises(ValueError, match=r"values must be \[3\] floating on cpu, got \[2\]"):
        reweighter.update(torch.ones(2))
    with pytest.raises(ValueError, match=r"got \[3\] torch.int64"):
        reweighter.update(torch.ones(K, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"present must be \[3\] bool on cpu"):
        reweighter.update(torch.ones(K), torch.ones(K))
    with pytest.raises(ValueError, match="on meta"):
        reweighter.update(torch.ones(K, device="meta"))


def test_bad_state() -> None:
    with pytest.raises(ValueError, match="state of RecapReweighter has the entries"):
        RecapReweighter(K).load_state_dict(build("famo").state_dict())
    with pytest.raises(ValueError, match=r"'values' must be \[3, 8\] torch.float64, got \[3, 6\]"):
        RecapReweighter(K, window=4).load_state_dict(RecapReweighter(K, window=3).state_dict())
