"""The toy problem of the paper's Figures 13, 16 and 17: two losses, one of them noisy.

All runs (settings x printings x starts x noise seeds) advance together as one tensor program:
Adam and the gradient are elementwise, and `batch.stack` gives the reweighters a dimension for the
runs. The noise enters the values that a reweighter sees, never a gradient: it can move a run only
through the weights.

Shapes: R runs, G recorded steps, two objectives. Everything is float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recap_fast.reproduce.batch import stack
from recap_fast.reproduce.ema import EmaRecapReweighter
from recap_fast.reweighting.recap import Reweighter, make_reweighter

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
PRINTINGS = ("navon", "paper")
"""What the bowls h1 and h2 have in their second term: -x2 (Navon et al.) or -x1 (as printed)."""
NOISE = 3.0
LEARNING_RATE = 1e-2
STEPS, SEEDS = 10_000, 10
LEAST_ARGUMENT = 5e-6  # of the logarithms
NEAR = 0.5
"""A run is at the front within this distance in loss space; the front spans some 20 either way."""
_RECORDS = 400


@dataclass(frozen=True)
class Setting:
    """A reweighting method with its parameters, under the name that tables and figures show."""

    name: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int) -> Reweighter:
        """A fresh reweighter of two losses; `seed` is for the method that draws at random."""
        keywords = dict(self.parameters)
        if self.method == "rlw":
            keywords["seed"] = seed
        if self.method == "recap_ema":
            return EmaRecapReweighter(2, device="cpu", **keywords)
        return make_reweighter(self.method, 2, device="cpu", **keywords)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What reweighters must share to be stacked."""
        fixed = [
            (key, "number" if isinstance(value, float) else str(value))
            for key, value in self.parameters.items()
        ]
        return self.method, *sorted(fixed)


def _appendix(name: str, alpha: float = 0.5, temperature: float = 5.0) -> Setting:
    """s = alpha c + (1 - alpha) i, which the appendix varies."""
    return Setting(name, "recap", {"alpha": alpha, "temperature": temperature})


FAMILIES: dict[str, tuple[Setting, ...]] = {
    "methods": (
        Setting("RECAP", "recap"),
        Setting("uniform", "uniform"),
        Setting("static 1:3", "static", {"weights": [1.0, 3.0]}),
        Setting("DWA", "dwa"),
        Setting("RLW", "rlw"),
        Setting("UW", "uw"),
        Setting("scale-invariant", "scale_invariant"),
        Setting("FAMO", "famo"),
        Setting("SAW", "saw"),
        Setting("RECAP, averages", "recap_ema"),
    ),
    "alpha": tuple(_appendix(f"alpha {a:g}", alpha=a) for a in (0.0, 0.25, 0.5, 0.75, 1.0)),
    "temperature": tuple(_appendix(f"T {t:g}", temperature=t) for t in (0.1, 1.0, 5.0, 10.0, 30.0)),
    "window": tuple(Setting(f"W {w}", "recap", {"window": w}) for w in (2, 5, 20, 50, 100)),
    "variants": (
        Setting("no clamp of c", "recap", {"max_rate": None}),
        Setting("sigma around the newer mean", "recap", {"std": "current"}),
        Setting("read as rewards", "recap", {"signals": "reward"}),
    ),
}


@dataclass(frozen=True)
class Runs:
    """What was simulated, for settings, PRINTINGS, STARTS and seeds."""

    settings: tuple[Setting, ...]
    steps: Tensor  # [G] int64, optimizer steps done
    positions: Tensor  # [G, settings, printings, starts, seeds, 2] float32
    jitter: Tensor  # [settings, printings, starts, seeds], mean change of a weight in a step

    def losses(self) -> Tensor:
        """Noise-free losses at `positions`, in the same shape, float64."""
        as_printed = torch.tensor([p == "paper" for p in PRINTINGS]).view(-1, 1, 1)
        return toy_losses(self.positions.double(), as_printed)


def toy_losses(x: Tensor, as_printed: Tensor) -> Tensor:
    """The two noise-free losses.

    Args:
        x: [..., 2] floating.
        as_printed: bool, broadcastable to [...]: -x1 in the bowls' second term instead of -x2.

    Returns:
        [..., 2].
    """
    x1, x2 = x.unbind(-1)
    f1 = torch.tanh(0.5 * x2).clamp_min(0)
    f2 = torch.tanh(-0.5 * x2).clamp_min(0)
    g1 = (0.5 * (-x1 - 7) - torch.tanh(-x2)).abs().clamp_min(LEAST_ARGUMENT).log() + 6
    g2 = (0.5 * (-x1 + 3) - torch.tanh(-x2) + 2).abs().clamp_min(LEAST_ARGUMENT).log() + 6
    shared = 0.1 * (torch.where(as_printed, -x1, -x2) - 8).square()
    h1 = ((-x1 + 7).square() + shared) / 10 - 20
    h2 = ((-x1 - 7).square() + shared) / 10 - 20
    return torch.stack((f1 * g1 + f2 * h1, f1 * g2 + f2 * h2), dim=-1)


