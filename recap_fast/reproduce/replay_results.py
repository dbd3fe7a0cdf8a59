"""What came out where replay is scarce: abilities by share, what keeps grounding, cost, the claim.

Shapes: S seeds, H shares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recap_fast.config import TrainConfig
from recap_fast.report.history import RunHistory
from recap_fast.report.metrics import MACHINE_FILE, read_metrics
from recap_fast.reproduce.experiment import ExperimentError
from recap_fast.reproduce.intervals import CONFIDENCE, Interval, interval, markdown
from recap_fast.reproduce.replay import (
    CLAIM_SEEDS,
    CLAIM_SHARES,
    IMAGES,
    METHODS,
    NEW_METHODS,
    NO_REPLAY,
    Place,
    ReplayCell,
    ReplaySettings,
)
from recap_fast.reproduce.results import ABILITIES, RESULTS_FILE, TABLE_FILE, Score

CALLS_FILE = "calls.jsonl"
"""A line for each call of the command: its settings, and the runs that it had to do."""
KEPT = 0.02
"""IoU below the base's that counts as kept."""
LOSS_RATIO, REASONING_COST = 0.5, 0.01
"""Of the claim: the most that a new method may lose, in what Uniform loses and in accuracy."""
_WHICH = ("methods", "shares", "seeds")
"""Settings that say which runs there are, and not how one goes."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run."""

    scores: dict[str, float]
    """By ability, on held-out rows after the last step."""
    replayed: float
    """Percent of the run's rows that were replayed."""
    seconds: float
    """Median time of a step."""
    call: str | None
    """When the call of the command began that finished it; None: unknown."""
    base: dict[str, float]
    """Scores of the base that it started from, by ability: machines train bases apart."""
    course: dict[str, float] = field(default_factory=dict)
    """What happened on the way (`_course`); empty of runs of which that was not kept."""

    def loss(self, ability: str) -> float:
        return self.base[ability] - self.scores[ability]


@dataclass(frozen=True, slots=True)
class Trial:
    """A new method at one share of the claim. Intervals are over the S seeds."""

    method: str
    share: int
    excess: Interval
    """loss(new) - LOSS_RATIO * loss(Uniform), corrected for the number of new methods."""
    reasoning_cost: Interval
    """reasoning(Uniform) - reasoning(new), of which the mean counts; 95 %."""

    @property
    def passes(self) -> bool:
        return self.excess.high < 0 and self.reasoning_cost.mean <= REASONING_COST


@dataclass(frozen=True, slots=True)
class Claim:
    """The verdict, and what it rests on."""

    trials: list[Trial]
    missing: int
    """Comparisons, of a new method with Uniform at one share and seed, that lack a run."""

    @property
    def winners(self) -> list[str]:
        """Methods that pass at every share of the claim, once all runs are there."""
        if self.missing:
            return []
        passing = {(trial.method, trial.share) for trial in self.trials if trial.passes}
        return [m for m in NEW_METHODS if all((m, share) in passing for share in CLAIM_SHARES)]

    @property
    def verdict(self) -> str:
        if self.missing:
            return "NOT YET"
        return "CONFIRMED" if self.winners else "REFUTED"


