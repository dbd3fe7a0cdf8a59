from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from recap_fast.config import save_config
from recap_fast.report.ahead_plots import _placed
from recap_fast.report.history import RunHistory
from recap_fast.report.metrics import MetricsWriter, read_metrics
from recap_fast.report.page import ReportError, compare_evaluations, write_report
from recap_fast.report.plots import draw_plots, moving_average
from recap_fast.types import RewardTable, UserError
from tests.synthetic_run import make_config, make_rollouts, make_run

FIGURES = {
    "rewards",
    "weights",
    "rates",
    "instabilities",
    "strengths",
    "losses",
    "zero_std",
    "evaluations",
    "time",
    "throughput",
    "mismatch",
    "gradient",
}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags match, and collects the text and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "demo", done=20, total=20, eval_every=5)


def test_a_finished_run(finished: Path) -> None:
    path = write_report(finished)
    assert path == finished / "report.html"
    assert {p.stem for p in (finished / "plots").glob("*.png")} == FIGURES
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.addresses) == len(FIGURES)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert page.tags.isdisjoint({"script", "link", "iframe"})
    assert "@import" not in path.read_text(encoding="utf-8")
    for words in (
        "20 / 20", "finished", "GRPO with RECAP (W = 4, T = 0.5)", "smollm2-135m-instruct",
        "chain_sum (rl): reasoning-gym chain_sum", "facts (sft, replay)", "accuracy/timeout",
        "facts/row_too_long", "Step 1", "Step 20", "20 & 0 make <answer>20</answer>", "torch 2.",
    ):  # fmt: skip
        assert words in page.text, words


def test_shares_and_reviews_are_drawn_where_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=6, total=6)
    rows = read_metrics(run)
    for row in rows[1:]:
        row |= {"mixing/chain_sum": 0.8, "mixing/facts": 0.2, "review/chain_sum": 0.0}
    rows[-1] |= {"review/chain_sum": 2.0, "review_solved/chain_sum": 0.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(run)
    drawn = {path.stem for path in (run / "plots").glob("*.png")}
    assert {"shares", "reviews"} <= drawn


def test_counters_add_failures_and_take_the_last_of_skipped(finished: Path) -> None:
    text = write_report(finished).read_text(encoding="utf-8")
    assert re.search(r"accuracy/timeout</td><td class=\"n\">2<", text)
    assert re.search(r"facts/row_too_long</td><td class=\"n\">5<", text)


def test_evaluation_table(finished: Path) -> None:
    history = RunHistory(read_metrics(finished))
    rows = {
        (r.source, r.metric): r for r in compare_evaluations(history, make_config(finished, 20))
    }
    gained = rows["chain_sum", "accuracy"]
    assert gained.verdict == "better"
    assert gained.difference == pytest.approx(gained.after - gained.before)
    assert gained.standard_error == pytest.approx((gained.before * (1 - gained.before) / 64) ** 0.5)
    assert rows["basic_arithmetic", "accuracy"].verdict == "worse"
    falling_loss = rows["facts", "loss"]
    assert falling_loss.difference < 0
    assert falling_loss.verdict == "better"
    assert falling_loss.standard_error is None
    assert rows["chain_sum", "completion_tokens"].verdict == ""
    text = write_report(finished).read_text(encoding="utf-8")
    assert len(re.findall(r'<td class="n worse">-0\.\d+ ▼', text)) == 1


def test_one_step(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "one", done=1, total=1))
    assert "1 / 1" in Page(path.read_text(encoding="utf-8")).text
    assert (tmp_path / "one/plots/rewards.png").exists()


def test_an_unfinished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "half", done=5, total=30)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "5 / 30" in text
    assert "unfinished" in text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    save_config(make_config(tmp_path, 9), tmp_path / "config.yaml")
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "No step has been recorded yet" in text
    assert "has not been evaluated yet" in text


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    run.mkdir()
    config = make_config(run, 2)
    raw = config.model_dump(mode="json")
    raw["data"]["sources"][0]["rewards"] = {"<i>$a_b$": "accuracy", "format": "answer_format"}
    config = type(config).model_validate_json(json.dumps(raw))
    save_config(config, run / "config.yaml")
    writer = MetricsWriter(run, config)
    row = {"step": 1, "time/total": 1.0, "reward/<i>$a_b$": 0.5, "weight/<i>$a_b$": 1.0}
    writer.write(row | {"failed/<u>/x": 1, "eval/<s>/format": 0.5})
    rollouts, _ = make_rollouts(1)
    table = np.ones((8, len(config.objectives)), dtype=np.float32)
    writer.write_rollouts(1, rollouts, RewardTable(table))
    writer.close()
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "completion": "<script>alert(1)</script>" * 200}) + "\n")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.tags.isdisjoint({"script", "u", "s"})
    assert "<script>alert(1)</script>" in page.text
    assert "more characters" in page.text
    assert "<i>$a_b$" in page.text
    assert "<b>run" in page.text


