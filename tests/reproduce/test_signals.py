"""The synthetic curves, and that what the docs say of readings, knobs and scales holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from recap_fast.cli import app
from recap_fast.reproduce import signals
from recap_fast.reproduce.batch import stack
from recap_fast.reproduce.ema import EmaRecapReweighter
from recap_fast.reweighting.recap import RecapReweighter, make_reweighter


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return signals.hybrid_curves(seeds=3)


def test_a_trace_is_a_reweighter_run_by_run(values) -> None:
    found = signals.trace(values[:, :60], temperature=2.0)
    for seed, rows in enumerate(torch.tensor(values[:, :60])):
        reweighter = RecapReweighter(5, temperature=2.0, signals=signals.SIGNALS)
        for step, row in enumerate(rows):
            weights = reweighter.update(row)
            np.testing.assert_allclose(found.weights[seed, step], weights, rtol=1e-6)
        np.testing.assert_allclose(found.rates[seed, -1], reweighter.rates, rtol=1e-6)


def test_a_reading_with_factors_is_alpha(values) -> None:
    half = next(one for one in signals.READINGS if "alpha" in one.name)
    expected = signals.trace(values, alpha=0.5)
    np.testing.assert_allclose(half.trace(values).weights, expected.weights, rtol=1e-5)


def test_a_stack_forgets_nothing_that_its_runs_would_not(values) -> None:
    def make() -> list[RecapReweighter]:
        return [RecapReweighter(5, signals=signals.SIGNALS, retention=r) for r in (1.0, 5.0, 20.0)]

    stacked, alone = stack(make()), make()
    for step in range(80):
        now = torch.tensor(values[:3, step])
        if step > 50:
            now = now * torch.tensor([0.5, 1.0, 1.0, 0.3, 1.5])
        together = stacked.update(now)
        for run, reweighter in enumerate(alone):
            np.testing.assert_allclose(together[run], reweighter.update(now[run]), rtol=1e-6)
    assert stacked.retentions is not None
    assert (stacked.retentions > 0).any()
    for run, reweighter in enumerate(alone):
        np.testing.assert_allclose(stacked.retentions[run], reweighter.retentions, rtol=1e-5)


def test_stack_refuses_what_it_cannot_batch() -> None:
    with pytest.raises(ValueError, match="retention must be 0 in all or in none"):
        stack([RecapReweighter(2), RecapReweighter(2, retention=1.0)])
    with pytest.raises(ValueError, match="one method"):
        stack([make_reweighter("dwa", 2), make_reweighter("saw", 2)])
    with pytest.raises(ValueError, match="window must be the same"):
        stack([RecapReweighter(2, window=3), RecapReweighter(2, window=4)])
    with pytest.raises(ValueError, match="alpha must be the same"):
        stack([RecapReweighter(2), RecapReweighter(2, alpha=0.5)])
    with pytest.raises(ValueError, match="must be the same"):
        stack([make_reweighter("static", 2, weights=w) for w in ([1.0, 1.0], [1.0, 2.0])])


def averages_by_hand(history: list[float], window: int) -> tuple[float, float]:
    """c and i of a loss from weighted sums over the whole history."""

    def weights(age: float) -> np.ndarray:
        decay = age / (1 + age)
        each = (1 - decay) * decay ** np.arange(len(history))[::-1]
        each[0] = decay ** (len(history) - 1)  # the first value starts the average
        return each

    running, fast = history[0], []
    for value in history:
        running += (value - running) / (1 + (window - 1) / 2)
        fast.append(running)
    slow = float(weights(window) @ fast)
    age = (2 * window - 1) / 2
    decay, by_age = age / (1 + age), weights(age)
    mean = by_age @ history
    variance = by_age @ (np.array(history) - mean) ** 2 * (1 + decay) / (2 * decay)
    return slow / fast[-1], variance**0.5 / (fast[-1] + slow)


def test_averages_are_weighted_sums_over_the_history() -> None:
    history = np.random.default_rng(0).uniform(0.5, 2.0, 30).tolist()
    reweighter = EmaRecapReweighter(1, window=4)
    for value in history:
        reweighter.update(torch.tensor([value], dtype=torch.float64))
    c, i = averages_by_hand(history, 4)
    assert reweighter.rates.item() == pytest.approx(c, rel=1e-6)
    assert reweighter.instabilities.item() == pytest.approx(i, rel=1e-6)


def test_averages_ignore_absent_objectives_and_warm_up() -> None:
    gaps, plain = EmaRecapReweighter(2, window=2), EmaRecapReweighter(2, window=2)
    for step in range(6):
        row = torch.tensor([2.0 - 0.2 * step, 1.0])
        assert gaps.weights.tolist() == [1, 1] or step >= 4
        gaps.update(torch.tensor([9.0, 9.0]), torch.tensor([False, False]))
        gaps.update(row)
        plain.update(row)
    torch.testing.assert_close(gaps.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert gaps.weights[0] > gaps.weights[1]


def test_the_reward_signal_gives_both_figures(values) -> None:
    fits = {one.name: signals.describe_reading(one.trace(values)) for one in signals.READINGS}
    ours = signals.READINGS[0].name
    both = {name for name, fit in fits.items() if fit["figure_4"] and fit["figure_11"]}
    assert both == {ours, "the same, c alone"}
    # These have our c and i, and weigh them otherwise.
    only_4 = {name for name, fit in fits.items() if fit["figure_4"]} - both
    assert only_4 == {"the same, alpha = 0.5", "the same, T = 1", "the same, i alone"}
    # Their own i, not ours.
    assert fits["the same, i times W"]["accuracy_instability"] == pytest.approx(
        10 * fits[ours]["accuracy_instability"]
    )


def test_weights_do_not_depend_on_units_but_on_the_zero(values) -> None:
    found = {name: signals.describe_scale(t, values) for name, t in signals.SCALES.items()}
    assert found["rewards times 100"]["change"] < 1e-5
    assert found["accuracy times 100"]["change"] < 1e-5
    assert found["accuracy from -1 to 1"]["change"] > 1


def test_what_is_forgotten_gets_less_weight_not_more() -> None:
    cases = {case.name: signals.describe_case(case, seeds=3) for case in signals.CASES}
    assert cases["reward rises 0.4 to 0.8 in 100 steps"]["mean"] > 1
    assert cases["reward falls 0.8 to 0.4 in 100 steps"]["mean"] < 1
    assert cases["loss rises 0.5 to 1 in 100 steps"]["mean"] < 1


@pytest.mark.slow
@pytest.mark.variant
def test_the_command_writes_what_it_says(tmp_path) -> None:
    result = CliRunner().invoke(app, ["reproduce", "signals", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    tables = (tmp_path / "signals.md").read_text()
    names = [one.name for one in (*signals.READINGS, *signals.KNOBS, *signals.CASES)]
    assert all(f"| {name} |" in tables for name in [*names, *signals.SCALES])
    assert json.loads((tmp_path / "results.json").read_text())["readings"]
    for name in ("signals-curves.png", "signals-readings.png"):
        with Image.open(tmp_path / name) as picture:
            assert (np.asarray(picture.convert("L")) < 250).mean() > 0.02  # not an empty page
