"""report.html: what a run did, in one file that needs nothing else."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from recap_fast.config import SourceConfig, TrainConfig, load_config
from recap_fast.report.history import RunHistory
from recap_fast.report.metrics import MACHINE_FILE, read_metrics, read_samples
from recap_fast.report.plots import Plot, draw_plots
from recap_fast.types import UserError

_SHOWN_ROLLOUTS = 4  # of the first recorded step, and as many of the last
_LONGEST_TEXT = 2000  # characters of a prompt or completion that are shown


class ReportError(UserError):
    """The folder holds no run that can be reported on."""


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html, and its figures as PNG files under `run_dir`/plots.

    The run may be unfinished. The page is self-contained: figures are data URIs, and it loads no
    script, style or font.

    Returns:
        The report's path.

    Raises:
        ReportError: `run_dir` is no run's folder.
        UserError: a file of the run is damaged; names file and line.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ReportError(f"{run_dir}: no such folder")
    if not (run_dir / "config.yaml").exists():
        raise ReportError(f"{run_dir}: not a run's folder (it has no config.yaml)")
    config = load_config(run_dir / "config.yaml")
    history = RunHistory(read_metrics(run_dir))
    samples, machine = read_samples(run_dir), _read_machine(run_dir)
    plots = draw_plots(history, config, run_dir / "plots")  # last of all: it takes seconds
    sections = [
        _header(run_dir, history, config),
        _evaluation_section(history, config),
        _plot_section(plots),
        _rollout_section(samples),
        _counter_section(history),
        _facts_section(history, config, machine),
    ]
    title = escape(run_dir.resolve().name)
    page = _PAGE.format(title=title, style=_STYLE, body="\n".join(sections))
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


@dataclass(frozen=True, slots=True)
class Comparison:
    """One held-out metric at the first and at the last evaluation."""

    source: str
    metric: str
    before: float
    after: float | None  # None: evaluated only once so far
    better: Literal["higher", "lower", "neither"]
    standard_error: float | None  # of `before`, at most; None where unknown

    @property
    def difference(self) -> float | None:
        return None if self.after is None else self.after - self.before

    @property
    def verdict(self) -> Literal["better", "worse", "same", ""]:
        """Whether the difference is an improvement; "same" when it rounds to nothing."""
        if self.difference is None or self.better == "neither":
            return ""
        gain = self.difference if self.better == "higher" else -self.difference
        if abs(gain) < 5e-4:
            return "same"
        return "better" if gain > 0 else "worse"


def compare_evaluations(history: RunHistory, config: TrainConfig) -> list[Comparison]:
    """Compares each held-out metric before and after training, source by source."""
    held_out = {source.name: source for source in config.data.sources}
    found = []
    for key in history.keys("eval/"):
        source, _, metric = key.removeprefix("eval/").rpartition("/")
        _, values = history.series(key)
        if not len(values):
            continue
        before = float(values[0])
        after = float(values[-1]) if len(values) > 1 else None
        error = _largest_standard_error(before, metric, held_out.get(source))
        found.append(Comparison(source, metric, before, after, _direction(metric), error))
    return found


def _direction(metric: str) -> Literal["higher", "lower", "neither"]:
    if metric == "loss":
        return "lower"
    return "neither" if metric.endswith("tokens") else "higher"


def _largest_standard_error(mean: float, metric: str, source: SourceConfig | None) -> float | None:
    """Of a mean over held-out rows whose values lie in [0, 1]: their variance is at most
    mean * (1 - mean) (Bhatia and Davis 2000)."""
    if source is None or metric not in source.rewards or not source.held_out or not 0 <= mean <= 1:
        return None
    return math.sqrt(mean * (1 - mean) / source.held_out)


def _read_machine(run_dir: Path) -> dict[str, Any]:
    path = run_dir / MACHINE_FILE
    if not path.exists():
        return {}
    try:
        machine = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ReportError(f"{path}: not valid JSON") from None
    if not isinstance(machine, dict):
        raise ReportError(f"{path}: expected an object, got {type(machine).__name__}")
    return machine


def _header(run_dir: Path, history: RunHistory, config: TrainConfig) -> str:
    done, total = history.num_steps, config.training.steps
    state = "finished" if done >= total else "unfinished"
    names = ", ".join(objective.name for objective in config.objectives)
    _, seconds = history.series("time/total")
    tiles = [
        ("steps", f"{done:,} / {total:,}", state),
        ("training time", _duration(seconds.sum()), "without evaluation"),
        _throughput_tile(history),
        *[_reward_tile(history, o.name) for o in config.objectives if o.kind == "reward"],
    ]
    cards = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return (
        f"<header><h1>{escape(run_dir.resolve().name)}</h1>"
        f"<p>{escape(_method(config))} on <b>{escape(config.model.path)}</b>, "
        f"{len(config.objectives)} objectives: {escape(names)}</p></header>"
        f'<div class="tiles">{cards}</div>'
    )


def _throughput_tile(history: RunHistory) -> tuple[str, str, str]:
    _, rates = history.series("tokens_per_second")
    _, seconds = history.series("time/total")
    if not len(rates) or len(rates) != len(seconds) or not seconds.sum():
        return ("throughput", "–", "tokens per second")
    return ("throughput", f"{(rates * seconds).sum() / seconds.sum():,.0f}", "tokens per second")


def _reward_tile(history: RunHistory, name: str) -> tuple[str, str, str]:
    """A reward's mean over the last quarter of the steps, beside that over the first."""
    _, values = history.series(f"reward/{name}")
    if not len(values):
        return (name, "–", "no rewards yet")
    quarter = max(len(values) // 4, 1)
    first, last = values[:quarter].mean(), values[-quarter:].mean()
    return (name, f"{last:.2f}", f"last quarter; first: {first:.2f}")


def _method(config: TrainConfig) -> str:
    if config.reweighting.method != "recap":
        return f"GRPO, {config.reweighting.method} weights"
    parameters = config.reweighting.parameters
    window, temperature = parameters.get("window", 10), parameters.get("temperature", 5.0)
    return f"GRPO with RECAP (W = {window}, T = {temperature:g})"


def _evaluation_section(history: RunHistory, config: TrainConfig) -> str:
    rows = compare_evaluations(history, config)
    if not rows:
        return "<h2>Before and after</h2><p>The run has not been evaluated yet.</p>"
    lines, last_source = [], None
    for row in rows:
        source = "" if row.source == last_source else row.source
        start = "" if row.source == last_source else ' class="start"'
        last_source = row.source
        error = f" <small>± {row.standard_error:.3f}</small>" if row.standard_error else ""
        digits = 1 if row.better == "neither" else 3
        difference = "–" if row.difference is None else f"{row.difference:+.{digits}f}"
        sign = {"better": " ▲", "worse": " ▼"}.get(row.verdict, "")
        arrow = {"lower": " <small>(lower is better)</small>"}.get(row.better, "")
        lines.append(
            f"<tr{start}><th>{escape(source)}</th><td>{escape(row.metric)}{arrow}</td>"
            f'<td class="n">{_figure(row.before, digits)}{error}</td>'
            f'<td class="n">{_figure(row.after, digits)}'
            f'</td><td class="n {row.verdict}">{difference}{sign}</td></tr>'
        )
    return (
        "<h2>Before and after</h2><p>Held-out rows, greedy decoding. ▼ marks what the model does "
        "worse than before training: forgetting, if it is more than noise. ± is the largest "
        "standard error that so few rows can have.</p>"
        '<table class="evaluation"><thead><tr><th>source</th><th>metric</th>'
        '<th class="n">before</th><th class="n">after</th><th class="n">difference</th></tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _plot_section(plots: Sequence[Plot]) -> str:
    if not plots:
        return "<h2>Curves</h2><p>No step has been recorded yet.</p>"
    figures = []
    for plot in plots:
        data = base64.b64encode(plot.path.read_bytes()).decode("ascii")
        figures.append(
            f'<figure><img alt="{escape(plot.name)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        )
    return f'<h2>Curves</h2><div class="plots">{"".join(figures)}</div>'


def _rollout_section(samples: Sequence[dict[str, Any]]) -> str:
    if not samples:
        return ""
    first, last = samples[0]["step"], samples[-1]["step"]
    parts = ["<h2>Rollouts</h2>"]
    for step in dict.fromkeys([first, last]):
        chosen = [s for s in samples if s["step"] == step][:_SHOWN_ROLLOUTS]
        cards = "".join(_rollout_card(sample) for sample in chosen)
        parts.append(f'<h3>Step {step}</h3><div class="rollouts">{cards}</div>')
    return "".join(parts)


def _rollout_card(sample: dict[str, Any]) -> str:
    chips = "".join(
        f'<span class="chip">{escape(str(name))} <b>{value:.2f}</b></span>'
        for name, value in sample.get("rewards", {}).items()
    )
    cut = "" if sample.get("finish_reason") == "stop" else ", cut off"
    return (
        f'<article><div class="meta">{escape(str(sample.get("source", "")))}, '
        f"{sample.get('tokens', 0)} tokens{cut}</div>"
        f'<pre class="prompt">{_text(sample.get("prompt"))}</pre>'
        f"<pre>{_text(sample.get('completion'))}</pre>"
        f'<div class="meta">answer: {_text(sample.get("answer"))}</div><div>{chips}</div></article>'
    )


def _counter_section(history: RunHistory) -> str:
    """Failures and skipped updates are counted by step, skipped rows since the start."""
    counts: list[tuple[str, int]] = []
    for prefix in ("failed/", "unreadable/", "skipped_updates"):
        counts += [(key, int(history.series(key)[1].sum())) for key in history.keys(prefix)]
    for key in history.keys("skipped/"):
        _, values = history.series(key)
        counts.append((key, int(values[-1]) if len(values) else 0))
    _, packed = history.series("train/packed_tokens")
    counts.append(("idle/no reward told the rollouts of a group apart", int((packed == 0).sum())))
    names = {
        "idle": "steps that trained nothing",
        "failed": "failed rewards",
        "unreadable": "answers that could not be read (reward 0)",
        "skipped": "skipped rows",
        "skipped_updates": "updates skipped (gradient not finite)",
    }
    lines = []
    for key, count in counts:
        kind, _, what = key.partition("/")
        if count:
            lines.append(
                f"<tr><th>{names[kind]}</th><td>{escape(what)}</td>"
                f'<td class="n">{count:,}</td></tr>'
            )
    if not lines:
        return (
            "<h2>Skipped and failed</h2><p>Nothing: no row was skipped, no reward failed, no "
            "update was left out.</p>"
        )
    return f"<h2>Skipped and failed</h2><table><tbody>{''.join(lines)}</tbody></table>"


def _facts_section(history: RunHistory, config: TrainConfig, machine: dict[str, Any]) -> str:
    rollouts = f"{config.rollout.group_size} a prompt, up to {config.rollout.max_new_tokens} tokens"
    dtype = machine.get("compute_dtype", config.model.dtype)
    facts: list[tuple[str, str]] = [
        ("model", f"{config.model.path}, computing in {dtype}"),
        ("method", _method(config)),
        *[("source", _describe_source(source)) for source in config.data.sources],
        ("batch", f"{config.data.batch_size} rows a step, mixing {_mixing(config)}"),
        ("rollouts", f"{rollouts}, temperature {config.rollout.temperature:g}"),
        ("loss", f"{config.loss.loss_type}, {config.loss.aggregation} aggregation"),
        ("optimizer", f"AdamW, peak learning rate {config.optimizer.learning_rate:g}"),
        ("seed", str(config.seed)),
        *_machine_facts(machine),
    ]
    _, lengths = history.series("rollout/completion_tokens")
    if len(lengths):
        facts.append(("completion length", f"{lengths.mean():.0f} tokens on average"))
    return f"<h2>Set-up</h2><table>{_fact_rows(facts)}</table>"


def _mixing(config: TrainConfig) -> str:
    mixing = config.data.mixing
    if isinstance(mixing, str):
        return mixing
    return ", ".join(f"{name} {ratio:g}" for name, ratio in mixing.items())


def _describe_source(source: SourceConfig) -> str:
    path = ", ".join(source.path) if isinstance(source.path, list) else source.path
    data = path or f"reasoning-gym {source.reasoning_gym}"
    trains = ", ".join(source.rewards) if source.kind == "rl" else source.objective
    replay = ", replay" if source.is_replay else ""
    return f"{source.name} ({source.kind}{replay}): {data}; objectives: {trains}"


def _machine_facts(machine: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if not machine:
        return
    yield "started", str(machine.get("started", ""))
    gpus = ", ".join(map(str, machine.get("gpus") or [])) or "no GPU"
    yield (
        "machine",
        f"{machine.get('cpu')}, {machine.get('cpu_cores')} cores, {gpus}, {machine.get('system')}",
    )
    versions = machine.get("versions") or {}
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _fact_rows(facts: Iterable[tuple[str, str]]) -> str:
    rows, last = [], None
    for name, value in facts:
        rows.append(
            f"<tr><th>{escape(name if name != last else '')}</th><td>{escape(value)}</td></tr>"
        )
        last = name
    return "".join(rows)


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(float(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _text(value: Any) -> str:
    text = str(value)
    cut = len(text) - _LONGEST_TEXT
    return escape(text[:_LONGEST_TEXT]) + (f"<i> … {cut:,} more characters</i>" if cut > 0 else "")


_STYLE = """
body { margin: 0; background: #f8fafc; color: #1f2937;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { margin: 0; font-size: 28px; } header p { margin: 4px 0 20px; max-width: none; }
h2 { margin: 40px 0 8px; font-size: 20px; } h3 { margin: 16px 0 8px; font-size: 15px; }
p { margin: 4px 0 12px; max-width: 75ch; color: #475569; }
small { color: #6b7280; font-weight: normal; font-size: 12px; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); }
.tile { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; padding: 12px 16px; }
.tile span, .tile small { display: block; color: #6b7280; font-size: 13px; }
.tile b { display: block; font-size: 24px; line-height: 1.35; }
.plots { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); }
figure { margin: 0; background: #fff; border: 1px solid #e2e8f0; border-radius: 10px;
  padding: 12px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: #6b7280; font-size: 13px; padding: 6px 4px 0; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e2e8f0;
  border-radius: 10px; overflow: hidden; }
th, td { padding: 6px 14px; text-align: left; vertical-align: top; font-weight: normal; }
tbody th { font-weight: 600; white-space: nowrap; }
thead th { background: #f1f5f9; color: #475569; }
tr + tr > * { border-top: 1px solid #f1f5f9; }
tr + tr.start > * { border-top: 1px solid #cbd5e1; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.better { color: #047857; font-weight: 600; }
.worse { color: #b91c1c; font-weight: 600; background: #fef2f2; }
.rollouts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); }
article { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; padding: 12px 16px;
  min-width: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; max-height: 260px;
  overflow-y: auto; font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
pre.prompt { color: #475569; border-left: 3px solid #e2e8f0; padding-left: 10px; }
.meta { color: #6b7280; font-size: 13px; overflow-wrap: anywhere; }
.chip { display: inline-block; background: #eff6ff; border-radius: 999px; padding: 1px 10px;
  margin: 6px 6px 0 0; font-size: 13px; }
@media (max-width: 520px) { .plots, .rollouts { grid-template-columns: 1fr; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · recap-fast</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
