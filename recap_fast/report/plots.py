"""The figures of a run's report, drawn from its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter

from recap_fast.config import TrainConfig
from recap_fast.report.ahead_plots import draw_staleness, draw_timeline
from recap_fast.report.history import Array, RunHistory
from recap_fast.report.plot_style import COLOURS, DPI, MUTED, STAGE_COLOURS, STYLE, label_axes

_SIZE = (6.4, 3.3)  # inches
_MAX_BARS = 300
_NOISY, _SMOOTH, _EXACT = 0.15, 0.025, 0.0  # share of a series that its drawn average spans
_FEW_POINTS = 12  # below it points are marked, or a run of one step would show nothing


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: a file name without suffix, what it shows in a sentence, and its PNG."""

    name: str
    caption: str
    path: Path


def draw_plots(history: RunHistory, config: TrainConfig, folder: Path) -> list[Plot]:
    """Draws every figure that the run has data for into `folder`, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    with mpl.rc_context(STYLE):
        for name, caption, draw in _FIGURES:
            layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.09)
            figure = Figure(figsize=_SIZE, dpi=DPI, layout=layout)
            if draw(figure, history, config):
                path = folder / f"{name}.png"
                figure.savefig(path)
                plots.append(Plot(name, caption, path))
    return plots


def moving_average(values: Array, window: int) -> Array:
    """Mean of about `window` values centred on each of `values` [n]; near an end, of those that
    there are, so that one outlier there does not bend the curve."""
    middle, reach = np.arange(len(values)), window // 2
    starts = np.maximum(middle - reach, 0)
    ends = np.minimum(middle + reach + 1, len(values))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _objective_colours(config: TrainConfig) -> dict[str, str]:
    names = [objective.name for objective in config.objectives]
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _legend(axes: Axes, at_least: int = 2) -> None:
    """A row of names between title and plot, where it hides no curve."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) < at_least:
        return
    rows = math.ceil(len(handles) / 4)
    axes.set_title(axes.get_title(loc="left"), pad=12 + 14 * rows)
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(-0.015, 1.0), ncols=4,
        borderaxespad=0.1, handlelength=1.2, columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip


def _curve(axes: Axes, x: Array, y: Array, colour: str, label: str, share: float = _NOISY) -> None:
    """The values, faint, under their average over a share of the series."""
    window = min(int(share * len(y)), 25)
    marker = "o" if len(y) <= _FEW_POINTS else ""
    if window > 2:
        axes.plot(x, y, color=colour, alpha=0.28, linewidth=1.0)
    axes.plot(x, moving_average(y, window), color=colour, label=label, marker=marker, markersize=4)


def _per_objective(
    axes: Axes,
    history: RunHistory,
    config: TrainConfig,
    prefix: str,
    *,
    kinds: Sequence[str] = ("reward", "loss"),
    share: float = _NOISY,
    legend_at: int = 2,
) -> bool:
    colours = _objective_colours(config)
    drawn = False
    for objective in config.objectives:
        x, y = history.series(f"{prefix}/{objective.name}")
        if objective.kind in kinds and len(x):
            _curve(axes, x, y, colours[objective.name], objective.name, share)
            drawn = True
    _legend(axes, legend_at)
    return drawn


