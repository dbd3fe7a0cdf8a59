"""Columns and options: how rows of other shapes become questions and answers."""

from __future__ import annotations

import pytest

from recap_fast.config import SourceConfig
from recap_fast.data.row_columns import DataError, read_column, read_question, read_target


def source(kind="rl", **keys):
    rewards = {"accuracy": "accuracy"} if kind == "rl" else {}
    return SourceConfig(name="s", kind=kind, path="owner/name", rewards=rewards, **keys)


def question(entry, **keys):
    return read_question(entry, source(**keys), "row 0")


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
