"""Conversations of other shapes: parts, keys that are None, and what makes questions the same."""

from __future__ import annotations

import pytest

from recap_fast.data.messages import (
    conversation_images,
    count_placeholders,
    question_key,
    question_keys,
    read_conversation,
    without_none,
)

TEXT = {"type": "text", "text": "What?"}


def user(content, **keys):
    return [{"role": "user", "content": content, **keys}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": None, "b": 1}, {"b": 1}),
        ({"a": {"b": None, "c": [{"d": None}]}}, {"a": {"c": [{}]}}),
        ([None, {"a": None}], [None, {}]),
        (({"a": None},), [{}]),
        ({"a": 0, "b": "", "c": False, "d": []}, {"a": 0, "b": "", "c": False, "d": []}),
        ("None", "None"),
        (None, None),
    ],
)
def test_keys_that_are_none_are_dropped(value, expected):
    assert without_none(value) == expected


def test_none_goes_from_tool_calls_and_parts_too():
    function = {"name": "add", "arguments": {"a": 1, "b": None}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "1+1", "image": None}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": function, "id": None}]},
        {"role": "tool", "content": "2", "tool_calls": None},
    ]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    assert read_conversation(turns) == [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]


def test_other_keys_stay():
    assert read_conversation(user("q", name="ann", weight=0)) == user("q", name="ann", weight=0)


@pytest.mark.parametrize(
    ("content", "text", "images"),
    [
        ([TEXT], "What?", []),
        (["What?"], "What?", []),
        ([{"type": "input_text", "text": "What?"}], "What?", []),
        ([TEXT, {"type": "text", "text": " Why?"}], "What? Why?", []),
        ([{"type": "image"}, TEXT], "<image>What?", []),
        ([{"type": "image", "text": None, "image": None}, TEXT], "<image>What?", []),
        ([TEXT, {"type": "image", "image": "a.png"}], "What?<image>", ["a.png"]),
        ([{"image": "a.png"}, {"text": "What?"}], "<image>What?", ["a.png"]),
        ([{"type": "image", "path": "a.png"}, TEXT], "<image>What?", ["a.png"]),
        ([{"type": "image", "url": "a.png"}, TEXT], "<image>What?", ["a.png"]),
        ([{"type": "image", "base64": "AA=="}, TEXT], "<image>What?", ["data:;base64,AA=="]),
        ([{"type": "image", "bytes": b"x"}, TEXT], "<image>What?", [b"x"]),
        ([{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT], "<image>What?", ["a.png"]),
        ([{"type": "image_url", "image_url": "a.png"}, TEXT], "<image>What?", ["a.png"]),
        ([{"type": "input_image", "image_url": "a.png"}, TEXT], "<image>What?", ["a.png"]),
        ([{"type": "image", "image": {"bytes": b"x", "path": None}}, TEXT], "<image>What?",
         [{"bytes": b"x", "path": None}]),
    ],
)  # fmt: skip
def test_parts(content, text, images):
    assert read_conversation(user(content)) == user(text)
    assert conversation_images(user(content)) == images
    assert count_placeholders(user(content)) == text.count("<image>") - len(images)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("text", "wanted a list of messages"),
        (None, "wanted a list of messages"),
        ([], "wanted a list of messages"),
        (["a"], "turn 0 is no message"),
        ([{"role": None, "content": "a"}], "turn 0 is no message"),
        (user(None), "turn 0: its content is neither"),
        (user([]), "turn 0: its content is neither"),
        (user([{"type": "video", "video": "a.mp4"}]), "a part of type 'video'"),
        (user([{"type": "input_audio", "data": "x"}]), "a part of type 'input_audio'"),
        (user([3]), "a part of type 'int'"),
        (user([{"type": "text", "text": 3}]), "a part of type 'text'"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "an image in the assistant's"),
    ],
)
def test_conversations_that_cannot_be_used(turns, message):
    with pytest.raises(ValueError, match=message):
        read_conversation(turns)


def test_questions_are_the_same_in_any_shape():
    shapes = [
        "What is 1 + 1?",
        "  What is\n1 +\t1? ",
        "WHAT IS 1 + 1?",
        "Ｗｈａｔ is １ + １？",
        "<image>\nWhat is 1 + 1?",
        user("What is 1 + 1?"),
        user("What  is 1 + 1?", name="ann"),
        [{"role": "system", "content": "Be brief."}, *user("What is 1 + 1?")],
        [{"role": "developer", "content": "Be brief."}, *user("What is 1 + 1?")],
        read_conversation(user([{"type": "text", "text": "What is"}, {"text": " 1 + 1?"}])),
        read_conversation(user([{"type": "image"}, {"type": "text", "text": "What is 1 + 1?"}])),
    ]
    assert {question_key(shape) for shape in shapes} == {"what is 1 + 1?"}
    assert question_key("caf\u00e9") == question_key("cafe\u0301")


def test_other_questions_are_others():
    first = user("a") + [{"role": "assistant", "content": "b"}] + user("c")
    second = user("a") + [{"role": "assistant", "content": "d"}] + user("c")
    texts = ["c", "ä", "a c", user("a"), first, second]
    assert len({question_key(text) for text in texts}) == len(texts)


def test_keys_of_a_conversation_know_their_images():
    turns = [
        *user("<image>one"),
        {"role": "assistant", "content": "a"},
        *user("two <image><image>"),
    ]
    keys = [(text, [1, 2, 3][images]) for text, images in question_keys(turns)]
    whole = "user: one\nassistant: a\nuser: two"
    assert keys == [
        (whole, [1, 2, 3]), ("one", [1]), ("one", [1]), (whole, [1, 2, 3]), ("two", [2, 3]),
    ]  # fmt: skip
    bare = [{**turn, "content": turn["content"].replace("<image>", "")} for turn in turns]
    assert [[1, 2][images] for _, images in question_keys(bare)] == [[1, 2]] * 4 + [[]]
