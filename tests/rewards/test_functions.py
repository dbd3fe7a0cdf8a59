from __future__ import annotations

import json

import pytest

from recap_fast.rewards.functions import (
    BUILTIN,
    accuracy,
    answer_format,
    extract_answer,
    overlong,
    reasoning_gym,
    thinking_format,
)
from recap_fast.rewards.unreadable import Unreadable
from recap_fast.types import RewardSample


def sample(completion, answer="", entry=None, num_tokens=10, max_new_tokens=100):
    return RewardSample(completion, answer, entry or {}, num_tokens, max_new_tokens, "stop")


def tagged(text, answer, **entry):
    return sample(f"Well. <answer>{text}</answer>", answer, entry)


def test_names():
    assert set(BUILTIN) == {
        "accuracy",
        "thinking_format",
        "answer_format",
        "iou",
        "overlong",
        "reasoning_gym",
    }


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("so <answer> 4 </answer>.", "4"),
        ("<answer>3</answer> no, <answer>4</answer>", ""),
        ("<answer>4</answer> yes, <answer> 4 </answer>", "4"),
        ("<answer>4</answer> or \\boxed{5}", ""),
        ("in <answer> </answer> tags: <answer>4</answer>", "4"),
        ("\\boxed{3} or \\boxed{4}", ""),
        ("\\boxed{\\boxed{4}}", "4"),
        ("2 + 2\n#### 4", "4"),
        ("<answer>3 <answer>4</answer>", "4"),
        ("<think>\\boxed{3}</think> It is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("<think>3</think> 4", "4"),
        ("It is 4", "It is 4"),
        ("<answer>4", ""),
        ("4</answer>", ""),
        ("\\boxed{4", ""),
        ("<think>\\boxed{4} <answer>4</answer>", ""),
        ("<answer>4</answer><think>or", ""),
        ("<think><answer>4</answer></think> 5", "5"),
        ("", ""),
    ],
)
def test_extract_answer(completion, expected):
    assert extract_answer(completion) == expected


RIGHT = [
    ("42", "42"),
    ("42", 42),
    ("+42", "42"),
    ("42.0", "42"),
    ("1,000", "1000"),
    ("$\\frac{1}{2}$", "0.5"),
    ("\\frac{1}{2}", "1/2"),
    ("1/2", "\\frac{1}{2}"),
    ("x = 3", "3"),
    ("3 apples", "3"),
    ("12", "12 dollars"),
    ("(x+1)^2", "x^2+2x+1"),
    ("The result is 42.", "42"),
    ("42", "Add 40 and 2.\n#### 42"),
    ("  paris. ", "Paris"),
    ("PARIS", "Paris"),
    ("ｐaris", "Paris"),
    ("A", "A"),
    ("(a)", "A"),
    ("B.", "B"),
    ("B) Paris", "B"),
    ("The answer is (C)", "C"),
    ("**C**", "C"),
    ("True", "true"),
]
WRONG = [
    ("41", "42"),
    ("", "42"),
    ("I do not know", "42"),
    ("-42", "42"),
    ("12 euros", "13 dollars"),
    ("Prias", "Paris"),  # the same letters: equal as a product
    ("4", "4 Privet Drive, Surrey"),
    ("B", "A"),
    ("A cat sat", "A"),
    ("The answer is Brown", "B"),
    ("(x+1)^2", "x^2+2x+2"),
]


@pytest.mark.parametrize(("text", "truth"), RIGHT)
def test_right_answers(text, truth):
    assert accuracy(tagged(text, truth)) == 1.0


@pytest.mark.parametrize(("text", "truth"), WRONG)
def test_wrong_answers(text, truth):
    assert accuracy(tagged(text, truth)) == 0.0


