"""Whatever the truth's shape, all usual notations of it are right, and no part, list or neighbour
of it is."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from recap_fast.rewards.answers import accuracy
from recap_fast.rewards.functions import check_truth
from recap_fast.rewards.unreadable import Unreadable
from recap_fast.types import RewardSample
from tests.rewards import answer_strategies as cases

quick = settings(
    phases=[Phase.generate, Phase.target],
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def reward(completion, truth, choices=None, **entry):
    sample = RewardSample(completion, truth, entry | {"options": choices}, 10, 100, "stop")
    return accuracy(sample, choices=None if choices is None else "options")


def check(case, data):
    """Draws a layout for each answer, so that all are met over the examples."""
    layouts = st.sampled_from(cases.LAYOUTS)
    for answer in case.right:
        layout = data.draw(layouts)
        if "boxed" in layout and (" is " in answer or "Answer" in answer):
            layout = cases.LAYOUTS[0]  # nobody boxes a sentence
        completion = layout.format(answer)
        assert reward(completion, case.truth, case.choices) == 1.0, (completion, case)
    for answer in case.wrong:
        has_tags = "<" in answer or "boxed" in answer
        completion = answer if has_tags else data.draw(layouts).format(answer)
        assert reward(completion, case.truth, case.choices) == 0.0, (completion, case)


EXAMPLES = {
    "integers": 40,
    "decimals": 40,
    "powers_of_ten": 40,
    "fractions": 40,
    "formulas": 15,  # only these need sympy
    "structures": 40,
    "quantities": 40,
    "percentages": 40,
    "texts": 40,
    "dates": 40,
    "times": 40,
    "options": 40,
    "several_options": 40,
}


@pytest.mark.parametrize("shape", EXAMPLES)
def test_right_notations_are_paid_and_wrong_answers_are_not(shape):
    @settings(quick, max_examples=EXAMPLES[shape])
    @given(getattr(cases, shape)(), st.data())
    def holds(case, data):
        check(case, data)

    holds()


# -- what a policy would find


@pytest.mark.parametrize(
    ("completion", "truth", "expected"),
    [
        ("<answer>500%</answer>", "5", 0),
        ("<answer>5%</answer>", "0.05", 1),
        ("<answer>0.05%</answer>", "0.05", 0),
        ("<answer>\\frac{1}{2^{98}}</answer>", "\\frac{1}{2^{99}}", 0),
        ("<answer>\\frac{2}{2^{100}}</answer>", "\\frac{1}{2^{99}}", 1),
        ("<answer>12 + 61</answer>", "73", 0),
        ("<answer>84/2</answer>", "42", 0),
        ("<answer>5x - 8 = 2</answer>", "2", 0),
        ("<answer>2x = 4</answer>", "x = 2", 0),
        ("<answer>2024 - 3 - 5</answer>", "2024-03-05", 0),
        ("<answer>2016</answer>", "2024-03-05", 0),
        ("<answer>banana, apple</answer>", "apple, banana", 0),
        ("<answer>3, 2, 1</answer>", "[1, 2, 3]", 0),
        ("<answer>41\n42\n43</answer>", "42", 0),
        ("x = 41\nx = 42", "42", 0),
        ("\\boxed{41} no, \\boxed{42}", "42", 0),
        ("\\boxed{42} indeed, \\boxed{42.0}", "42", 1),
        ("\\boxed{3} and \\boxed{4}", "3, 4", 1),
        ("<answer>42</answer> or \\boxed{41}", "42", 0),
        ("<answer>42</answer><answer>42</answer>", "42", 1),
        ("in <answer> </answer> tags: <answer>42</answer>", "42", 1),
        ("<answer>your answer</answer><answer>42</answer>", "42", 0),
        ("<answer>4\u200b2</answer>", "42", 1),
        ("<answer>4\u200b2</answer>", "2", 0),
        ("<answer>0.333333</answer>", "1/3", 0),
        ("<answer>0.3333333333</answer>", "1/3", 1),
        ("<answer>3.1416</answer>", 3.14159, 0),
        ("<answer>0.3</answer>", 0.1 + 0.2, 1),
        ("<answer>\\frac{\\sqrt{2}}{2}</answer>", 0.7071067811865476, 1),
        ("<answer>10000000000000001</answer>", 1e16, 0),
        ("<answer>A + B</answer>", "a + b", 0),
        ("Try 41. No. I would say 42?", "42", 0),
        ("She has 3 apples and 42 pears.", "42", 0),
        ("The answer is a triangle.", "A", 0),
        ("<answer>4 Privet Drive</answer>", "4 Privet Drive, Surrey", 0),
        ("### Final answer\n42", "42", 1),
        ("<answer>forty-two</answer>", "42", 1),
        ("<answer>forty</answer>", "42", 0),
        ("<answer>0.1\\overline{6}</answer>", "\\frac{1}{6}", 1),
        ("<answer>0.\\overline{6}</answer>", "\\frac{1}{6}", 0),
        ("\\begin{align*} x &= 5 \\end{align*}", "5", 1),
        ("The answer is 5?.", "5", 0),
        ("We check it. The answer is 42. I hope it is correct.", "42", 1),
        ("The answer is 42. Or 43.", "42", 0),
        ("The answer is 42. Or 43.", "43", 0),
        ("The answer is not 41. It is 42.", "42", 1),
        ("The answer is not 41. It is 42.", "41", 0),
        ("The answer is 42. It is not 41.", "41", 0),
        ("The answer is 41. Wait, it is 42.", "42", 1),
        ("The answer is 41. It may be 42.", "42", 0),
        ("The answer is B. C is red.", "red", 0),
        ("The best answer is\n\n(C)", "C", 1),
        ("<answer>x=2, y=3</answer>", "(2,3)", 1),
        ("<answer>x=3, y=2</answer>", "(2,3)", 0),
        ("<answer>x=2, x=3</answer>", "(2,3)", 0),
        ("<answer>-5</answer>", "1990-1995", 0),
        ("<answer>1990– 1995</answer>", "1990-1995", 1),
        ("<answer>5 = x</answer>", "5", 1),
        ("<answer>5 = 6</answer>", "6", 0),
    ],
)
def test_exploits_and_their_neighbours(completion, truth, expected):
    assert reward(completion, truth) == expected


@pytest.mark.parametrize("layout", ["{}", "<answer>{}</answer>", "\\boxed{{{}}}"])
def test_unfinished_thoughts_have_no_answer(layout):
    said = layout.format("42")
    assert reward(f"<think>{said}", "42") == 0
    assert reward(f"<think>no</think>{said}<think>", "42") == 0
    assert reward(f"<think>no</think>{said}", "42") == 1
    assert reward(f"no</think>{said}", "42", prompt_opens_think=True) == 1
    assert reward(said, "42", prompt_opens_think=True) == 0


def test_a_truth_may_be_several_accepted_answers():
    truth = ["five", 5, "V"]
    for text in ("Five", "5.0", "V", "x = 5"):
        assert reward(f"<answer>{text}</answer>", truth) == 1
    for text in ("six", "five or six", "five, 5", ""):
        assert reward(f"<answer>{text}</answer>", truth) == 0
    check_truth("accuracy", {}, truth, {})


# -- options


@pytest.mark.parametrize(
    ("choices", "truth", "answer", "expected"),
    [
        (["3", "3", "4"], 1, "3", 1),
        (["3", "3", "4"], 1, "A", 1),  # it says the same
        (["3", "3", "4"], 2, "3", 0),
        (["10", "20"], "B", "20.0", 1),
        (["5 cm", "5 m"], "A", "5", 0),
        ({"text": ["cat", "dog"], "label": ["1", "2"]}, "2", "dog", 1),
        ({"text": ["cat", "dog"], "label": ["1", "2"]}, "2", "2", 1),
        ({"text": ["cat", "dog"], "label": ["1", "2"]}, "2", "(B)", 1),
        ({"text": ["cat", "dog"], "label": ["1", "2"]}, "2", "1, 2", 0),
        ({"A": "cat", "B": "dog", "C": None}, "B", "dog", 1),
        (["A mammal", "A bird"], "B", "a bird", 1),
        (["A mammal", "A bird"], "A", "a bird", 0),
        (["1, 2", "1, 3"], "A", "1, 2", 1),
        (["yes", "no"], "B. no", "B", 1),
        (["cat", "dog"], "B", "dog (B)", 1),
        (["cat", "dog"], "B", "B (dog)", 1),
        (["cat", "dog"], "B", "cat (B)", 0),
    ],
)
def test_options_in_all_their_forms(choices, truth, answer, expected):
    assert reward(f"<answer>{answer}</answer>", truth, choices) == expected


@pytest.mark.parametrize(
    ("choices", "truth", "error"),
    [
        ("A, B", "A", TypeError),
        (5, "A", TypeError),
        ({"text": ["cat"], "label": ["A", "B"]}, "A", ValueError),
        (["cat", "dog"], "A, C", ValueError),
        (["cat", "dog"], ["A", "emu"], ValueError),
        (["cat", "dog"], [], ValueError),
        (["cat", "dog"], 2, ValueError),
    ],
)
def test_unusable_options(choices, truth, error):
    with pytest.raises(error):
        check_truth("accuracy", {"choices": "options"}, truth, {"options": choices})


# -- time

HEAVY = [
    "9^{9^{9^9}}",
    "9**9**9**9",
    "10^{9999!}",
    "\\binom{1000000}{500000}",
    "(x+1)^{9999}",
    "2^{999}^{999}",
    "\\int_0^1 e^{x^2} \\sin(x^3) dx",
    "\\prod_{i=1}^{99999} i",
    "\\sum_{i=1}^{10^9} i",
    "100!!",
    "e^{e^{e^{e^{10}}}}",
    "((x+1)^{99})^{99}",
    "\\sqrt{" * 100,
    "(" * 5000,
    "1+" * 5000 + "1",
    "9" * 20000,
    "<think></think>" * 2000,
    "\\boxed{" * 2000,
    "A, " * 2000,
    "the answer is " * 2000,
    "x=" * 2000,
    "**" * 3000,
    "$" * 3001,
    "\\" * 4000,
    "1 " * 4000,
    "\u200b" * 5000 + "5",
    "\\text{" * 900,
    "\\frac{1}{0}",
    "1e999999",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("truth", ["4", "x^2+1", "3, 5, 7", "Paris", "x^{x^2}", "2x + 3y = 6"])
def test_no_answer_takes_long(truth):
    reward("\\sqrt{8}", "2\\sqrt{2}")  # imports sympy
    for text in HEAVY:
        start = time.process_time()
        assert reward(f"<answer>{text}</answer>", truth) == 0.0
        assert time.process_time() - start < 2, text[:50]


def test_an_answer_on_which_a_parser_breaks_is_wrong(monkeypatch):
    def broken(answer, truth):
        raise RecursionError("too deep")

    monkeypatch.setattr("recap_fast.rewards.answers.same", broken)
    found = reward("<answer>x</answer>", "4")
    assert found == 0.0
    assert isinstance(found, Unreadable)
    assert "RecursionError: too deep" in found.reason


def test_frequent_answers_need_no_sympy():
    code = (
        "import sys\n"
        "from recap_fast.rewards.functions import accuracy\n"
        "from recap_fast.types import RewardSample\n"
        "for truth in ('42', '1/2', 'Paris', 'B', '3, 5', '(0, 5]', 'x = 5', '5 cm'):\n"
        "    for text in ('42', '0.5', 'London', 'The answer is B.', '3, 5', 'x = 4'):\n"
        "        accuracy(RewardSample(f'<answer>{text}</answer>', truth, {}, 1, 1, 'stop'))\n"
        "print('sympy' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
