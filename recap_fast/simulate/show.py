"""What a plan and a check look like: tables, simulation.json, timeline.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from recap_fast.simulate.check import LIMIT, Check
from recap_fast.simulate.pipeline import Outcome, SetUp
from recap_fast.simulate.plan import Choice, Mode, Plan
from recap_fast.simulate.trace import MAX_ERROR, Fit, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JSON_FILE, FIGURE_FILE = "simulation.json", "timeline.png"
_SHOWN_STEPS = 4


def print_plan(plan: Plan, fit: Fit, trace: Trace, console: Console) -> None:
    costs = fit.costs
    console.print(
        f"replaying {len(trace.steps)} steps: a decode step takes {1e3 * costs.decode_step:.2f} ms "
        f"and {1e3 * costs.decode_request:.3f} ms for each request in flight (a step's rollouts "
        f"are off by {fit.rollout_error:.0%}); an update {costs.train_fixed:.2f} s and "
        f"{1e3 * costs.train_token:.3f} ms x GPUs a token (off by {fit.train_error:.0%}); rewards "
        f"{costs.reward:.2f} s, weights {costs.sync:.2f} s",
        soft_wrap=True,
        highlight=False,
    )
    for note in fit.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    console.print(_table(plan, fit.is_supported))
    marks = "" if not fit.is_supported else "; * recommended"
    console.print(
        "split, idle: trainer : engines; stale: mean and most steps" + marks,
        soft_wrap=True,
        highlight=False,
    )
    if not fit.is_supported:
        console.print(
            f"[yellow]nothing is recommended[/]: the trace does not support it. Its steps are off "
            f"from what these costs say by {fit.rollout_error:.0%} (rollouts) and "
            f"{fit.train_error:.0%} (updates), where {MAX_ERROR:.0%} is the most that tells "
            f"set-ups apart. Trace more steps, on a machine that nothing else uses",
            soft_wrap=True,
            highlight=False,
        )
        return
    for gpus in dict.fromkeys(choice.gpus for choice in plan.choices):
        console.print(_advice(gpus, plan), soft_wrap=True, highlight=False)


def _table(plan: Plan, recommends: bool) -> Table:
    """Of at most 80 columns, as terminals and logs have."""
    table = Table(
        title="A step by set-up", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for title in ("GPUs", "set-up", "split", "step", "tokens/s", "idle %", "in\nflight", "stale"):
        left = title == "set-up"
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    last = None
    for choice in plan.choices:
        outcome, set_up = choice.outcome, choice.outcome.set_up
        if last not in (None, choice.gpus):
            table.add_section()
        marked = recommends and plan.recommended(choice.gpus) is choice
        split = f"{set_up.trainer_gpus}:{set_up.engine_gpus}"
        table.add_row(
            "" if last == choice.gpus else str(choice.gpus),
            _short(choice.mode) + " *" * marked,
            "both" if set_up.colocated else split,
            f"{outcome.step_seconds:.2f} s",
            f"{outcome.tokens_per_second:,.0f}",
            f"{100 * outcome.trainer_idle:.0f}:{100 * outcome.engine_idle:.0f}",
            f"{outcome.requests:.0f}" if outcome.requests >= 10 else f"{outcome.requests:.1f}",
            f"{outcome.mean_staleness:.2f}, {outcome.max_staleness}",
        )
        last = choice.gpus
    return table


def _short(mode: Mode) -> str:
    if mode.colocated:
        return "in turns"
    ahead = f"{mode.depth:g} ahead, <= {mode.max_staleness}"
    return ahead if mode.name.startswith("asynchronous") else mode.name


def _advice(gpus: int, plan: Plan) -> str:
    best = plan.recommended(gpus)
    if best.mode.colocated:
        return f"{gpus} GPUs: one for both in turns; nothing that overlaps is over 2 % faster"
    together = next(c for c in plan.choices if c.gpus == gpus and c.mode.colocated)
    gain = together.outcome.step_seconds / best.outcome.step_seconds
    set_up = best.outcome.set_up
    return (
        f"{gpus} GPUs: {set_up.trainer_gpus} for the trainer, {set_up.engine_gpus} for engines, "
        f"{best.mode.name}: {gain:.2f} times as fast as in turns"
    )


def print_check(check: Check, console: Console) -> None:
    table = Table(title=f"{check.run}, {_split(check.set_up)}: mean seconds a step")
    for title in ("", "predicted", "measured", "error"):
        table.add_column(title, justify="right" if title else "left")
    for stage, (predicted, measured) in check.seconds.items():
        error = f"{predicted / measured - 1:+.1%}" if measured > 0 else ""
        table.add_row(stage, f"{predicted:.3f}", f"{measured:.3f}", error)
    console.print(table)
    verdict = "within" if check.passes else "not within"
    console.print(f"{verdict} {LIMIT:.0%}: {check.error:+.1%}", highlight=False)


def _split(set_up: SetUp) -> str:
    if set_up.colocated:
        return f"{set_up.engine_gpus} for both"
    return f"{set_up.trainer_gpus} : {set_up.engine_gpus}"


def write_plan(plan: Plan, fit: Fit, check: Check | None, output: Path) -> tuple[Path, Path]:
    """Writes simulation.json and timeline.png into `output`, and returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "costs": _fields(fit.costs),
        "rollout_error": fit.rollout_error,
        "train_error": fit.train_error,
        "notes": fit.notes,
        "supported": fit.is_supported,
        "choices": [_choice(choice, plan, fit.is_supported) for choice in plan.choices],
    }
    if check is not None:
        content["check"] = {
            "run": str(check.run),
            "set_up": _fields(check.set_up),
            "seconds": {
                stage: {"predicted": predicted, "measured": measured}
                for stage, (predicted, measured) in check.seconds.items()
            },
            "error": check.error,
            "passes": check.passes,
        }
    path = output / JSON_FILE
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path, draw_timeline(plan, output / FIGURE_FILE)


