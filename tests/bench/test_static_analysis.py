"""Ahead-of-time compilation: the machinery on kernels of its own, then every real launch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recap_fast.bench.static_analysis import (
    ARCHS,
    Record,
    StaticAnalysisError,
    StaticTable,
    differences,
    from_json,
    main,
    static_table,
    to_json,
    to_markdown,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "static"
TRITON_36 = ROOT / ".venv" / "triton-3.6"
REFRESH = "make it again with: .venv/bin/python tools/static_tables.py"


@pytest.fixture(scope="module")
def own() -> dict[str, Record]:
    """Records of the test's kernels for sm_90, by case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        table = static_table(["sm_90"], cases="static_kernels:good_and_bad")
    return {record.case: record for record in table.records}


@pytest.mark.slow
@pytest.mark.variant
def test_row_loops_are_found_and_measured(own: dict[str, Record]) -> None:
    record = own["aligned"]
    assert (record.kernel, record.arch, record.warps) == ("exp_kernel", "sm_90", 8)
    assert not record.spills
    assert 8 <= record.registers <= 64
    (loop,) = record.loops
    elements = 4 * loop.loads[128]  # float32
    assert loop.loads == loop.stores
    assert 1 <= loop.in_flight <= loop.loads[128]
    # An exponential, its scaling, a share of the addresses: a few instructions for an element.
    assert loop.instructions_per_element is not None
    assert 2 < loop.instructions_per_element < 10
    assert record.exponentials >= elements
    assert record.instructions > loop.instructions_per_element * elements


def test_equal_kernels_are_compiled_once(own: dict[str, Record]) -> None:
    assert set(own) == {"aligned", "unaligned", "spilling"}


def test_narrow_accesses_are_seen(own: dict[str, Record]) -> None:
    assert own["aligned"].narrow == {}
    assert set(own["unaligned"].narrow) == {"load 32", "store 32"}


def test_spills_are_seen(own: dict[str, Record]) -> None:
    assert own["spilling"].spills
    assert own["spilling"].local_bytes > 0
    assert own["spilling"].local_accesses > 0


@pytest.mark.slow
@pytest.mark.variant
def test_what_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(StaticAnalysisError, match=r"broken, sm_80: .*(?s:.*)undefined_name"):
        static_table(["sm_80"], cases="static_kernels:broken")


