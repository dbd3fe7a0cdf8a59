"""Multiple choice: which options an answer names, and what may stand beside their letters."""

from __future__ import annotations

import pytest

from recap_fast.rewards.answers import accuracy
from recap_fast.rewards.options import read_options, right_options
from recap_fast.types import RewardSample

ANIMALS = ["mammal", "reptile", "bird", "fish"]
NUMERALS = {"I": "one thing", "II": "two things", "III": "three things"}
NAMED = {"choice_1": "red", "choice_2": "blue"}


def reward(answer, truth, options):
    """Of the answer in tags, in a box and bare, which must agree."""
    texts = (f"<answer>{answer}</answer>", f"\\boxed{{{answer}}}", answer)
    samples = [RewardSample(text, truth, {"o": options}, 10, 100, "stop") for text in texts]
    found = {float(accuracy(sample, choices="o")) for sample in samples}
    assert len(found) == 1, answer
    return found.pop()


@pytest.mark.parametrize(
    "answer",
    [
        "C. But D too", "C. D could also be", "C. option d", "C. fourth option", "C. the first",
        "C. all of the above", "C. everything", "C. birdfish", "C) b", "C) also a",
        "C because D is", "C, as fish swim", "C, since a", "C. bird fish", "C. bird or fish",
        "C because of mammals", "C bird D", "C. not bird", "C. bird, D. fish", "C as well as D",
        "C, as is D", "C is wrong", "C, d", "C. since B", "C) bird and fish", "C. bird. Also D",
        "D. bird", "bird. fish", "C, since fourth", "C because", "C. bird because fish too",
        "C is the right one, and D too", "C, because it may be (d)", "C is right as B is",
        "C. bird?", "C. any", "C. both", "C. neither", "C. I do not know",
        "C, as well", "C as each is right", "C because they are all right", "C because 4",
        "C because A does", "C because d does", "C, because birds fly and fishes swim",
    ],
)  # fmt: skip
def test_another_option_or_a_denial_beside_the_letter(answer):
    assert reward(answer, "C", ANIMALS) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "C, because birds fly", "The correct choice is C because birds have feathers.",
        "C is the right one", "I think C", "I choose C", "C. a bird", "C) bird", "C: bird",
        "(C) bird", "**C**", "C. bird, because birds fly", "C. bird since it has wings",
        "C is correct because it flies", "c", "Option C", "The answer is C: bird", "C - bird",
        "C bird", "the answer is (C) bird", "bird (C)", "C because a bird has wings.",
        "C, as it has feathers and lays eggs",
    ],
)  # fmt: skip
def test_its_own_text_or_a_reason_beside_the_letter(answer):
    assert reward(answer, "C", ANIMALS) == 1.0
    assert reward(answer, "D", ANIMALS) == 0.0


@pytest.mark.parametrize(
    ("options", "truth", "answer", "expected"),
    [
        (["A and B", "x", "y"], "A", "A, B", 0),
        (["A and B", "x", "y"], "A", "A and B", 1),
        (["1/2", "2", "3"], "A", "0.5", 1),
        ({"1": "1, 2", "2": "5"}, "1", "1, 2", 1),
        (["3", "4", "5"], ["A", "C"], "A. 3, C. 5", 1),
        (["3", "4", "5"], ["A", "C"], "A) 3\nC) 5", 1),
        (["3", "4", "5"], ["A", "C"], "(A) 3 and (C) 5", 1),
        (["3", "4", "5"], ["A", "C"], "A. 3, C. 4", 0),
        (["3", "4", "5"], ["A", "C"], "A. 3, B. 4, C. 5", 0),
        (["3", "4", "5"], ["A", "C"], "A. 3", 0),
        (["Washington, D.C.", "New York"], "A", "Washington DC", 1),
        (["Washington, D.C.", "New York"], "A", "A. Washington DC", 1),
        (["abcd", "ab.cd"], "A", "ab cd", 0),
        (["1.5", "15"], "A", "15", 0),
        (["", ""], "A", "B", 0),
        (["Paris, France", "Lyon, France"], "A", "A. Paris", 1),
        (["Paris, France", "Lyon, France"], "A", "A. Lyon", 0),
        (NUMERALS, "III", "III", 1),
        (NUMERALS, "III", "The answer is (iii).", 1),
        (NUMERALS, "III", "III. three things", 1),
        (NUMERALS, "III", "II", 0),
        (NUMERALS, "III", "I", 0),
        (NUMERALS, "III", "C", 0),
        (NUMERALS, "III", "I and III", 0),
        (NUMERALS, ["I", "III"], "I and III", 1),
        (NAMED, "choice_1", "choice_1", 1),
        (NAMED, "choice_1", "choice_1: red", 1),
        (NAMED, "choice_1", "choice_1: blue", 0),
        (NAMED, "choice_1", "choice_2", 0),
        (NAMED, "blue", "choice_2", 1),
    ],
)
def test_labels_and_texts(options, truth, answer, expected):
    assert reward(answer, truth, options) == expected


@pytest.mark.parametrize(
    "options",
    [
        [{"label": "B", "text": "x"}, {"label": "A", "text": "y"}],
        {"label": ["B", "A"], "text": ["x", "y"]},
        {"B": "x", "A": "y"},
        {"(B)": "B. x", "(A)": "A. y"},
        {"label": ["B", "A", None], "text": ["x", "y", None]},
    ],
)
def test_labels_keep_their_order(options):
    found = read_options(options)
    assert (found.labels, found.texts) == (("B", "A"), ("x", "y"))
    assert right_options("B", found) == right_options("x", found) == right_options(0, found) == {0}


def test_none_between_options_shifts_neither_letters_nor_numbers():
    found = read_options(["x", None, "z", None])
    assert (found.labels, found.texts) == (("A", "C"), ("x", "z"))
    assert right_options(2, found) == right_options("C", found) == {1}
    with pytest.raises(ValueError, match="none of the 2 options"):
        right_options(1, found)


@pytest.mark.parametrize("options", [None, [], {}, [None], {"A": None}, {"text": [], "label": []}])
def test_no_options(options):
    assert read_options(options).texts == ()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("A, B", TypeError), (5, TypeError), ([["x"]], TypeError), ([{"label": "A"}], TypeError),
        ({"label": "A", "text": "x"}, TypeError), ({"A": ["x"]}, TypeError),
        ({"label": ["A"], "text": ["x", "y"]}, ValueError), ({"A": "x", "A.": "y"}, ValueError),
        (list(range(27)), ValueError),
    ],
)  # fmt: skip
def test_what_are_no_options(options, error):
    with pytest.raises(error):
        read_options(options)
