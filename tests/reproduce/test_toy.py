"""The toy problem against Adam and reweighters run one trajectory at a time."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from recap_fast.cli import app
from recap_fast.reproduce import toy, toy_report
from recap_fast.reproduce.toy import FAMILIES, PRINTINGS, STARTS, Setting

ALL = [setting for family in FAMILIES.values() for setting in family]


def by_hand(x1: float, x2: float, second: float) -> tuple[float, float]:
    """The two losses in plain Python; `second` is x1 or x2 in the bowls' second term."""
    f1, f2 = max(math.tanh(0.5 * x2), 0), max(math.tanh(-0.5 * x2), 0)
    g1 = math.log(max(abs(0.5 * (-x1 - 7) - math.tanh(-x2)), 0.000005)) + 6
    g2 = math.log(max(abs(0.5 * (-x1 + 3) - math.tanh(-x2) + 2), 0.000005)) + 6
    h1 = ((-x1 + 7) ** 2 + 0.1 * (-second - 8) ** 2) / 10 - 20
    h2 = ((-x1 - 7) ** 2 + 0.1 * (-second - 8) ** 2) / 10 - 20
    return f1 * g1 + f2 * h1, f1 * g2 + f2 * h2


def alone(setting: Setting, printing: str, start: tuple[float, float], seed: int, steps: int):
    """Positions [steps, 2] of one trajectory and the mean change of a weight in a step."""
    reweighter = setting.build(seed)
    noise = torch.randn(
        steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).tolist()
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=1e-2)
    path, all_weights = [], [torch.ones(2)]
    for step in range(steps):
        losses = toy.toy_losses(x, torch.tensor(printing == "paper"))
        values = losses.detach() + torch.tensor([3 * noise[step], 0.0], dtype=torch.float64)
        all_weights.append(reweighter.update(values))
        optimizer.zero_grad()
        ((all_weights[-1] * losses).sum() / 2).backward()
        optimizer.step()
        path.append(x.detach().clone())
    return torch.stack(path), torch.stack(all_weights).diff(dim=0).abs().mean()


def test_losses_are_the_formulas() -> None:
    generator = np.random.default_rng(0)
    for x1, x2 in [*STARTS, *generator.uniform(-10, 10, (20, 2))]:
        for printing, second in zip(PRINTINGS, (x2, x1), strict=True):
            x = torch.tensor([x1, x2], dtype=torch.float64)
            got = toy.toy_losses(x, torch.tensor(printing == "paper"))
            np.testing.assert_allclose(got, by_hand(x1, x2, second), rtol=1e-12)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("setting", ALL, ids=lambda setting: setting.name)
def test_all_runs_at_once_are_each_run_alone(setting: Setting) -> None:
    steps, seeds = 45, 2
    # A neighbour of the same shape makes it share a program with another setting.
    near = Setting("neighbour", setting.method, dict(setting.parameters))
    runs = toy.simulate([setting, near, *FAMILIES["temperature"][:2]], steps, seeds)
    at = runs.settings.index(setting)
    for p, printing in enumerate(PRINTINGS):
        start, seed = (p + 1) % len(STARTS), p % seeds
        path, jitter = alone(setting, printing, STARTS[start], seed, steps)
        torch.testing.assert_close(
            runs.positions[1:, at, p, start, seed], path.float(), rtol=1e-5, atol=1e-5
        )
        assert runs.jitter[at, p, start, seed] == pytest.approx(jitter.item(), rel=1e-4)


def test_the_front_is_where_no_point_is_better() -> None:
    fronts = {printing: toy.pareto_front(printing, spacing=0.1) for printing in PRINTINGS}
    for front in fronts.values():
        assert (front[1:, 0] > front[:-1, 0]).all()
        assert (front[1:, 1] < front[:-1, 1]).all()
        assert front.diff(dim=0).norm(dim=1).max() < 0.3  # an x1 apart: 2 * 14 / 10 * 0.1
    # Navon et al.: the bowls' own minima at x2 near -8 are the ends, 20 below zero.
    assert fronts["navon"].min(dim=0).values.tolist() == pytest.approx([-20, -20], abs=0.05)
    # As printed, no x1 gives both terms of h1 their least: (1.36^2 + 0.1 * 13.64^2)/10 - 20.
    assert fronts["paper"].min(dim=0).values.tolist() == pytest.approx([-17.95, -19.96], abs=0.05)


def test_distance_to_the_front() -> None:
    front = torch.stack((torch.linspace(-20, 0, 900), torch.linspace(0, -20, 900)), dim=1)
    losses = torch.tensor([[[-10.0, -10.0], [-9.0, -9.0]], [[0.0, 0.0], [0.0, -18.0]]])
    expected = torch.tensor([0.0, 2**0.5, 200**0.5, 2**0.5]).view(2, 2)
    torch.testing.assert_close(toy.distance_to_front(losses, front), expected, rtol=0, atol=0.03)


def test_measures() -> None:
    settings = (FAMILIES["methods"][1],)
    positions = torch.full((11, 1, 2, 5, 1, 2), -8.0)
    positions[..., 0] = torch.linspace(30, 0, 11).view(11, 1, 1, 1, 1)
    runs = toy.Runs(settings, torch.arange(0, 110, 10), positions, torch.zeros(1, 2, 5, 1))
    fronts = {printing: toy.pareto_front(printing, spacing=0.1) for printing in PRINTINGS}
    first = toy_report.measure(runs, fronts)[0]
    assert first.printing == "navon"
    assert first.reached.all()
    assert (first.steps_until_near == 80).all()  # x1 is 30, 27, ..., 6 (on the front), 3, 0
    assert (first.share_near == 1).all()
    assert (first.wander == 0).all()
    assert first.losses[0, 0] == pytest.approx(by_hand(0, -8, -8))


@pytest.mark.slow
@pytest.mark.variant
def test_the_command_writes_what_it_says(tmp_path) -> None:
    output = tmp_path / "toy"
    arguments = ["reproduce", "toy", "--steps", "60", "--seeds", "1", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert str(output / "table.md") in result.output
    table = (output / "table.md").read_text()
    assert all(f"| {setting.name} |" in table for setting in ALL)
    results = json.loads((output / "results.json").read_text())
    assert results["steps"] == 60
    assert len(results["outcomes"]) == len(ALL) * len(PRINTINGS)
    pictures = {path.name for path in output.glob("*.png")}
    assert pictures == {f"toy-{f}-{p}.png" for f in FAMILIES for p in PRINTINGS}
    for name in pictures:
        with Image.open(output / name) as picture:
            assert (np.asarray(picture.convert("L")) < 250).mean() > 0.2  # not an empty page