class Outcomes:
    """The finished runs of a grid. They may have started from several bases, as machines train them
    apart: what is compared with Uniform is compared with Uniform from the same base.

    Args:
        runs: by method, share and seed.
        controls: Uniform's runs from further bases, each with its share and seed.
    """

    def __init__(
        self,
        runs: Mapping[Place, Outcome],
        settings: ReplaySettings,
        controls: Sequence[tuple[Place, Outcome]] = (),
    ) -> None:
        self.runs, self.settings, self.controls = dict(runs), settings, list(controls)

    @property
    def everything(self) -> list[Outcome]:
        return [*self.runs.values(), *(run for _, run in self.controls)]

    @property
    def bases(self) -> list[dict[str, float]]:
        """Scores of the bases, by ability, in the order of their grounding."""
        found: list[dict[str, float]] = []
        for run in self.everything:
            if run.base not in found:
                found.append(run.base)
        return sorted(found, key=lambda base: base["grounding"])

    def at(self, method: str, share: int) -> list[Outcome]:
        """The S runs of a method at a share, controls too."""
        found = [self.runs[method, share, seed] for seed in self.seeds(method, share)]
        return found + [run for place, run in self.controls if place[:2] == (method, share)]

    def uniform(self, share: int, seed: int, base: Mapping[str, float]) -> Outcome | None:
        """Uniform's run from that base."""
        place = ("uniform", share, seed)
        candidates = [self.runs.get(place), *(run for key, run in self.controls if key == place)]
        return next((run for run in candidates if run is not None and run.base == base), None)

    @property
    def methods(self) -> list[str]:
        """Those with a run, in METHODS' order."""
        return [name for name in METHODS if any(key[0] == name for key in self.runs)]

    def shares(self, method: str) -> list[int]:
        """Those that the method has a run at, in ascending order."""
        return sorted({share for name, share, _ in self.runs if name == method})

    def seeds(self, method: str, share: int) -> list[int]:
        return sorted(seed for m, s, seed in self.runs if (m, s) == (method, share))

    def losses(self, method: str, share: int, ability: str) -> np.ndarray:
        """[S] of the base's scores less those after the last step."""
        return np.array([run.loss(ability) for run in self.at(method, share)])

    def replayed(self, method: str, share: int) -> float:
        """Percent of the rows that were replayed, mean of the seeds; `share` unless adaptive."""
        return float(np.mean([run.replayed for run in self.at(method, share)]))

    def uniform_loss(self, other: Outcome, share: int, seed: int, ability: str) -> float | None:
        """What Uniform lost, from the same base, at the rows that another run of `share` percent
        has replayed: where these are others (adaptive shares), between the measured shares on a
        straight line over their logarithms. None: a run for it is missing."""
        if other.replayed == share:
            run = self.uniform(share, seed, other.base)
            return run.loss(ability) if run else None
        shares = sorted(self.settings.shares)
        runs = [self.uniform(one, seed, other.base) for one in shares]
        losses = [run.loss(ability) for run in runs if run]
        if len(losses) < len(shares):
            return None
        return float(np.interp(math.log(other.replayed), np.log(shares), losses))

    def against_uniform(
        self, method: str, share: int, ability: str, ratio: float = 1.0
    ) -> np.ndarray:
        """[S] what the method lost of an ability less `ratio` times what Uniform lost, by seed."""
        found = []
        for seed in self.seeds(method, share):
            run = self.runs[method, share, seed]
            uniform = self.uniform_loss(run, share, seed, ability)
            if uniform is not None:
                found.append(run.loss(ability) - ratio * uniform)
        return np.array(found)


def collect(
    cells: Sequence[ReplayCell],
    base: Mapping[str, float],
    settings: ReplaySettings,
    output: Path,
    earlier: Outcomes,
) -> Outcomes:
    """The finished runs of a grid.

    Args:
        base: the base's scores by ability.
        output: folder of CALLS_FILE.
        earlier: runs that were finished elsewhere.
    """
    calls = _read_calls(output)
    runs, controls = dict(earlier.runs), list(earlier.controls)
    for cell in cells:
        if is_missing(cell, base, earlier) and cell.is_finished:
            outcome = _outcome(cell, calls, dict(base))
            if cell.place in runs:
                controls.append((cell.place, outcome))
            else:
                runs[cell.place] = outcome
    return Outcomes(runs, settings, controls)


def is_missing(cell: ReplayCell, base: Mapping[str, float], earlier: Outcomes) -> bool:
    """Whether a run was not done elsewhere. Uniform's are done for each base: all others from it
    are compared with them.

    Args:
        base: scores of the base that runs start from here, by ability.
    """
    if cell.method == "uniform":
        return earlier.uniform(cell.share, cell.seed, base) is None
    return cell.place not in earlier.runs


def _outcome(
    cell: ReplayCell, calls: Sequence[Mapping[str, Any]], base: dict[str, float]
) -> Outcome:
    history = RunHistory(read_metrics(cell.folder))
    own = [call["started"] for call in calls if cell.key in call["runs"]]
    return Outcome(
        scores={name: _last(history, score) for name, score in ABILITIES.items()},
        replayed=_replayed(history, cell.share),
        seconds=float(np.median(history.series("time/total")[1])),
        call=own[-1] if own else None,
        base=base,
        course=_course(history, cell.config),
    )


