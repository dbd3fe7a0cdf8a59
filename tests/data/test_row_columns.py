"""Columns and options: how rows of other shapes become questions and answers."""

from __future__ import annotations

import pytest

from recap_fast.config import SourceConfig
from recap_fast.data.row_columns import (
    DataError,
    check_row,
    read_column,
    read_images,
    read_question,
    read_target,
)


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
    for wrong in (
        "north",
        list(range(27)),
        [["x"]],
        [{"label": "A"}],
        {"A": "x", "(A)": "y"},
        {"A": ["x"]},
        {"label": ["A"], "text": ["x", "y"]},
        {"label": "A", "text": "x"},
    ):
        with pytest.raises(DataError, match="wanted a list of up to 26 options"):
            question({"question": "Which?", "options": wrong}, **keys)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"A": "north", "B": "south"}, "(A) north\n(B) south"),
        ({"A": "north", "B": None, "C": 7}, "(A) north\n(C) 7"),  # Parquet's labels of other rows
        ({"text": ["north", "south"], "label": ["1", "2"]}, "(1) north\n(2) south"),
        ([{"label": "X", "text": "a"}, {"label": "Y", "text": "b"}], "(X) a\n(Y) b"),
        ((1.5, "b"), "(A) 1.5\n(B) b"),
        (["x", "y", None, None], "(A) x\n(B) y"),  # Parquet's padding
        ({"text": ["x", "y"], "label": None}, "(A) x\n(B) y"),
        ({"text": ["x", "y"]}, "(A) x\n(B) y"),
        ([{"text": "x", "label": None}, {"text": "y"}], "(A) x\n(B) y"),
        (["A. x", "B) y", "(C) z"], "(A) x\n(B) y\n(C) z"),
        ({"A": "A: x", "B": "B: y"}, "(A) x\n(B) y"),
        (["A. x", "y"], "(A) A. x\n(B) y"),
        ({"1": "1.5", "2": "2.5"}, "(1) 1.5\n(2) 2.5"),
        ({"I": "x", "II": "y", "III": "z"}, "(I) x\n(II) y\n(III) z"),
    ],
)
def test_options_with_labels(options, lines):
    row = {"question": "Which?", "options": options}
    assert question(row, choices="options") == f"Which?\n{lines}"


def test_options_inside_of_a_column():
    row = {"question": {"stem": "Which?", "choices": ["x", "y"]}, "answer": "A"}
    keys = {"question": "question.stem", "choices": "question.choices"}
    check_row(row, source(**keys), "row 0")
    assert question(row, **keys) == "Which?\n(A) x\n(B) y"


@pytest.mark.parametrize("content", ["", " ", [{"type": "text", "text": None}]])
def test_empty_turns_are_no_questions(content):
    with pytest.raises(DataError, match="the user's last turn is empty"):
        question({"question": [{"role": "user", "content": content}]})


@pytest.mark.parametrize("options", [[], [None], {}, {"A": None}, {"text": [], "label": []}])
def test_empty_options_are_none(options):
    assert question({"question": "Which?", "options": options}, choices="options") == "Which?"


# -- conversations


def turns(*contents, **last):
    roles = ["user", "assistant"] * len(contents)
    made = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    made[-1].update(last)
    return made


def test_conversation_with_its_target():
    keys = {"kind": "sft", "question": "messages"}
    row = {"messages": turns("a", "b", "c", "d")}
    assert question(row, **keys) == turns("a", "b", "c")
    assert read_target(row, source(**keys), "row 0") == "d"
    check_row(row, source(**keys), "row 0")
    # One that ends with the user's turn has it in a column, as ever.
    asked = {"messages": turns("a", "b", "c"), "answer": "d"}
    assert question(asked, **keys) == turns("a", "b", "c")
    assert read_target(asked, source(**keys), "row 0") == "d"


@pytest.mark.parametrize(
    ("kind", "messages", "message"),
    [
        ("rl", turns("a", "b"), "last turn is the assistant's, not the user's"),
        ("sft", turns("a", "b", "c"), "no column 'answer' .*ends with the assistant's turn"),
        ("sft", [{"role": "assistant", "content": "b"}], "only turn is the assistant's"),
        ("sft", [{"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}],
         "last turn is the system's"),
        ("sft", turns("a", "b", tool_calls=[{"id": 1}]), "has 'tool_calls'"),
        ("sft", turns("a", "b", reasoning_content="hm"), "has 'reasoning_content'"),
        ("sft", [], "wanted a list of messages"),
        ("sft", turns("a", 3), "turn 1: its content is neither"),
        ("sft", [{"content": "a"}], "turn 0 is no message with a role"),
        ("sft", "  ", "wanted a list of messages"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_used(kind, messages, message):
    keys = {"kind": kind, "question": "messages"}
    keys |= {"answer": None} if kind == "rl" else {}
    with pytest.raises(DataError, match=message):
        check_row({"messages": messages}, source(**keys), "row 0")


def test_placeholders_and_images_in_parts():
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    held = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    row = {"question": turns(parts), "image": "a.png"}
    assert question(row, images="image") == turns("<image>What?")
    assert read_images(row, source(images="image"), "row 0") == "a.png"
    row = {"question": turns(held)}
    assert question(row, images="question") == turns("<image>What?")
    assert read_images(row, source(images="question"), "row 0") == ["a.png"]
    assert read_images({"question": "What?"}, source(images="question"), "row 0") == []
    for content, images, message in [
        (parts, None, "has images, but the source says of no column"),
        (held, None, "has images, but the source says of no column"),
        (held, "image", "holds images itself: set `images: question`"),
        (parts, "question", "a part of type image without an image"),
    ]:
        with pytest.raises(DataError, match=message):
            question({"question": turns(content), "image": "a.png"}, images=images)


def test_target_inside_of_a_column():
    row = {"question": "q", "conversations": [{"value": "q"}, {"value": "a"}]}
    assert read_target(row, source(kind="sft", answer="conversations.1.value"), "row 0") == "a"