def pareto_front(printing: str, spacing: float = 0.02) -> Tensor:
    """Losses [F, 2], F <= 500, of grid points that no other one beats, evenly along the front.

    As printed, the bowls do not depend on x2 and f2 tends to 1 for x2 -> -inf, so that the front
    is reached in the limit; at the grid's edge f2 is 1 within 3e-7.
    """
    x1 = torch.arange(-10, 10 + spacing / 2, spacing, dtype=torch.float64)
    x2 = torch.arange(-16, 10 + spacing / 2, spacing, dtype=torch.float64)
    grid = torch.cartesian_prod(x1, x2)
    losses = toy_losses(grid, torch.tensor(printing == "paper"))
    losses = losses[losses[:, 0].argsort()]
    best = losses[:, 1].cummin(dim=0).values
    is_better = torch.ones(len(losses), dtype=torch.bool)
    is_better[1:] = losses[1:, 1] < best[:-1]
    front = losses[is_better]
    along = front.diff(dim=0).norm(dim=1).cumsum(dim=0)
    even = torch.linspace(0, float(along[-1]), 500, dtype=torch.float64)
    return front[torch.searchsorted(along, even).clamp_max(len(front) - 1)].unique(dim=0)


def distance_to_front(losses: Tensor, front: Tensor) -> Tensor:
    """Euclidean distance [...] of losses [..., 2] to the nearest of the front's points [F, 2].

    Points that are 0.06 apart, as `pareto_front`'s, bound the error to 0.03.
    """
    points = front.float()
    flat = losses.float().reshape(-1, 2)
    nearest = [
        torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values
        for part in flat.split(16_384)
    ]
    return torch.cat(nearest).view(losses.shape[:-1])


def simulate(
    settings: Sequence[Setting],
    steps: int = STEPS,
    seeds: int = SEEDS,
    noise: float = NOISE,
    on_step: Callable[[int], None] = lambda step: None,
) -> Runs:
    """Descends from every start under every setting, printing and noise seed.

    Noise of seed n is the same for all settings, printings and starts, and does not depend on how
    many seeds there are.

    Args:
        noise: standard deviation of what is added to the value of L1.
        on_step: called with the number of steps done after each.
    """
    ordered = sorted(settings, key=lambda setting: setting.shape)
    layout = (len(ordered), len(PRINTINGS), len(STARTS), seeds)
    starts = torch.tensor(STARTS, dtype=torch.float64).view(1, 1, len(STARTS), 1, 2)
    x = starts.expand(*layout, 2).reshape(-1, 2).clone().requires_grad_()
    as_printed = torch.tensor([p == "paper" for p in PRINTINGS]).view(1, -1, 1, 1)
    as_printed = as_printed.expand(layout).reshape(-1)
    disturbance = noise * _standard_normals(steps, seeds)
    repeats = len(x) // seeds
    groups = _stacked(ordered, repeats // len(ordered), seeds)
    optimizer = torch.optim.Adam([x], lr=LEARNING_RATE)
    every = max(1, steps // _RECORDS)
    recorded, positions = [0], [x.detach().float()]
    before = torch.ones(len(x), 2)
    jitter = torch.zeros_like(before)
    for step in range(steps):
        losses = toy_losses(x, as_printed)
        values = losses.detach().clone()
        values[:, 0] += disturbance[step].repeat(repeats)
        parts = values.split([size for _, size in groups])
        weights = torch.cat(
            [group.update(part) for (group, _), part in zip(groups, parts, strict=True)]
        )
        jitter += (weights - before).abs()
        before = weights
        optimizer.zero_grad()
        (weights * losses).mean(dim=1).sum().backward()
        optimizer.step()
        if (step + 1) % every == 0:
            recorded.append(step + 1)
            positions.append(x.detach().float())
        on_step(step + 1)
    found = torch.stack(positions).view(-1, *layout, 2)
    changes = jitter.mean(dim=1).div(steps).view(layout)
    return Runs(tuple(ordered), torch.tensor(recorded), found, changes)


def _standard_normals(steps: int, seeds: int) -> Tensor:
    """Standard normals [steps, seeds]."""
    columns = [
        torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in range(seeds)
    ]
    return torch.stack(columns, dim=1)


def _stacked(
    ordered: Sequence[Setting], runs_per_seed: int, seeds: int
) -> list[tuple[Reweighter, int]]:
    """A stacked reweighter for each group of like settings, with its number of runs."""
    groups = []
    for _, alike in itertools.groupby(ordered, key=lambda setting: setting.shape):
        reweighters = [
            setting.build(seed)
            for setting in alike
            for _ in range(runs_per_seed)
            for seed in range(seeds)
        ]
        groups.append((stack(reweighters), len(reweighters)))
    return groups