def _course(history: RunHistory, config: TrainConfig) -> dict[str, float]:
    """Over a run's steps: the gradient's norm that one in ten exceeds, the share of them that was
    clipped, each objective's mean weight before balance and the factor that balances it, and the
    share of steps in which retention gave it weight."""
    norms = history.series("grad_norm")[1]
    found = {}
    if len(norms):
        found["grad_norm/90%"] = float(np.quantile(norms, 0.9))
        found["clipped"] = float(np.mean(norms > config.optimizer.max_grad_norm))
    for objective in config.objectives:
        before = history.series(f"unbalanced_weight/{objective.name}")[1]
        weight = before if len(before) else history.series(f"weight/{objective.name}")[1]
        series = {
            "weight": weight,
            "balance": history.series(f"balance/{objective.name}")[1],
            "retained": history.series(f"retention/{objective.name}")[1] > 0,
        }
        for name, values in series.items():
            if len(values):
                found[f"{name}/{objective.name}"] = float(np.mean(values))
    return {name: round(value, 4) for name, value in found.items()}


def _replayed(history: RunHistory, share: int) -> float:
    """Percent of the rows that were replayed: adaptive shares are recorded, each step those of the
    rows to come."""
    reasoning = history.series(f"mixing/{IMAGES.reasoning}")[1]
    if not len(reasoning):
        return float(share)
    return float(np.mean([share, *100 * (1 - reasoning[:-1])]))


def _last(history: RunHistory, score: Score) -> float:
    return float(history.series(score.key)[1][-1])


def _read_calls(output: Path) -> list[dict[str, Any]]:
    path = output / CALLS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def share_kept(outcomes: Outcomes, method: str) -> Interval | None:
    """The percentage of replay from which on at most KEPT of the base's grounding is lost.

    The mean loss over seeds is drawn through the measured shares on straight lines over their
    logarithms; the interval's ends are where those of the mean's interval cross. -inf: kept at the
    lowest share; inf: not at the highest. None: fewer than two shares are measured.
    """
    shares = outcomes.shares(method)
    if len(shares) < 2:
        return None
    losses = [interval(outcomes.losses(method, share, "grounding")) for share in shares]
    replayed = np.array([outcomes.replayed(method, share) for share in shares])
    return Interval(
        _last_crossing(replayed, np.array([loss.mean for loss in losses]), KEPT),
        _last_crossing(replayed, np.array([loss.low for loss in losses]), KEPT),
        _last_crossing(replayed, np.array([loss.high for loss in losses]), KEPT),
    )


def _last_crossing(shares: np.ndarray, losses: np.ndarray, wanted: float) -> float:
    """The share [H] from which on the line through the losses [H] stays at or below `wanted`."""
    if np.isnan(losses).any():
        return math.nan
    above = np.flatnonzero(losses > wanted)
    if not len(above):
        return -math.inf
    at = above[-1]
    if at == len(shares) - 1:
        return math.inf
    part = (wanted - losses[at]) / (losses[at + 1] - losses[at])
    low, high = np.log(shares[at : at + 2])
    return float(np.exp(low + part * (high - low)))


def cost(outcomes: Outcomes, method: str) -> Interval | None:
    """Time of a step over Uniform's, of runs with the same share and seed that the same call of the
    command has finished. None: there are none."""
    ratios = []
    for (name, share, seed), run in outcomes.runs.items():
        uniform = outcomes.uniform(share, seed, run.base)
        if name == method and uniform and run.call is not None and run.call == uniform.call:
            ratios.append(run.seconds / uniform.seconds)
    return interval(np.array(ratios)) if ratios else None


def judge_claim(outcomes: Outcomes) -> Claim:
    """The claim of docs/recap.md. A trial is there once a seed of it is."""
    level = 1 - (1 - CONFIDENCE) / len(NEW_METHODS)
    trials, compared = [], 0
    for method in NEW_METHODS:
        for share in CLAIM_SHARES:
            excess = outcomes.against_uniform(method, share, "grounding", LOSS_RATIO)
            reasoning = outcomes.against_uniform(method, share, "reasoning")
            compared += len(excess)
            if len(excess):
                trials.append(Trial(method, share, interval(excess, level), interval(reasoning)))
    planned = len(NEW_METHODS) * len(CLAIM_SHARES) * len(CLAIM_SEEDS)
    return Claim(trials, planned - compared)