def test_accuracy_without_tags():
    assert accuracy(sample("I add them, so it is 42.", "42")) == 1.0
    assert accuracy(sample("<think>It is 42.</think> It is 41.", "42")) == 0.0


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^9}}",
        "9**9**9**9",
        "2^99999999999",
        "99999999999!",
        "\\frac{1}{0}",
        "1e999999",
        "(" * 5000,
        "1+" * 5000 + "1",
        "9" * 20000,
    ],
)
def test_what_makes_parsers_hang_is_wrong_at_once(text):
    assert accuracy(tagged(text, "4")) == 0.0


def test_long_answers_count_by_their_end():
    assert accuracy(tagged("I add 1 and 2 again. " * 200 + "So it is 42.", "42")) == 1.0


@pytest.mark.parametrize(
    "truth",
    [
        None,
        "",
        [],
        [""],
        ["4", None],
        [["4"]],
        True,
        float("nan"),
        float("inf"),
        ["4", float("-inf")],
    ],
)
def test_accuracy_with_an_unusable_truth(truth):
    with pytest.raises((TypeError, ValueError), match="truth"):
        accuracy(tagged("42", truth))


OPTIONS = ["London", "Paris", "Rome"]


@pytest.mark.parametrize("truth", ["B", "(B)", "Paris", 1])
@pytest.mark.parametrize(
    ("text", "reward"),
    [("B", 1), ("b.", 1), ("Paris", 1), ("(B) Paris", 1), ("A", 0), ("Rome", 0), ("Oslo", 0)],
)
def test_multiple_choice(truth, text, reward):
    assert accuracy(tagged(text, truth, options=OPTIONS), choices="options") == reward


@pytest.mark.parametrize("truth", ["D", "Oslo", 3, -1, True, None])
def test_multiple_choice_with_an_unusable_truth(truth):
    with pytest.raises(ValueError, match="none of the 3 options"):
        accuracy(tagged("B", truth, options=OPTIONS), choices="options")


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" \n<think>a\nb</think>\n\n<answer>b</answer>\n", 1),
        ("<think>a</think><answer>b</answer> more", 0),
        ("first <think>a</think><answer>b</answer>", 0),
        ("<think>a</think> between <answer>b</answer>", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0),
        ("<think>a<answer>x</answer></think><answer>b</answer>", 0),
        ("<think> </think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a</think><answer>\u200b</answer>", 0),
        ("<think>\u200b</think><answer>b</answer>", 0),
        ("<think>...</think><answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<answer>b</answer>", 0),
        ("<think>a</think>", 0),
        ("", 0),
    ],
)
def test_thinking_format(completion, reward):
    assert thinking_format(sample(completion)) == reward


def test_thinking_format_that_the_prompt_opens():
    assert thinking_format(sample("a</think><answer>b</answer>"), prompt_opens_think=True) == 1.0
    assert thinking_format(sample("a</think><answer>b</answer>")) == 0.0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<answer>4</answer>", 1),
        ("It is <answer>4</answer> then.", 1),
        ("<answer></answer>", 0),
        ("<answer> \n</answer>", 0),
        ("<answer>\u200b\u2060</answer>", 0),
        ("<think>x</think><answer>4</answer>", 1),
        ("<think><answer>4</answer></think>", 0),
        ("<think><answer>4</answer>", 0),
        ("<answer>4</answer></think>", 0),
        ("<answer>4", 0),
        ("4</answer>", 0),
        ("</answer>4<answer>", 0),
        ("<answer>4</answer><answer>4</answer>", 0),
        ("<answer><answer>4</answer>", 0),
        ("<answer>4</answer></answer>", 0),
        ("4", 0),
    ],
)
def test_answer_format(completion, reward):
    assert answer_format(sample(completion)) == reward


@pytest.mark.parametrize("truth", ["<answer>B</answer>", "so <answer> B </answer>", "\\boxed{B}"])
def test_truths_that_keep_their_tags(truth):
    assert accuracy(tagged("B", truth)) == 1.0
    assert accuracy(tagged("A", truth)) == 0.0
    assert accuracy(tagged("B", truth, options=OPTIONS), choices="options") == 1.0
    assert accuracy(tagged("12", "<answer>12</answer>")) == 1.0