def test_main_fails_on_spills_and_differences(
    own: dict[str, Record],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, bad = own["aligned"], own["spilling"]
    analysis = "recap_fast.bench.static_analysis."
    path = tmp_path / "static" / "table.json"
    monkeypatch.setattr(analysis + "static_table", lambda: StaticTable("1.2.3", [good]))
    assert main(json_path=path) == 0
    assert main(check=path) == 0
    path.write_text(to_json(StaticTable("1.2.3", [replace(good, registers=good.registers + 1)])))
    assert main(check=path) == 1
    assert f"registers was {good.registers + 1}, is {good.registers}" in capsys.readouterr().out
    monkeypatch.setattr(analysis + "static_table", lambda: StaticTable("1.2.3", [bad]))
    assert main() == 1
    assert "spilling, sm_90: uses local memory" in capsys.readouterr().out


def test_json_keeps_everything(own: dict[str, Record]) -> None:
    table = StaticTable("3.7.1", list(own.values()))
    assert from_json(to_json(table)) == table


def test_differences_name_what_changed(own: dict[str, Record]) -> None:
    record = own["aligned"]
    was = StaticTable("3.7.1", [record])

    def changed(triton: str = "3.7.1", **values: object) -> list[str]:
        return differences(was, StaticTable(triton, [replace(record, **values)]))  # type: ignore[arg-type]

    assert changed() == []
    (line,) = changed(registers=record.registers + 1)
    assert line == (f"aligned, sm_90: registers was {record.registers}, is {record.registers + 1}")
    assert changed("3.7.2", registers=record.registers + 8) == []
    assert len(changed("3.7.2", registers=record.registers + 9)) == 1
    (line,) = changed(loops=[replace(record.loops[0], in_flight=0)])
    assert f"loads in flight was {record.loops[0].in_flight}, is 0" in line
    (line,) = changed("3.7.2", local_bytes=8)
    assert "local bytes was 0, is 8" in line
    (line,) = changed(loops=[replace(record.loops[0], loads={16: 8})])
    assert "narrow was {}, is {'load 16': 8}" in line
    per_element = record.loops[0].instructions_per_element
    assert per_element is not None
    slower = replace(record.loops[0], instructions_per_element=per_element * 1.03)
    assert "instructions per element" in changed(loops=[slower])[0]
    assert changed(case="other") == [
        "aligned, sm_90: no longer compiled",
        "other, sm_90: not in the table",
    ]


@pytest.fixture(
    scope="module", params=[pytest.param(v, marks=pytest.mark.slow) for v in ("3.7", "3.6")]
)
def real(request: pytest.FixtureRequest) -> StaticTable:
    """Everything the operations launch, compiled by the Triton of the name."""
    if request.param == "3.6":
        if not TRITON_36.exists():
            pytest.skip("no .venv/triton-3.6; tools/triton36.sh makes it")
        return static_table(triton=TRITON_36)
    pytest.importorskip("triton", "3.7", reason="Triton 3.7 is not installed")
    return static_table()


def test_every_operation_compiles_for_every_gpu(real: StaticTable) -> None:
    names = {record.case for record in real.records}
    operations = (
        "policy loss",
        "linear_logprobs",
        "linear_token_statistics",
        "selective_logprobs",
        "group_advantages",
        "reweighter",
    )
    for operation in operations:
        assert any(name.startswith(operation) for name in names), operation
    assert {record.arch for record in real.records} == set(ARCHS)
    counts = [sum(record.arch == arch for record in real.records) for arch in ARCHS]
    assert len(set(counts)) == 1, "a kernel is missing for a GPU"


def test_nothing_spills(real: StaticTable) -> None:
    spilling = [(r.case, r.arch, r.local_bytes) for r in real.records if r.spills]
    assert spilling == []


def test_loops_over_aligned_rows_move_128_bits_a_thread(real: StaticTable) -> None:
    walking = [r for r in real.records if r.is_aligned and r.loops]
    assert len(walking) >= 10 * len(ARCHS)
    assert [(r.case, r.arch, r.narrow) for r in walking if r.narrow] == []
    for record in walking:
        assert any(loop.loads for loop in record.loops), record.case


def test_bfloat16_policy_kernels_keep_two_loads_in_flight(real: StaticTable) -> None:
    """One would be half of what a multiprocessor needs under way, see docs/performance.md."""
    policy = [
        record
        for record in real.records
        if record.case.startswith("policy loss") and "bfloat16 logits" in record.case
        if record.arch == "sm_90" and record.is_aligned
    ]
    assert len(policy) >= 4
    for record in policy:
        statistics = record.reading[0]
        assert statistics.in_flight >= 2, record.case
        # 32 warps of 64 registers are all that a multiprocessor has.
        assert (record.warps, record.registers <= 64) == (32, True), record.case


def test_unaligned_rows_show_as_narrow(real: StaticTable) -> None:
    unaligned = [record for record in real.records if not record.is_aligned]
    assert unaligned
    assert all(record.narrow for record in unaligned)


def test_committed_table_holds(real: StaticTable) -> None:
    path = RESULTS / f"triton-{'.'.join(real.triton.split('.')[:2])}.json"
    assert path.exists(), f"{path} is missing; {REFRESH}"
    found = differences(from_json(path.read_text(encoding="utf-8")), real)
    assert not found, "\n".join([f"{path.name}: {REFRESH}", *found])


@pytest.mark.parametrize("version", ["3.7", "3.6"])
def test_documentation_shows_the_committed_table(version: str) -> None:
    table = from_json((RESULTS / f"triton-{version}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "static.md").read_text(encoding="utf-8")
    assert to_markdown(table) in page, REFRESH
