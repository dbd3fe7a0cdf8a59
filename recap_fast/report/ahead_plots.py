"""Figures of a run whose rollouts come from servers: both sides in time, and how old tokens are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from recap_fast.config import TrainConfig
from recap_fast.report.history import RunHistory
from recap_fast.report.plot_style import COLOURS, MUTED, STAGE_COLOURS, label_axes

_SHOWN_STEPS = 10
_ENGINE_COLOUR = "#5a9a78"
_UNUSED_COLOUR = "#eef2f1"
_HEIGHT = 0.6


@dataclass(frozen=True, slots=True)
class _Placed:
    """A step in time, in seconds since the first one that is shown began."""

    step: int
    start: float
    stages: dict[str, float]
    """Seconds of the trainer's stages, one after the other from `start`."""
    measured: tuple[float, float]
    """When the servers' share was measured: from the batch before to this step's."""
    share: float
    """Part of `measured` in which servers had requests."""

    @property
    def end(self) -> float:
        return self.start + sum(self.stages.values())


def _placed(history: RunHistory) -> list[_Placed]:
    """The last steps. Servers are measured from batch to batch, and not from step to step; what is
    then more than trainer's stages lies between two steps: an evaluation, a checkpoint."""
    keys = ("total", "engine_busy", "engine_idle", "rollout", "reward", "train", "sync")
    rows = [[row["step"], *(row.get(f"time/{key}") for key in keys)] for row in history.rows]
    found: list[_Placed] = []
    batch = 0.0  # when the last one was there
    for row in [row for row in rows if None not in row[:4]][-_SHOWN_STEPS:]:
        step, total, busy, idle, rollout, reward, train, sync = (float(v or 0) for v in row)
        waited = max(0.0, total - train - sync)
        reward = max(0.0, min(reward, waited - rollout))  # ahead, rewards are computed meanwhile
        stages = dict(zip(STAGE_COLOURS, (waited - reward, reward, train, sync), strict=True))
        start = 0.0
        if found:
            previous = found[-1].end
            start = previous + max(0.0, batch + busy + idle - (previous + waited))
        before, batch = batch, start + waited
        since = max(before, batch - busy - idle)
        share = busy / (busy + idle) if busy else 0.0
        found.append(_Placed(int(step), start, stages, (since, batch), share))
    return found


def draw_timeline(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    """What the trainer did in the last steps, and how busy servers were in between."""
    steps = _placed(history)
    if not steps:
        return False
    axes = figure.subplots()
    label_axes(axes, "Both sides, last steps", "")
    said = {"rollout": "waiting for rollouts", "reward": "waiting for rewards"}
    for step in steps:
        at = step.start
        for name, seconds in step.stages.items():
            axes.barh(1, seconds, _HEIGHT, left=at, color=STAGE_COLOURS[name], linewidth=0)
            at += seconds
        axes.axvline(step.end, color="#cbd5e1", linewidth=0.8, zorder=0)
        since, until = step.measured
        for share, colour in ((1.0, _UNUSED_COLOUR), (step.share, _ENGINE_COLOUR)):
            axes.bar(
                since, _HEIGHT * share, until - since, -_HEIGHT / 2, align="edge", color=colour,
                edgecolor="white", linewidth=0.8,
            )  # fmt: skip
        axes.text(
            (since + until) / 2, -_HEIGHT / 2 - 0.04, f"{step.share:.0%}",
            ha="center", va="top", fontsize=6.5, color=MUTED, clip_on=True,
        )  # fmt: skip
    handles = [Patch(color=c, label=said.get(n, n)) for n, c in STAGE_COLOURS.items()]
    handles.append(Patch(color=_ENGINE_COLOUR, label="servers: share of the time with requests"))
    axes.set_yticks([0, 1], ["servers", "trainer"])
    axes.set_ylim(-0.6, 1.4)
    axes.set_xlabel(f"seconds; steps {steps[0].step} to {steps[-1].step}")
    axes.set_xlim(0, steps[-1].end)
    axes.grid(visible=False)
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=7
    )
    return True


def draw_staleness(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    """Shares of tokens by age, where any is above 0, and what importance weights leave of them."""
    steps, oldest = history.series("staleness/max")
    if not len(steps) or not oldest.max():
        return False
    effective = history.series("importance/effective_sample_size")
    axes: Axes
    if len(effective[0]):
        axes, beside = figure.subplots(1, 2)
        label_axes(beside, "Effective samples", "share of the policy tokens")
        beside.plot(*effective, color=COLOURS[3], marker="o", markersize=2.5, linewidth=1.2)
        beside.set_ylim(0, 1.05)
        beside.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    else:
        axes = figure.subplots()
    label_axes(axes, "Staleness", "share of the step's tokens")
    bottom = np.zeros(len(steps))
    # Darker is older.
    shades = colormaps["YlGnBu"](np.linspace(0.25, 0.9, int(oldest.max()) + 1))
    for age, shade in enumerate(shades):
        found = dict(zip(*history.series(f"staleness/share_{age}"), strict=True))
        share = np.array([found.get(step, 0.0) for step in steps])
        label = f"{age} step{'s' * (age != 1)} old"
        axes.bar(
            steps, share, 1.0, bottom=bottom, color=shade,
            label=label, linewidth=0,
        )  # fmt: skip
        bottom += share
    axes.set_ylim(0, 1)
    axes.grid(visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2, fontsize=7)
    return True