@pytest.mark.parametrize("options", [None, []])
def test_row_without_options_is_an_open_question(options):
    assert accuracy(tagged("B", "B", options=options), choices="options") == 1.0
    assert accuracy(tagged("7", 7, options=options), choices="options") == 1.0


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (150, -1)]
)
def test_overlong_is_daspos_piecewise_line(num_tokens, expected):
    assert overlong(sample("", num_tokens=num_tokens)) == pytest.approx(expected)
    given = sample("", num_tokens=num_tokens, max_new_tokens=1000)
    assert overlong(given, max_length=100, buffer=20) == pytest.approx(expected)


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_overlong_with_an_unusable_buffer(buffer):
    with pytest.raises(ValueError, match="buffer must be within 1 and max_length 100"):
        overlong(sample(""), buffer=buffer)


def test_reasoning_gym_asks_the_datasets_verifier():
    import reasoning_gym as gym

    dataset = gym.create_dataset("countdown", seed=1, size=1)
    entry = dataset[0]
    expression = entry["answer"]
    right = sample(f"<answer>{expression}</answer>", entry["answer"], entry)
    wrong = sample("<answer>1</answer>", entry["answer"], entry)
    assert reasoning_gym(right) == dataset.score_answer(expression, entry) == 1.0
    assert reasoning_gym(wrong) == dataset.score_answer("1", entry) < 1.0


@pytest.mark.parametrize("text", ["I do not know", "12 x 5", "[2, 3]", "", "1/0", "\x00"])
@pytest.mark.parametrize("name", ["prime_factorization", "boxnet", "game_of_life"])
def test_reasoning_gym_gives_nothing_for_what_its_verifier_breaks_on(name, text):
    import reasoning_gym as gym

    entry = gym.create_dataset(name, seed=1, size=1)[0]
    answer = sample(f"<answer>{text}</answer>", entry["answer"], entry)
    assert reasoning_gym(answer, dataset=name) < 0.1


def test_reasoning_gym_says_why_an_answer_could_not_be_read():
    entry = {"answer": "2 × 3", "metadata": {}}
    answer = sample("<answer>two</answer>", "2 × 3", entry)
    found = reasoning_gym(answer, dataset="prime_factorization")
    assert isinstance(found, Unreadable)
    assert "ValueError" in found.reason


def test_reasoning_gym_refuses_a_verifier_that_pays_for_anything():
    entry = {"answer": "True", "metadata": {}}
    with pytest.raises(ValueError, match="game_of_life_halting.*any answer would be right"):
        reasoning_gym(sample("<answer>x</answer>", "True", entry), dataset="game_of_life_halting")


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf"])
def test_reasoning_gym_pays_for_no_infinity(text):
    import reasoning_gym as gym

    entry = gym.create_dataset("complex_arithmetic", seed=1, size=1)[0]
    answer = sample(f"<answer>{text}</answer>", entry["answer"], entry)
    assert reasoning_gym(answer) == 0.0


@pytest.mark.parametrize("name", ["arc_agi", "rearc", "chain_sum"])
def test_reasoning_gym_rows_may_come_from_a_file(name):
    import reasoning_gym as gym

    made = gym.create_dataset(name, seed=1, size=1)[0]
    read = json.loads(json.dumps(made))
    for entry in (made, read):
        right = sample(f"<answer>{made['answer']}</answer>", made["answer"], entry)
        assert reasoning_gym(right) == 1.0


def test_reasoning_gym_needs_the_datasets_name():
    plain = sample("<answer>4</answer>", "4", {"question": "2+2", "answer": "4"})
    with pytest.raises(ValueError, match="metadata.source_dataset"):
        reasoning_gym(plain)
    assert reasoning_gym(plain, dataset="chain_sum") == 1.0
    with pytest.raises(ValueError, match="no_such"):
        reasoning_gym(plain, dataset="no_such")
