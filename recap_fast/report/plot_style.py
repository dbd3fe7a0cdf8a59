"""How all figures of the project look."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

COLOURS = ("#2563eb", "#e4572e", "#0f9d74", "#8b5cf6", "#d69a00", "#0891b2", "#be3f7d", "#64748b")
INK, MUTED, _GRID = "#1f2937", "#6b7280", "#e5e7eb"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # names come from the user: a dollar sign is a dollar sign
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": MUTED,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}
DPI = 150


def label_axes(axes: Axes, title: str, unit: str, *, xlabel: str = "step") -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
    axes.margins(x=0.02)


STAGE_COLOURS = {
    "rollout": "#1e5f8c",
    "reward": "#e9b44c",
    "train": "#7fb3d5",
    "sync": "#9a8fbf",
}