def _rewards(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    axes = figure.subplots()
    label_axes(axes, "Rewards", "mean reward of the rollouts")
    drawn = _per_objective(axes, history, config, "reward", kinds=["reward"])
    low, high = axes.get_ylim()
    if drawn and low >= -0.2 and high <= 1.2:
        axes.set_ylim(-0.03, 1.03)
    return drawn


def _weights(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    axes = figure.subplots()
    label_axes(axes, "Objective weights", "λ (mean 1)")
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    drawn = _per_objective(axes, history, config, "weight", share=_SMOOTH)
    _mark_warm_up(axes, history, config)
    return drawn


def _mark_warm_up(axes: Axes, history: RunHistory, config: TrainConfig) -> None:
    """Shades the steps in which RECAP's windows fill and every weight is 1."""
    if config.reweighting.method != "recap":
        return
    windows = 1 if config.reweighting.parameters.get("retention") else 2
    end = min(windows * int(config.reweighting.parameters.get("window", 10)), history.num_steps)
    if end < 2:
        return
    axes.axvspan(1, end, color="#eef2f7", zorder=0, linewidth=0)
    if end > 0.2 * history.num_steps:  # else the words are wider than the shade
        axes.text(
            (1 + end) / 2, 0.03, "windows fill", transform=axes.get_xaxis_transform(),
            ha="center", va="bottom", fontsize=8, color=MUTED,
        )  # fmt: skip


def _rates(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    axes = figure.subplots()
    label_axes(axes, "Convergence rates", "c (above 1: still improving)")
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    return _per_objective(axes, history, config, "rate", share=_SMOOTH)


def _instabilities(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    axes = figure.subplots()
    label_axes(axes, "Instabilities", "i (standard deviation / means)")
    drawn = _per_objective(axes, history, config, "instability", share=_SMOOTH)
    axes.set_ylim(bottom=0)
    return drawn


def _retentions(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    axes = figure.subplots()
    label_axes(axes, "Forgetting", "r (relative drop below the best)")
    drawn = _per_objective(axes, history, config, "retention", share=_SMOOTH)
    axes.set_ylim(bottom=0)
    return drawn


def _pulls(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    axes = figure.subplots()
    label_axes(axes, "Gradient strengths", "norm at the hidden states")
    drawn = _per_objective(axes, history, config, "gradient_norm")
    norms = [history.series(f"gradient_norm/{o.name}")[1] for o in config.objectives]
    if any((values > 0).any() for values in norms):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter("{x:g}")  # the default writes powers in TeX
    return drawn


def _shares(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    axes = figure.subplots()
    label_axes(axes, "Shares of the sources", "share of a step's rows")
    drawn = _per_source(axes, history, config, "mixing", _EXACT)
    axes.set_ylim(bottom=0)
    return drawn


def _reviews(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    left, right = figure.subplots(1, 2)
    label_axes(left, "Solved prompts that came back", "prompts in a step")
    drawn = _per_source(left, history, config, "review", _NOISY, legend_at=1)
    label_axes(right, "Solved again", "share of those")
    _per_source(right, history, config, "review_solved", _NOISY, legend_at=1)
    left.set_ylim(bottom=0)
    right.set_ylim(-0.03, 1.03)
    return drawn


def _per_source(
    axes: Axes,
    history: RunHistory,
    config: TrainConfig,
    prefix: str,
    share: float,
    legend_at: int = 2,
) -> bool:
    drawn = False
    for place, source in enumerate(config.data.sources):
        x, y = history.series(f"{prefix}/{source.name}")
        if len(x):
            _curve(axes, x, y, COLOURS[place % len(COLOURS)], source.name, share)
            drawn = True
    _legend(axes, legend_at)
    return drawn


def _losses(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    """Policy losses hover around 0 and supervised ones do not: each kind has its own axis."""
    present = [
        kind
        for kind in ("reward", "loss")
        if any(
            len(history.series(f"loss/{o.name}")[0]) for o in config.objectives if o.kind == kind
        )
    ]
    titles = {
        "reward": ("Policy losses", "L per token"),
        "loss": ("Supervised losses", "nats per token"),
    }
    for axes, kind in zip(np.ravel(figure.subplots(1, len(present) or 1)), present, strict=False):
        label_axes(axes, *titles[kind])
        _per_objective(axes, history, config, "loss", kinds=[kind], legend_at=1)
    return bool(present)


def _zero_std(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    axes = figure.subplots()
    label_axes(axes, "Groups without a signal", "share of groups, all rewards equal")
    drawn = _per_objective(axes, history, config, "zero_std_fraction", kinds=["reward"])
    axes.set_ylim(-0.03, 1.03)
    return drawn


def _time_split(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    steps, _ = history.series("time/total")
    if not len(steps):
        return False
    axes = figure.subplots()
    label_axes(axes, "Where the time goes", "seconds per step")
    size = math.ceil(len(steps) / _MAX_BARS)
    bottom = np.zeros(math.ceil(len(steps) / size))
    for stage, colour in STAGE_COLOURS.items():
        x, y = history.series(f"time/{stage}")
        by_step = dict(zip(x, y, strict=True))
        seconds = _binned(np.array([by_step.get(step, 0.0) for step in steps]), size)
        width = size * 0.86 if len(bottom) < 80 else size
        axes.bar(
            _binned(steps, size), seconds, width, bottom=bottom, color=colour, label=stage,
            linewidth=0,
        )  # fmt: skip
        bottom = bottom + seconds
    axes.grid(visible=False, axis="x")
    if len(steps) < 4:  # bars as wide as the figure otherwise
        axes.set_xlim(steps[0] - 2, steps[-1] + 2)
    _legend(axes)
    return True


def _binned(values: Array, size: int) -> Array:
    """Means of runs of `size` values; the last run may be shorter."""
    starts = np.arange(0, len(values), size)
    counts = np.minimum(starts + size, len(values)) - starts
    return np.add.reduceat(values, starts) / counts


def _throughput(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    x, y = history.series("tokens_per_second")
    if not len(x):
        return False
    axes = figure.subplots()
    label_axes(axes, "Throughput", "tokens per second")
    _curve(axes, x, y, COLOURS[5], "tokens per second")
    axes.set_ylim(bottom=0)
    return True


def _mismatch(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    axes = figure.subplots()
    label_axes(axes, "Engine against trainer", "|Δ log-prob| of sampled tokens")
    axes.set_yscale("log")  # before the curves: one that is flat would have no linear range
    # Also before: curves of 0 alone, from steps without policy tokens, would span no range.
    warn = config.rollout.warn_logprob_diff
    axes.axhline(
        warn, color=COLOURS[1], linewidth=1, linestyle=(0, (4, 3)), label=f"warning ({warn:g})"
    )
    drawn = False
    for name, colour in (("max", "#94a3b8"), ("mean", COLOURS[0])):
        x, y = history.series(f"rollout/logprob_diff_{name}")
        if len(x):
            # A logarithmic axis has no place for a mismatch of exactly 0.
            _curve(axes, x, np.maximum(y, 1e-9), colour, name)
            drawn = True
    # The default labels are formulas, which are off.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
    return drawn


def _gradient(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    x, y = history.series("grad_norm")
    if not len(x):
        return False
    left, right = figure.subplots(1, 2)
    label_axes(left, "Gradient norm", "before clipping")
    _curve(left, x, y, COLOURS[2], "gradient norm")
    limit = config.optimizer.max_grad_norm
    if limit <= 2 * y.max():
        left.axhline(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="clipped above")
    label_axes(right, "Learning rate", "")
    _curve(right, *history.series("lr"), COLOURS[3], "AdamW", _EXACT)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        _legend(axes, at_least=1)
    return True


def _evaluations(figure: Figure, history: RunHistory, config: TrainConfig) -> bool:
    """Held-out scores over time; two points are a table, not a curve."""
    colours = _objective_colours(config)
    styles = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
    axes = figure.subplots()
    label_axes(axes, "Held-out rewards", "mean reward, greedy")
    drawn = False
    for number, source in enumerate(s for s in config.data.sources if s.kind == "rl"):
        for name in source.rewards:
            x, y = history.series(f"eval/{source.name}/{name}")
            if len(x) > 2:
                axes.plot(
                    x, y, color=colours[name], linestyle=styles[number % len(styles)],
                    marker="o", markersize=4, label=f"{source.name}: {name}",
                )  # fmt: skip
                drawn = True
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


_Draw = Callable[[Figure, RunHistory, TrainConfig], bool]
_FIGURES: tuple[tuple[str, str, _Draw], ...] = (
    (
        "rewards",
        "Mean reward of each objective over a step's rollouts; faint: the step itself, strong: "
        "moving average.",
        _rewards,
    ),
    (
        "weights",
        "How much each objective counts in the loss. A weight rises with its objective's rate of "
        "improvement and its instability; while RECAP's windows fill, all are 1.",
        _weights,
    ),
    ("rates", "Newer window's mean against the older one's.", _rates),
    ("instabilities", "Relative spread of each objective's values over both windows.",
     _instabilities),
    ("retentions", "How far each objective is below its best windowed mean, beyond the noise.",
     _retentions),
    (
        "strengths",
        "How strongly each objective pulls at the hidden states before it is weighed. Weights "
        "decide little between objectives that differ by more than weights do: see "
        "reweighting.balance.",
        _pulls,
    ),
    ("shares", "Rows of each source, where the objectives' weights decide (data.mixing adaptive).",
     _shares),
    ("reviews", "Prompts that were solved and came back (data.review), and how many of them were "
     "solved again.", _reviews),
    ("losses", "Unweighted loss of each objective.", _losses),
    (
        "zero_std",
        "Groups whose rollouts all earned the same teach nothing about that objective.",
        _zero_std,
    ),
    ("evaluations", "Greedy completions on held-out rows.", _evaluations),
    ("time", "Seconds of each step by stage; evaluation and checkpoints are not included.",
     _time_split),
    (
        "timeline",
        "What the trainer did, and below it how busy servers were: a box reaches from one batch to "
        "the next, and is filled by the share of that time in which servers had requests. Nothing "
        "was measured after the last batch. Gaps above are evaluations and checkpoints.",
        draw_timeline,
    ),
    (
        "staleness",
        "Optimizer steps between the weights that sampled a token and those that it is trained on. "
        "Importance weights leave as many effective samples: (sum w)^2 / (n sum w^2).",
        draw_staleness,
    ),
    ("throughput", "Prompt, completion and replay tokens per second of a whole step.", _throughput),
    (
        "mismatch",
        "Log-probs of the sampled tokens in the rollout engine against those in the trainer.",
        _mismatch,
    ),
    ("gradient", "Norm of the gradient before clipping, and the schedule.", _gradient),
)  # fmt: skip
