"""What came out of the forgetting experiment: held-out abilities, as JSON and as a table.

Shapes: R runs (one per seed) of a method, E evaluations of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap_fast.config import TrainConfig
from recap_fast.report.history import RunHistory
from recap_fast.report.metrics import MACHINE_FILE, read_metrics
from recap_fast.reproduce.experiment import METHODS, ExperimentSettings
from recap_fast.reproduce.grid import Cell

RESULTS_FILE, TABLE_FILE = "results.json", "results.md"


@dataclass(frozen=True, slots=True)
class Score:
    """One held-out score: its key in a run's metrics, and how it is read."""

    label: str
    key: str
    higher_is_better: bool = True


ABILITIES: dict[str, Score] = {
    "reasoning": Score("Reasoning accuracy", "eval/range/accuracy"),
    "grounding": Score("Grounding IoU", "eval/locate/iou"),
    "ocr": Score("OCR token accuracy", "eval/transcribe/token_accuracy"),
}
"""One score for each of the three abilities."""

_OTHER_SCORES = {
    "thinking_format": Score("Thinking format", "eval/range/thinking_format"),
    "answer_format": Score("Answer format", "eval/locate/answer_format"),
    "ocr_loss": Score("OCR loss", "eval/transcribe/loss", higher_is_better=False),
}
SCORES = ABILITIES | _OTHER_SCORES


@dataclass(frozen=True, slots=True)
class MethodRuns:
    """The finished runs of one method, by seed, and the configuration of the first of them."""

    name: str
    label: str
    config: TrainConfig
    histories: dict[int, RunHistory]

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [E], and the values [R, E] of a metric at the steps that all runs have it for."""
        series = [dict(zip(*h.series(key), strict=True)) for h in self.histories.values()]
        steps = sorted(set.intersection(*map(set, series))) if series else []
        return np.array(steps), np.array([[values[step] for step in steps] for values in series])

    def ends(self, score: Score) -> np.ndarray:
        """[R] values after the last step."""
        return self.curve(score.key)[1][:, -1]

    def starts(self, score: Score) -> np.ndarray:
        """[R] values before the first step: the base's."""
        return self.curve(score.key)[1][:, 0]


def collect(cells: Sequence[Cell]) -> list[MethodRuns]:
    """The finished runs of a grid by method, in METHODS' order."""
    found: list[MethodRuns] = []
    for name, method in METHODS.items():
        mine = {cell.seed: cell for cell in cells if cell.method == name and cell.is_finished}
        if mine:
            histories = {seed: RunHistory(read_metrics(c.folder)) for seed, c in mine.items()}
            config = next(iter(mine.values())).config
            found.append(MethodRuns(name, method.label, config, histories))
    return found


def write_results(runs: Sequence[MethodRuns], settings: ExperimentSettings, output: Path) -> str:
    """Writes results.json and results.md, and returns the table."""
    content = {
        "settings": asdict(settings),
        "machine": _machine(runs),
        "before": {name: _spread(_base_scores(runs, score)) for name, score in SCORES.items()},
        "methods": {method.name: _method_content(method) for method in runs},
    }
    (output / RESULTS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = render_table(runs)
    (output / TABLE_FILE).write_text(table, encoding="utf-8")
    return table


def _method_content(method: MethodRuns) -> dict[str, Any]:
    return {
        "seeds": list(method.histories),
        "after": {name: _spread(method.ends(score)) for name, score in SCORES.items()},
        "evaluations": {
            name: {
                "steps": method.curve(score.key)[0].tolist(),
                "values": method.curve(score.key)[1].tolist(),
            }
            for name, score in SCORES.items()
        },
    }


def _machine(runs: Sequence[MethodRuns]) -> Any:
    path = Path(runs[0].config.run) / MACHINE_FILE
    return json.loads(path.read_text(encoding="utf-8"))


def _base_scores(runs: Sequence[MethodRuns], score: Score) -> np.ndarray:
    return np.concatenate([method.starts(score) for method in runs])


def _spread(values: np.ndarray) -> Mapping[str, float]:
    """Mean and, over two or more values, the unbiased standard deviation."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": deviation}


def render_table(runs: Sequence[MethodRuns]) -> str:
    """A Markdown table: one row a method, mean and standard deviation over its seeds."""
    lines = [
        "| | " + " | ".join(score.label for score in SCORES.values()) + " | seeds |",
        "| --- |" + " --- |" * (len(SCORES) + 1),
    ]
    before = [f"{np.mean(_base_scores(runs, score)):.3f}" for score in SCORES.values()]
    lines.append("| before | " + " | ".join(before) + " | |")
    for method in runs:
        cells = [_cell(method.ends(score)) for score in SCORES.values()]
        lines.append(f"| {method.label} | " + " | ".join(cells) + f" | {len(method.histories)} |")
    return "\n".join(lines) + "\n"


def _cell(values: np.ndarray) -> str:
    spread = _spread(values)
    return f"{spread['mean']:.3f}" + (f" ± {spread['std']:.3f}" if len(values) > 1 else "")
