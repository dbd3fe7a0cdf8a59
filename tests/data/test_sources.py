"""Sources that lack a column, sources of several subsets, and limits of rows."""

from __future__ import annotations

import json

import pytest

from recap_fast.config import SourceConfig
from recap_fast.data.row_columns import DataError
from recap_fast.data.sources import open_rows


def source(path="owner/name", kind="rl", **keys):
    rewards = {"accuracy": "accuracy"} if kind == "rl" else {}
    return SourceConfig(name="s", kind=kind, path=str(path), rewards=rewards, **keys)


def hub(monkeypatch, tables):
    import datasets

    def load_dataset(path, subset, split):
        return datasets.Dataset.from_list(tables[subset])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def table(count, prefix):
    return [{"question": f"{prefix}{i}", "answer": str(i)} for i in range(count)]


def test_missing_columns_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    for keys, name in [
        ({"question": "conversations.0.value"}, "conversations.0.value"),
        ({"question": ["hint", "question"]}, "hint"),
        ({"choices": "options"}, "options"),
        ({"answer": "truth"}, "truth"),
    ]:
        with pytest.raises(DataError, match=rf"rows\.jsonl:1: no column '{name}'"):
            open_rows(source(path, **keys), 0)


def test_several_subsets_make_one_source(monkeypatch):
    hub(monkeypatch, {"a": table(3, "a"), "b": table(2, "b"), "c": table(4, "c")})
    rows = open_rows(source(subset=["a", "b", "c"]), 0)
    assert len(rows) == 9
    expected = ["a0", "a1", "a2", "b0", "b1", "c0", "c1", "c2", "c3"]
    assert [rows[i]["question"] for i in range(9)] == expected
    assert rows.where(4) == "hub dataset 'owner/name', subset 'b', split 'train': row 1"


def test_limit_of_rows(monkeypatch):
    hub(monkeypatch, {"a": table(50, "a"), "b": table(2, "b"), None: table(50, "n")})
    rows = open_rows(source(subset=["a", "b"], max_rows=5), 3)
    assert len(rows) == 7
    chosen = [rows[i]["question"] for i in range(7)]
    assert len(set(chosen)) == 7
    assert chosen[5:] == ["b0", "b1"]
    assert chosen != [f"a{i}" for i in range(5)] + ["b0", "b1"]
    assert rows.where(0).endswith(f": row {chosen[0][1:]}")
    again = open_rows(source(subset=["a", "b"], max_rows=5), 3)
    assert [again[i]["question"] for i in range(7)] == chosen
    other = open_rows(source(max_rows=5), 4)
    assert [other[i]["question"][1:] for i in range(5)] != [name[1:] for name in chosen[:5]]


def test_limit_of_rows_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in table(9, "q")))
    assert len(open_rows(source(path, max_rows=4), 0)) == 4
    assert len(open_rows(source(path, max_rows=40), 0)) == 9