def test_gaps_and_nulls(tmp_path: Path) -> None:
    save_config(make_config(tmp_path, 4), tmp_path / "config.yaml")
    rows = [
        {"step": 1, "time/total": 1.0, "grad_norm": None, "reward/accuracy": None, "lr": 0.0},
        {"step": 2, "time/total": 1.0, "grad_norm": 1.0, "rollout/logprob_diff_mean": 0.0},
        {"step": 3, "reward/accuracy": None, "eval/chain_sum/accuracy": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "no rewards yet" in text
    assert "nan" not in text.lower()


def test_the_dtype_is_the_one_that_was_computed_in(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("plots"))
    machine = json.loads((run / "machine.json").read_text())
    (run / "machine.json").write_text(json.dumps(machine | {"compute_dtype": "float32"}))
    assert "computing in float32" in write_report(run).read_text()


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no such folder"):
        write_report(tmp_path / "missing")
    with pytest.raises(ReportError, match="it has no config.yaml"):
        write_report(tmp_path)


def test_damaged_files_are_named(finished: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl", "machine.json", "config.yaml"):
        run = tmp_path / name
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns("plots"))
        (run / name).write_text("{broken\n{}\n")
        with pytest.raises(UserError, match=re.escape(name)):
            write_report(run)


def test_rows_of_one_step_are_merged() -> None:
    history = RunHistory([{"step": 2, "a": 1.0}, {"step": 1, "a": None}, {"step": 2, "b": 3.0}])
    assert history.rows == [{"step": 1, "a": None}, {"step": 2, "a": 1.0, "b": 3.0}]
    steps, values = history.series("a")
    assert steps.tolist() == [2]
    assert values.tolist() == [1.0]
    assert history.series("missing")[0].shape == (0,)


def test_moving_average() -> None:
    values = np.array([3.0, 0.0, 0.0, 6.0, 1.0])
    assert moving_average(values, 1).tolist() == values.tolist()
    assert moving_average(values, 3) == pytest.approx([1.5, 1.0, 2.0, 7 / 3, 3.5])
    assert moving_average(values, 99) == pytest.approx([2.0] * 5)


def test_figures_are_drawn_only_from_data(tmp_path: Path) -> None:
    history = RunHistory([{"step": 1, "time/total": 2.0, "time/rollout": 1.0}])
    plots = draw_plots(history, make_config(tmp_path, 1), tmp_path / "plots")
    assert [plot.name for plot in plots] == ["time"]
    assert plots[0].path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.thinned(3)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_curves_that_never_move_are_drawn_in_silence(tmp_path: Path, value: float) -> None:
    """Nothing was learnt: no reward, no signal in any group, no policy token to compare."""
    rows = read_metrics(make_run(tmp_path / "flat", done=3, total=3, eval_every=1))
    flat = [{key: step if key == "step" else value for key in row} for step, row in enumerate(rows)]
    plots = draw_plots(RunHistory(flat), make_config(tmp_path, 3), tmp_path / "plots")
    assert {"rewards", "mismatch", "gradient"} <= {plot.name for plot in plots}


def test_both_sides_and_ages_are_drawn_of_runs_with_servers(tmp_path: Path) -> None:
    config = make_config(tmp_path, 2)
    times = {"time/rollout": 1.0, "time/train": 2.0, "time/sync": 0.5, "time/total": 3.5}
    busy = {"time/engine_busy": 3.0, "time/engine_idle": 0.5}
    servers = busy | {"staleness/max": 0, "staleness/share_0": 1.0}
    ahead = busy | {"staleness/max": 1, "staleness/share_1": 1.0}

    def names(*rows: dict[str, float]) -> set[str]:
        history = RunHistory({"step": step, **row} for step, row in enumerate(rows, start=1))
        return {plot.name for plot in draw_plots(history, config, tmp_path)}

    figures = {"timeline", "staleness"}
    assert not names(times, times) & figures
    assert names(times | servers) & figures == {"timeline"}
    assert names(times | servers, times | ahead) & figures == figures
    weighed = ahead | {"importance/effective_sample_size": 0.8}
    assert names(times | servers, times | weighed) & figures == figures


def test_servers_are_drawn_over_the_time_in_which_they_were_measured() -> None:
    """A batch is there 1.5 s after its step began; an evaluation lies between steps 2 and 3."""
    step = {"time/rollout": 1.0, "time/reward": 0.5, "time/train": 2.0, "time/sync": 0.5,
            "time/total": 4.0}  # fmt: skip
    busy = [(9.0, 1.0), (4.0, 0.0), (3.0, 4.0), (0.0, 4.0)]
    history = RunHistory(
        {"step": i, "time/engine_busy": b, "time/engine_idle": idle, **step}
        for i, (b, idle) in enumerate(busy, start=1)
    )
    placed = _placed(history)
    assert [one.start for one in placed] == pytest.approx([0.0, 4.0, 11.0, 15.0])
    measured = [(0.0, 1.5), (1.5, 5.5), (5.5, 12.5), (12.5, 16.5)]
    for one, wanted in zip(placed, measured, strict=True):
        assert one.measured == pytest.approx(wanted)
    assert [one.share for one in placed] == pytest.approx([0.9, 1.0, 3 / 7, 0.0])
    assert placed[-1].end == pytest.approx(19.0)  # of its last 2.5 s nothing is known


def test_rewards_that_were_computed_meanwhile_are_no_wait() -> None:
    row = {"step": 1, "time/rollout": 1.0, "time/reward": 5.0, "time/train": 2.0, "time/sync": 0.5,
           "time/total": 3.5, "time/engine_busy": 1.0, "time/engine_idle": 0.0}  # fmt: skip
    (placed,) = _placed(RunHistory([row]))
    assert placed.stages == {"rollout": 1.0, "reward": 0.0, "train": 2.0, "sync": 0.5}
