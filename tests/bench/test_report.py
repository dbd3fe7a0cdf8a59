"""Tables and figures from results that a run of the suites left."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from recap_fast.bench.report import (
    Benchmarks,
    absences,
    draw_plots,
    draw_tables,
    load_benchmarks,
    time_unit,
)
from recap_fast.types import UserError

RECORDED = Path(__file__).parent / "recorded" / "benchmarks.json"
LOSS = ("policy_loss", "N=256 H=64 V=4096 bfloat16")


@pytest.fixture(scope="module")
def benchmarks() -> Benchmarks:
    return load_benchmarks(RECORDED)


def text_of(table: object) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def rows_of(table: object) -> list[list[str]]:
    lines = [line for line in text_of(table).splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_every_result_is_read(benchmarks):
    raw = json.loads(RECORDED.read_text())
    assert len(benchmarks.results) == len(raw["benchmarks"])
    assert LOSS in benchmarks.groups
    ours = next(r for r in benchmarks.of(*LOSS) if r.is_ours)
    recorded = next(
        b for b in raw["benchmarks"]
        if b["extra_info"]["implementation"] == ours.implementation
        and b["extra_info"]["suite"] == "policy_loss"
    )  # fmt: skip
    assert ours.median == recorded["stats"]["median"]
    assert ours.errors["error_weight"] == recorded["extra_info"]["error_weight"]


def test_a_table_is_sorted_and_compares_with_ours(benchmarks):
    table = next(t for t in draw_tables(benchmarks) if str(t.title).startswith("policy_loss"))
    results = sorted(benchmarks.of(*LOSS), key=lambda r: r.median)
    rows = rows_of(table)
    assert [row[0] for row in rows] == [r.implementation for r in results]
    titles = [str(column.header) for column in table.columns]
    assert {"x ours", "% of floor", "TFLOP/s", "peak MiB", "log-prob err", "dW err"} <= set(titles)
    ours = next(r.median for r in results if r.is_ours)
    column = titles.index("x ours")
    assert [float(row[column]) for row in rows] == [round(r.median / ours, 2) for r in results]
    # What an implementation does not give is blank, not zero.
    liger = next(row for row in rows if row[0] == "Liger chunked")
    assert liger[titles.index("log-prob err")] == ""


def test_columns_without_a_value_are_left_out(benchmarks):
    table = next(t for t in draw_tables(benchmarks) if str(t.title).startswith("reweighter"))
    titles = {str(column.header) for column in table.columns}
    assert "peak MiB" not in titles
    assert "x ours" not in titles, "all of that suite's methods are ours"


def test_absences_name_the_reason_once(benchmarks):
    lines = absences(benchmarks)
    assert "policy_loss, quack: quack is not installed" in lines
    doubled = Benchmarks([], benchmarks.not_measured * 2, {})
    assert "policy_loss, quack: quack is not installed (2 times)" in absences(doubled)


def test_figures(benchmarks, tmp_path):
    paths = draw_plots(benchmarks, tmp_path / "figures")
    names = {path.name for path in paths}
    assert {"policy_loss-time.png", "policy_loss-memory.png", "policy_loss-floor.png"} <= names
    assert "reweighter-memory.png" not in names, "nothing to show in it"
    for path in paths:
        image = Image.open(path).convert("L")
        assert min(image.size) > 200
        assert len(set(image.resize((64, 64)).get_flattened_data())) > 8, f"{path} looks empty"


def test_a_figure_has_a_panel_for_each_size(benchmarks, tmp_path):
    from dataclasses import replace

    def sized(count: int) -> Path:
        folder = tmp_path / str(count)
        results = [
            replace(result, size=f"N={n}") for n in range(count) for result in benchmarks.of(*LOSS)
        ]
        draw_plots(Benchmarks(results, [], {}), folder)
        return folder / "policy_loss-time.png"

    one, three = Image.open(sized(1)).size, Image.open(sized(3)).size
    assert three[0] == 2 * one[0], "two panels side by side"
    assert three[1] > 1.7 * one[1], "and a second row for the third"


@pytest.mark.parametrize(
    ("seconds", "unit"), [(12.0, "s"), (1.5, "ms"), (1e-3, "ms"), (2e-5, "µs")]
)
def test_units(seconds, unit):
    assert time_unit(seconds)[0] == unit


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), ("{", "pytest-benchmark"), ('{"benchmarks": []}', "not_measured")],
)
def test_files_that_are_no_results(tmp_path, content, words):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        load_benchmarks(path)