def _choice(choice: Choice, plan: Plan, supported: bool) -> dict[str, Any]:
    outcome = choice.outcome
    return {
        "gpus": choice.gpus,
        "set_up": choice.mode.name,
        **_fields(outcome.set_up),
        "step_seconds": outcome.step_seconds,
        "stage_seconds": outcome.stage_seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "trainer_idle": outcome.trainer_idle,
        "engine_idle": outcome.engine_idle,
        "requests_in_flight": outcome.requests,
        "staleness": outcome.staleness,
        "recommended": supported and plan.recommended(choice.gpus) is choice,
    }


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def draw_timeline(plan: Plan, path: Path) -> Path:
    """A panel for each choice: what the trainer does, and how many requests are in flight."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    from recap_fast.report.plot_style import COLOURS, DPI, STYLE

    gpus = list(dict.fromkeys(choice.gpus for choice in plan.choices))
    modes = list(dict.fromkeys(choice.mode.name for choice in plan.choices))
    colours = {"train": COLOURS[0], "wait": "#e5e7eb", "sync": COLOURS[4]}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(modes), len(gpus), figsize=(1.2 + 4.1 * len(gpus), 0.7 + 2.0 * len(modes)),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for choice in plan.choices:
            panel = axes[modes.index(choice.mode.name)][gpus.index(choice.gpus)]
            _draw_choice(panel, choice, colours, COLOURS[2])
        for row, name in zip(axes, modes, strict=True):
            row[0].set_ylabel(name.replace(", ", ",\n", 1) + "\n\nrequests in flight", fontsize=8.5)
        for panel in axes[-1]:
            panel.set_xlabel("seconds")
        handles = [
            Patch(color=colours["train"], label="trainer: update"),
            Patch(color=colours["wait"], label="trainer: waits for rollouts"),
            Patch(color=colours["sync"], label="new weights, both pause"),
            Patch(color=COLOURS[2], alpha=0.35, label="engines: requests in flight"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
    return path


def _draw_choice(panel: Axes, choice: Choice, colours: dict[str, str], engine: str) -> None:
    outcome = choice.outcome
    start, end = _window(outcome)
    points = [(t, n) for t, n in outcome.in_flight if start <= t <= end]
    before = [n for t, n in outcome.in_flight if t < start][-1:] or [0]
    times = [0.0, *(t - start for t, _ in points), end - start]
    counts = [*before, *(n for _, n in points)]
    counts.append(counts[-1])
    peak = max(counts) or 1
    panel.fill_between(times, counts, step="post", color=engine, alpha=0.35, linewidth=0)
    for span in outcome.spans:
        left, right = max(span.start, start), min(span.end, end)
        if right > left:
            panel.broken_barh(
                [(left - start, right - left)], (1.12 * peak, 0.16 * peak),
                facecolors=colours[span.activity], edgecolor="white", linewidth=0.7,
            )  # fmt: skip
    panel.set_xlim(0, end - start)
    panel.set_ylim(0, 1.32 * peak)
    panel.grid(visible=False)
    panel.set_title(
        f"{choice.gpus} GPUs ({_split(outcome.set_up)}): {outcome.step_seconds:.2f} s a step",
        fontsize=9.5,
    )


def _window(outcome: Outcome) -> tuple[float, float]:
    """A few steps from the end, whole ones."""
    ends = _step_ends(outcome)
    first = max(0, len(ends) - 1 - _SHOWN_STEPS)
    return ends[first], ends[-1]


def _step_ends(outcome: Outcome) -> Sequence[float]:
    last: dict[int, float] = {}
    for span in outcome.spans:
        last[span.step] = span.end
    whole = sorted(last.items())[:-1] if len(last) > 1 else sorted(last.items())
    return [0.0, *(end for _, end in whole)]