def write_results(
    outcomes: Outcomes,
    cells: Sequence[ReplayCell],
    settings: ReplaySettings,
    output: Path,
    earlier: Mapping[str, Any] | None,
) -> str:
    """Writes results.json and results.md, and returns the tables.

    Args:
        earlier: content of the results.json that others of the runs come from.
    """
    before = earlier or {"machines": [], "calls": []}
    content = {
        "settings": _settings_content(settings),
        "machines": [*before["machines"], *_machines(cells)],
        "calls": [*before["calls"], *_read_calls(output)],
        "methods": {name: asdict(METHODS[name]) for name in outcomes.methods},
        "runs": [
            {"method": method, "share": share, "seed": seed, **asdict(outcome)}
            for (method, share, seed), outcome in [
                *sorted(outcomes.runs.items(), key=lambda item: item[0]),
                *sorted(outcomes.controls, key=lambda item: item[0]),
            ]
        ],
        "share_kept": {name: _dict(share_kept(outcomes, name)) for name in outcomes.methods},
        "cost": {name: _dict(cost(outcomes, name)) for name in outcomes.methods},
        "claim": _claim_content(judge_claim(outcomes)),
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    (output / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
    tables = render_tables(outcomes)
    (output / TABLE_FILE).write_text(tables, encoding="utf-8")
    return tables


def read_earlier(path: Path, settings: ReplaySettings) -> tuple[dict[str, Any], Outcomes]:
    """A results.json of another folder, and its runs.

    Raises:
        ExperimentError: it is not there, is none, or is of other settings.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        runs: dict[Place, Outcome] = {}
        controls: list[tuple[Place, Outcome]] = []
        for entry in content["runs"]:
            place = (entry.pop("method"), entry.pop("share"), entry.pop("seed"))
            if place in runs:  # Uniform's, from another base
                controls.append((place, Outcome(**entry)))
            else:
                runs[place] = Outcome(**entry)
        given = content["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{path}: not the results of this experiment: {error!r}") from error
    wanted = _settings_content(settings)
    for name in sorted({*wanted, *given}):
        if given.get(name) != wanted.get(name):
            raise ExperimentError(
                f"{path} is of another experiment: its {name} is {given.get(name)}, and here it is "
                f"{wanted.get(name)}"
            )
    return content, Outcomes(runs, settings, controls)


def _settings_content(settings: ReplaySettings) -> dict[str, Any]:
    """As JSON gives it back; without which runs there are."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return {name: value for name, value in found.items() if name not in _WHICH}


def _dict(found: Interval | None) -> dict[str, float | str] | None:
    """JSON has no numbers for what is not finite."""
    if found is None:
        return None
    return {k: v if math.isfinite(v) else str(v) for k, v in asdict(found).items()}


def _claim_content(claim: Claim) -> dict[str, Any]:
    return {
        "verdict": claim.verdict,
        "winners": claim.winners,
        "missing": claim.missing,
        "trials": [
            {
                "method": trial.method,
                "share": trial.share,
                "excess": _dict(trial.excess),
                "reasoning_cost": _dict(trial.reasoning_cost),
                "passes": trial.passes,
            }
            for trial in claim.trials
        ],
    }


def _machines(cells: Sequence[ReplayCell]) -> list[dict[str, Any]]:
    """The machines of the finished runs, each with the start of its first and of its last run."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        path = cell.folder / MACHINE_FILE
        if cell.is_finished and path.exists():
            machine = json.loads(path.read_text(encoding="utf-8"))
            started = machine.pop("started")
            key = json.dumps(machine, sort_keys=True)
            entry = found.setdefault(key, machine | {"first": started, "last": started})
            entry["first"] = min(entry["first"], started)
            entry["last"] = max(entry["last"], started)
    return list(found.values())


def render_tables(outcomes: Outcomes) -> str:
    """Markdown: what became of each ability by method and share, what it takes to keep grounding,
    how runs went, the claim. With plus-minus or in brackets stand intervals over seeds, 95 % where
    no other is named."""
    parts = [_base_table(outcomes)]
    parts += [_ability_table(outcomes, ability) for ability in ABILITIES]
    parts += [_summary_table(outcomes), _course_table(outcomes), _claim_table(outcomes)]
    return "\n".join(part for part in parts if part)


def _base_table(outcomes: Outcomes) -> str:
    head = ["base", *(score.label for score in ABILITIES.values()), "runs from it"]
    rows = (
        [str(number), *(f"{base[name]:.3f}" for name in ABILITIES),
         str(sum(run.base == base for run in outcomes.everything))]
        for number, base in enumerate(outcomes.bases, 1)
    )  # fmt: skip
    return markdown(head, rows)


def _ability_table(outcomes: Outcomes, ability: str) -> str:
    shares = sorted({share for _, share, _ in outcomes.runs if share})
    head = [f"{ABILITIES[ability].label}, change", *(f"{s} %" for s in shares), "runs"]

    def rows() -> Iterator[list[str]]:
        for method in outcomes.methods:
            alone = method == NO_REPLAY
            found = [-outcomes.losses(method, 0 if alone else share, ability) for share in shares]
            runs = sum(key[0] == method for key in outcomes.runs)
            runs += len(outcomes.controls) if method == "uniform" else 0
            cells = [interval(values).plus_minus() if len(values) else "" for values in found]
            yield [METHODS[method].label, *cells, str(runs)]

    return markdown(head, rows())


def _summary_table(outcomes: Outcomes) -> str:
    shares = sorted({share for _, share, _ in outcomes.runs if share})
    differences = [f"grounding less Uniform's, {share} %" for share in shares]
    head = ["", f"share that keeps grounding within {KEPT}", *differences, "step time / Uniform's"]

    def rows() -> Iterator[list[str]]:
        for method in outcomes.methods:
            lost = [outcomes.against_uniform(method, share, "grounding") for share in shares]
            if method == "uniform":
                lost = [np.array([])] * len(lost)
            ratio = cost(outcomes, method)
            yield [
                METHODS[method].label,
                _shown_share(share_kept(outcomes, method), outcomes.shares(method)),
                *(interval(-values).ends() if len(values) else "" for values in lost),
                "" if ratio is None else ratio.ends(digits=2),
            ]

    return markdown(head, rows())


def _course_table(outcomes: Outcomes) -> str:
    """Empty where no run's course was kept."""
    keys = list(dict.fromkeys(key for run in outcomes.everything for key in run.course))

    def rows() -> Iterator[list[str]]:
        for method in outcomes.methods:
            runs = [run for share in outcomes.shares(method) for run in outcomes.at(method, share)]
            kept = [run.course for run in runs if run.course]
            found = [[course[key] for course in kept if key in course] for key in keys]
            if kept:
                shown = [f"{np.mean(values):.2f}" if values else "" for values in found]
                yield [METHODS[method].label, str(len(kept)), *shown]

    return markdown(["on the way", "runs", *keys], rows()) if keys else ""


def _claim_table(outcomes: Outcomes) -> str:
    claim = judge_claim(outcomes)
    level = 100 * (1 - (1 - CONFIDENCE) / len(NEW_METHODS))
    head = [
        "new method", "replay", f"loss - {LOSS_RATIO} x Uniform's ({level:.0f} %)",
        "reasoning lost against Uniform", "passes", "rows replayed",
    ]  # fmt: skip

    def rows() -> Iterator[list[str]]:
        for trial in claim.trials:
            yield [
                METHODS[trial.method].label,
                f"{trial.share} %",
                trial.excess.ends(),
                trial.reasoning_cost.ends(),
                "" if claim.missing else "yes" if trial.passes else "no",
                f"{outcomes.replayed(trial.method, trial.share):.1f} %",
            ]

    by = f" by {', '.join(METHODS[name].label for name in claim.winners)}" if claim.winners else ""
    why = f": {claim.missing} comparisons are missing" if claim.missing else by
    return markdown(head, rows()) + f"\nThe claim: {claim.verdict}{why}.\n"


def _shown_share(found: Interval | None, shares: Sequence[int]) -> str:
    if found is None:
        return ""

    def shown(value: float) -> str:
        if math.isinf(value):
            return f"over {shares[-1]} %" if value > 0 else f"under {shares[0]} %"
        return f"{value:.0f} %"

    if math.isnan(found.low):
        return shown(found.mean)
    return f"{shown(found.mean)} ({shown(found.low)} to {shown(found.high)})"
