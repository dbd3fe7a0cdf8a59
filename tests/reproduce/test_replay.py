"""The experiment of scarce replay: its configurations, their order, its statistics, its verdict."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recap_fast.report.history import RunHistory
from recap_fast.reproduce import replay_report
from recap_fast.reproduce.experiment import ExperimentError
from recap_fast.reproduce.grid import GridError
from recap_fast.reproduce.replay import (
    CLAIM_SEEDS,
    CLAIM_SHARES,
    FULL,
    METHODS,
    NEW_METHODS,
    NO_REPLAY,
    QUICK,
    Sources,
    choose,
    grid,
    method_changes,
)
from recap_fast.reproduce.replay_figure import _COLUMNS, draw_replay
from recap_fast.reproduce.replay_results import (
    Outcome,
    Outcomes,
    _course,
    _replayed,
    cost,
    judge_claim,
    read_earlier,
    render_tables,
    share_kept,
)
from recap_fast.reweighting import make_reweighter

KNOWN = ("reasoning-only", "uniform", "recap", "dwa", "saw")
FEW = replace(QUICK, methods=("reasoning-only", "uniform", "recap"))
BASE = {"reasoning": 0.3, "grounding": 0.65, "ocr": 0.98}


def outcome(
    grounding=0.5, reasoning=0.9, replayed=10.0, seconds=1.0, call: str | None = "today", base=BASE
):
    scores = {"reasoning": reasoning, "grounding": grounding, "ocr": 0.97}
    return Outcome(scores, replayed, seconds, call, base)


def full_outcomes(losses: dict[str, float], reasoning: dict[str, float] | None = None) -> Outcomes:
    """Every run of the grid; grounding is the base's less the method's loss and a seed's noise of
    +- 0.01, the same for all methods."""
    runs = {}
    for method in METHODS:
        shares = CLAIM_SHARES if METHODS[method].is_ablation else FULL.shares
        for share in (0,) if method == NO_REPLAY else shares:
            for seed in FULL.seeds:
                noise = 0.005 * (seed - 2)
                loss = losses.get(method, losses["uniform"]) * math.sqrt(10 / max(share, 1))
                runs[method, share, seed] = outcome(
                    BASE["grounding"] - loss + noise,
                    0.9 + noise - (reasoning or {}).get(method, 0.0),
                    replayed=float(share),
                )
    return Outcomes(runs, FULL)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_configuration_with_its_share_of_replay(tmp_path, method) -> None:
    settings = replace(FULL, methods=(method,), shares=(20,), seeds=(3,))
    (cell,) = grid(settings, tmp_path / "base", tmp_path)
    shares = {"range": 0.8, "locate": 0.1, "transcribe": 0.1}
    config = cell.config
    if method == NO_REPLAY:
        shares = {"range": 1.0, "locate": 0.0, "transcribe": 0.0}
    if METHODS[method].is_adaptive:
        assert config.data.mixing == "adaptive"
        assert config.data.adaptive.shares == shares
    else:
        assert config.data.mixing == shares
    review = config.model_dump()["data"].get("review")
    assert bool(review) == METHODS[method].has_review
    assert (config.seed, config.training.steps) == (3, 200)
    assert config.run == str(tmp_path / method / f"replay-{cell.share}" / "seed-3")
    assert not config.evaluation.before
    if config.reweighting.method == "static":
        assert config.objectives[2].name == "iou"  # which the weights are given by place
    elif config.reweighting.method != "uniform":
        assert config.reweighting.parameters["window"] == 10
    make_reweighter(config.reweighting.method, 5, **config.reweighting.parameters)


def test_the_grid_has_every_place_once_and_the_claim_first(tmp_path) -> None:
    settings = replace(FULL, methods=KNOWN)
    cells = grid(settings, tmp_path / "base", tmp_path)
    keys = [cell.key for cell in cells]
    assert len(keys) == len(set(keys)) == 4 * 5 * 5 + 5
    assert len({cell.folder for cell in cells}) == len(cells)
    assert keys[:5] == [
        "uniform/replay-10/seed-0", "recap/replay-10/seed-0",
        "uniform/replay-20/seed-0", "recap/replay-20/seed-0",
        "uniform/replay-10/seed-1",
    ]  # fmt: skip
    # Uniform's other shares, which adaptive ones are compared with, are a part of the test.
    assert keys[20:24] == [f"uniform/replay-{share}/seed-0" for share in (5, 33, 67)] + [
        "uniform/replay-5/seed-1"
    ]
    assert keys[35] == "reasoning-only/replay-0/seed-0"
    assert {cell.share for cell in cells[60:]} == {5, 33, 67}


def test_what_takes_methods_apart_runs_at_the_shares_of_the_claim(tmp_path) -> None:
    cells = grid(FULL, tmp_path / "base", tmp_path)
    assert {cell.share for cell in cells if cell.method == "unclipped"} == set(CLAIM_SHARES)
    assert len(cells) == 5 + 11 * 5 * 5 + 2 * 2 * 5


def test_a_part_is_chosen_and_what_is_not_there_is_named(tmp_path) -> None:
    cells = grid(replace(FULL, methods=KNOWN), tmp_path / "base", tmp_path)
    assert choose(cells, None, None, None) == cells
    part = choose(cells, ["recap", "reasoning-only"], [20, 5], [1, 4])
    assert {(cell.method, cell.share, cell.seed) for cell in part} == {
        (method, share, seed)
        for seed in (1, 4)
        for method, share in (("recap", 20), ("recap", 5), ("reasoning-only", 0))
    }
    for given, message in (
        ((["recup"], None, None), "--methods: recup is not in the grid, which has uniform, recap"),
        ((None, [7], None), "--shares: 7 is not in the grid, which has 10, 20, 5, 33, 67"),
        ((None, None, [5]), "--seeds: 5 is not in the grid, which has 0, 1, 2, 3, 4"),
    ):
        with pytest.raises(ExperimentError, match=message):
            choose(cells, *given)


def test_shares_are_of_all_rows_and_equal_among_what_is_replayed() -> None:
    sources = Sources("sums", ("products", "instructions"), ["accuracy"])
    changes = method_changes("uniform", 5, sources)
    assert changes["data"] == {"mixing": {"sums": 0.95, "products": 0.025, "instructions": 0.025}}


@pytest.mark.parametrize(
    ("new", "reasoning", "verdict"),
    [
        (0.05, 0.0, "CONFIRMED"),  # a quarter of Uniform's 0.2
        (0.05, 0.009, "CONFIRMED"),
        (0.05, 0.02, "REFUTED"),  # paid for with reasoning
        (0.1, 0.0, "REFUTED"),  # half of it, which the interval has to leave behind
        (0.2, 0.0, "REFUTED"),
    ],
)
def test_the_verdict_follows_the_stated_test(new, reasoning, verdict) -> None:
    claim = judge_claim(full_outcomes({"uniform": 0.2, "together": new}, {"together": reasoning}))
    assert (claim.verdict, claim.missing) == (verdict, 0)
    assert claim.winners == (["together"] if verdict == "CONFIRMED" else [])
    assert len(claim.trials) == len(NEW_METHODS) * len(CLAIM_SHARES)


def test_the_interval_is_paired_and_corrected_for_five_methods() -> None:
    claim = judge_claim(full_outcomes({"uniform": 0.2, "together": 0.05}))
    trial = next(t for t in claim.trials if (t.method, t.share) == ("together", 10))
    noise = [0.005 * (seed - 2) for seed in CLAIM_SEEDS]
    expected = [0.05 - one - 0.5 * (0.2 - one) for one in noise]
    half = 4.6040949 * np.std(expected, ddof=1) / math.sqrt(5)
    assert np.isclose(trial.excess.mean, -0.05)
    assert np.isclose(trial.excess.high, -0.05 + half)


def test_a_method_has_to_pass_at_both_shares() -> None:
    outcomes = full_outcomes({"uniform": 0.2, "together": 0.05})
    for seed in CLAIM_SEEDS:
        outcomes.runs["together", 20, seed] = outcomes.runs["uniform", 20, seed]
    claim = judge_claim(outcomes)
    assert (claim.verdict, claim.winners) == ("REFUTED", [])
    assert sum(trial.passes for trial in claim.trials) == 1


@pytest.mark.parametrize("gone", [("together", 10, 4), ("review", 20, 0), ("uniform", 10, 2)])
def test_no_verdict_before_the_last_run(gone) -> None:
    outcomes = full_outcomes({"uniform": 0.2, "together": 0.05})
    del outcomes.runs[gone]
    claim = judge_claim(outcomes)
    assert (claim.verdict, claim.winners) == ("NOT YET", [])
    assert claim.missing == (len(NEW_METHODS) if gone[0] == "uniform" else 1)
    assert f"The claim: NOT YET: {claim.missing} comparisons are missing." in render_tables(
        outcomes
    )


def test_more_replay_than_the_share_is_compared_with_uniform_at_as_much() -> None:
    outcomes = full_outcomes({"uniform": 0.2})
    losses = [outcomes.runs["uniform", s, 2].loss("grounding") for s in FULL.shares]
    # Halfway between 10 and 20 % in the logarithm.
    expected = (losses[1] + losses[2]) / 2
    more = outcome(replayed=math.sqrt(200))
    found = outcomes.uniform_loss(more, 10, 2, "grounding")
    assert found is not None
    assert np.isclose(found, expected)
    assert outcomes.uniform_loss(outcome(), 10, 2, "grounding") == losses[1]
    del outcomes.runs["uniform", 33, 2]
    assert outcomes.uniform_loss(more, 10, 2, "grounding") is None
    assert outcomes.uniform_loss(outcome(), 10, 2, "grounding") == losses[1]


def test_what_is_compared_started_from_the_same_base() -> None:
    """Uniform loses 0.1 from one base and 0.3 from the other, and RECAP 0.1 and 0.2."""
    other = {**BASE, "grounding": 0.75}
    runs = {
        ("uniform", 10, 0): outcome(0.55),
        ("recap", 10, 0): outcome(0.55),
        ("recap", 10, 1): outcome(0.55, base=other),
        ("dwa", 10, 0): outcome(0.55, base={**BASE, "grounding": 0.8}),
    }
    alone = Outcomes(runs, FULL)
    assert alone.against_uniform("recap", 10, "grounding").tolist() == pytest.approx([0])
    controls = [(("uniform", 10, 1), outcome(0.45, base=other))]
    outcomes = Outcomes(runs, FULL, controls)
    assert outcomes.against_uniform("recap", 10, "grounding").tolist() == pytest.approx([0, -0.1])
    assert not len(outcomes.against_uniform("dwa", 10, "grounding"))
    assert sorted(outcomes.losses("uniform", 10, "grounding")) == pytest.approx([0.1, 0.3])
    assert [base["grounding"] for base in outcomes.bases] == [0.65, 0.75, 0.8]
    assert "| Uniform | -0.200" in render_tables(outcomes)


def test_the_share_that_keeps_grounding_lies_where_the_mean_crosses() -> None:
    # 0.04 sqrt(10 / share) = 0.02 at 40 %; straight lines in the logarithm are close.
    outcomes = full_outcomes({"uniform": 0.04, "recap": 0.001, "dwa": 0.4})
    found = share_kept(outcomes, "uniform")
    assert found is not None
    assert 38 < found.mean < 43
    assert found.low < found.mean < found.high
    within = share_kept(outcomes, "recap")
    beyond = share_kept(outcomes, "dwa")
    assert within is not None
    assert beyond is not None
    assert (within.mean, beyond.mean) == (-math.inf, math.inf)
    assert share_kept(outcomes, NO_REPLAY) is None
    tables = render_tables(outcomes)
    assert "| under 5 % (under 5 % to under 5 %) |" in tables
    assert "| over 67 % (over 67 % to over 67 %) |" in tables
    summary = [
        line for line in tables.splitlines() if line.startswith(("| Uniform |", "| RECAP |"))
    ]
    assert ") " + 5 * "|  " + "| 1.00" in summary[-2]  # Uniform is not compared with itself
    assert "| 0.039 (0.039 to 0.039) |" in summary[-1]  # 0.04 - 0.001 at 10 %, the same each seed


def test_cost_compares_runs_of_one_call_alone() -> None:
    runs = {
        ("uniform", 10, 0): outcome(seconds=1.0, call="morning"),
        ("uniform", 10, 1): outcome(seconds=2.0, call="noon"),
        ("recap", 10, 0): outcome(seconds=1.1, call="morning"),
        ("recap", 10, 1): outcome(seconds=9.0, call="night"),  # another machine, perhaps
        ("dwa", 10, 1): outcome(seconds=9.0, call=None),
    }
    outcomes = Outcomes(runs, FULL)
    found = cost(outcomes, "recap")
    assert found is not None
    assert np.isclose(found.mean, 1.1)
    assert cost(outcomes, "dwa") is None


def test_rows_of_adaptive_shares_are_counted() -> None:
    rows: list[dict[str, float]] = [
        {"step": 1, "mixing/range": 0.8}, {"step": 2, "mixing/range": 0.6},
    ]  # fmt: skip
    # The first step has the share asked for, the last record is of a step that never comes.
    assert np.isclose(_replayed(RunHistory(rows), 10), (10 + 20) / 2)
    assert _replayed(RunHistory([{"step": 1}]), 10) == 10


def test_the_course_of_a_run_is_kept(tmp_path) -> None:
    (cell,) = grid(
        replace(FULL, methods=("recap-retention",), shares=(20,), seeds=(3,)), tmp_path, tmp_path
    )
    rows = [
        {"step": step, "grad_norm": norm, "weight/iou": 9.0, "unbalanced_weight/iou": weight,
         "balance/iou": 0.25, "retention/iou": retained, "weight/ntp": 2.0}
        for step, norm, weight, retained in [
            (1, 0.5, 1.0, None), (2, 1.5, 2.0, 0.0), (3, None, 1.0, 0.1), (4, 0.5, 1.0, 0.0),
        ]
    ]  # fmt: skip
    found = _course(RunHistory(rows), cell.config)
    assert found == {
        "grad_norm/90%": 1.3, "clipped": 0.3333, "weight/iou": 1.25, "balance/iou": 0.25,
        "retained/iou": 0.3333, "weight/ntp": 2.0,
    }  # fmt: skip
    run = replace(outcome(), course=found)
    tables = render_tables(Outcomes({("recap-retention", 20, 3): run}, FULL))
    assert "| RECAP balanced, retention | 1 | 1.30 | 0.33 | 1.25 | 0.25 | 0.33 | 2.00 |" in tables
    assert "on the way" not in render_tables(Outcomes({("uniform", 20, 3): outcome()}, FULL))


def record(cell) -> None:
    """A finished run of 60 s a step, as the trainer leaves it behind."""
    cell.folder.mkdir(parents=True)
    evaluated = {
        "eval/range/accuracy": 0.9, "eval/locate/iou": 0.5, "eval/transcribe/token_accuracy": 0.9,
    }  # fmt: skip
    steps = cell.config.training.steps
    rows = [{"step": step, "time/total": 60.0} for step in range(1, steps + 1)]
    rows.append({"step": steps, **evaluated})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (cell.folder / "metrics.jsonl").write_text(text)
    machine = {"started": "2026-11-27 12:00:00 +0000", "cpu": "one"}
    (cell.folder / "machine.json").write_text(json.dumps(machine))


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """`run_replay` without training; what it is asked to run is listed."""
    asked: list[str] = []

    def run(cells, jobs, console, *, budget):
        for cell in cells:
            if not cell.is_finished and budget > 0:
                asked.append(cell.key)
                record(cell)

    monkeypatch.setattr(replay_report, "run_grid", run)
    monkeypatch.setattr(replay_report, "ensure_base", lambda *_: tmp_path / "base")
    base = {"eval/range/accuracy": 0.3, "eval/locate/iou": 0.6, "eval/transcribe/token_accuracy": 1}
    monkeypatch.setattr(replay_report, "base_scores", lambda _: base)
    calls = itertools.count()
    monkeypatch.setattr(replay_report, "now", lambda: f"call {next(calls)}")
    return asked


def test_pieces_add_up_and_nothing_runs_twice(tmp_path, recorded) -> None:
    output = tmp_path / "out"
    told = replay_report.run_replay(output, FEW, budget=0)
    assert told.startswith("no run is finished yet")
    assert "10 of the 10 runs are left" in told
    first = replay_report.run_replay(output, FEW, methods=["uniform"], shares=[10])
    assert recorded == ["uniform/replay-10/seed-0", "uniform/replay-10/seed-1"]
    assert "All 2 runs that were asked for are finished." in first
    left = replay_report.run_replay(output, FEW, budget=0)
    assert "8 of the 10 runs are left" in left
    assert "  recap, 20 % replay: 2\n" in left
    replay_report.run_replay(output, FEW)
    assert len(recorded) == len(set(recorded)) == 10
    content = json.loads((output / "results.json").read_text())
    assert len(content["runs"]) == 10
    assert content["claim"]["verdict"] == "NOT YET"
    calls = [len(call["runs"]) for call in content["calls"]]
    assert calls == [10, 2, 8, 8]
    # The last call did what the first and the third had been given no time for.
    assert content["cost"]["recap"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert {run["call"] for run in content["runs"]} == {"call 1", "call 3"}
    assert content["machines"][0]["cpu"] == "one"
    assert (output / "results.md").read_text() in replay_report.run_replay(output, FEW)
    assert (output / "figures" / "replay.png").stat().st_size > 10_000


def test_runs_of_another_machine_are_not_done_again(tmp_path, recorded) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    replay_report.run_replay(there, FEW, shares=[10])
    results = there / "results.json"
    content = json.loads(results.read_text())
    for run in content["runs"]:
        run["base"]["grounding"] = 0.7  # another base, of which each run has lost 0.2
    results.write_text(json.dumps(content))
    del recorded[:]
    told = replay_report.run_replay(here, replace(FEW, seeds=(1, 0)), earlier=results)
    # Uniform's are: what starts from the base of this machine is compared with Uniform from it.
    assert sorted(recorded) == sorted(
        f"{method}/replay-{share}/seed-{seed}"
        for method, share in (("uniform", 10), ("uniform", 20), ("recap", 20))
        for seed in (0, 1)
    )
    assert "All 10 runs that were asked for are finished." in told
    both = json.loads((here / "results.json").read_text())
    assert len(both["runs"]) == 12
    assert [call["started"] for call in both["calls"]] == ["call 0", "call 1"]
    assert len(both["machines"]) == 2
    assert {(run["share"], run["base"]["grounding"]) for run in both["runs"]} == {
        (0, 0.7), (10, 0.7), (10, 0.6), (20, 0.6),
    }  # fmt: skip
    _, outcomes = read_earlier(here / "results.json", FEW)
    losses = {place[1]: run.loss("grounding") for place, run in outcomes.runs.items()}
    assert losses == pytest.approx({0: 0.2, 10: 0.2, 20: 0.1})
    assert [place for place, _ in outcomes.controls] == [("uniform", 10, 0), ("uniform", 10, 1)]
    assert all(run.loss("grounding") == pytest.approx(0.1) for _, run in outcomes.controls)
    # And it goes on from there without doing any of it again, on this machine or the other.
    del recorded[:]
    replay_report.run_replay(tmp_path / "third", FEW, earlier=here / "results.json")
    assert not recorded


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "not the results of this experiment: FileNotFound"),
        (lambda path: path.write_text("[]"), "not the results of this experiment: TypeError"),
        (
            lambda path: path.write_text(path.read_text().replace('"window": 4', '"window": 5')),
            "is of another experiment: its window is 5, and here it is 4",
        ),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, recorded, damage, message) -> None:
    replay_report.run_replay(tmp_path / "there", FEW)
    path = tmp_path / "there" / "results.json"
    damage(path)
    with pytest.raises(ExperimentError, match=message):
        replay_report.run_replay(tmp_path / "here", FEW, earlier=path)


def test_results_are_written_when_a_run_fails(tmp_path, recorded, monkeypatch) -> None:
    def fail(cells, jobs, console, *, budget):
        record(cells[0])
        raise GridError("no luck")

    monkeypatch.setattr(replay_report, "run_grid", fail)
    with pytest.raises(GridError, match="no luck"):
        replay_report.run_replay(tmp_path / "out", FEW)
    assert len(json.loads((tmp_path / "out/results.json").read_text())["runs"]) == 1


def test_the_figure_has_every_method_once(tmp_path: Path) -> None:
    drawn = [method for methods in _COLUMNS.values() for method in methods]
    assert sorted([*drawn, NO_REPLAY, "uniform"]) == sorted(METHODS)
    whole, short = draw_replay(full_outcomes({"uniform": 0.2, "together": 0.05}), tmp_path)
    assert whole.path.stat().st_size > 50_000
    assert short.path.stat().st_size > 20_000
    assert draw_replay(Outcomes({(NO_REPLAY, 0, 0): outcome()}, FULL), tmp_path) == []
