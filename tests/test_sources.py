"""Columns, options and subsets: how data sets of other shapes become questions and answers."""

from __future__ import annotations

import json

import pytest

from recap_fast.config import SourceConfig
from recap_fast.sources import DataError, open_rows, read_column, read_question, read_target


def source(path="owner/name", kind="rl", **keys):
    rewards = {"accuracy": "accuracy"} if kind == "rl" else {}
    return SourceConfig(name="s", kind=kind, path=str(path), rewards=rewards, **keys)


def question(entry, **keys):
    return read_question(entry, source(**keys), "row 0")


def hub(monkeypatch, tables):
    import datasets

    def load_dataset(path, subset, split):
        return datasets.Dataset.from_list(tables[subset])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def table(count, prefix):
    return [{"question": f"{prefix}{i}", "answer": str(i)} for i in range(count)]


# -- columns


ROW = {
    "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": [1, 2, 3, 4]}],
    "a.b": "a column with a dot",
    "a": {"b": "inside"},
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("conversations.0.value", "What?"),
        ("conversations.1.value", [1, 2, 3, 4]),
        ("conversations.1.value.2", 3),
        ("a.b", "a column with a dot"),
        ("a", {"b": "inside"}),
    ],
)
def test_paths_into_columns(path, value):
    assert read_column(ROW, path, source(), "row 0") == value


@pytest.mark.parametrize("path", ["conversations.2.value", "conversations.0.role", "a.c", "a.b.c"])
def test_paths_that_lead_nowhere(path):
    with pytest.raises(DataError, match=f"'s': row 0: '{path}' leads nowhere: no "):
        read_column(ROW, path, source(), "row 0")


def test_question_of_several_columns():
    keys = {"question": ["hint", "question"]}
    assert question({"hint": "Look.", "question": "What?"}, **keys) == "Look.\nWhat?"
    assert question({"hint": "", "question": "What?"}, **keys) == "What?"
    assert question({"hint": None, "question": "What?"}, **keys) == "What?"
    with pytest.raises(DataError, match="no text in any of the columns"):
        question({"hint": None, "question": " "}, **keys)
    with pytest.raises(DataError, match="column 'hint': wanted a text, one of several"):
        question({"hint": 3, "question": "What?"}, **keys)


def test_options_are_written_below_the_question():
    keys = {"choices": "options"}
    row = {"question": "Which?", "options": ["north", 7]}
    assert question(row, **keys) == "Which?\n(A) north\n(B) 7"
    assert question({"question": "Which?", "options": []}, **keys) == "Which?"
    assert question({"question": "Which?", "options": None}, **keys) == "Which?"
    turns = [{"role": "user", "content": "Which?"}]
    asked = question({"question": turns, "options": ["x"]}, **keys)
    assert asked == [{"role": "user", "content": "Which?\n(A) x"}]
    assert turns[0]["content"] == "Which?"
    for wrong in ("north", list(range(27))):
        with pytest.raises(DataError, match="wanted a list of up to 26 options"):
            question({"question": "Which?", "options": wrong}, **keys)


def test_target_inside_of_a_column():
    row = {"question": "q", "conversations": [{"value": "q"}, {"value": "a"}]}
    assert read_target(row, source(kind="sft", answer="conversations.1.value"), "row 0") == "a"


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


# -- subsets and limits


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
