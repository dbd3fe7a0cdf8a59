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


# -- whole kinds of answers: per truth those that are right and those that are not, in tags

IN_TAGS = {
    "words behind a number are no unit": {
        "5": (
            ["5 red apples", "5 apples", "5 inches", "5 miles per hour", "5 km/h", "5 m^2", "5cm"],
            [
                *("5 six", "5 inches six", "5 six seven eight", "5 versus six", "5/six"),
                *("5 hundredths", "5 halves", "5 thirds", "5 dozen", "5 squared", "5 cubed"),
                *("5 factorial", "5 pi", "5 point six", "5 comma six", "5 negative", "5 score"),
                *("5 below zero", "5 incorrect", "5 false", "5 doubtful", "5 too many"),
                *("5 doubled", "5 twice", "5 thousand", "5 and a half", "5 a b c d", "5 square"),
                *("5 fifths", "5 root", "5 mod three", "5 choose two", "5 roughly", "5 wrongly"),
                *("5 out of ten", "5 tenths", "5 quarters", "5 unsure", "5 cubes less"),
            ],
        ),
        "12": (["12 clips in total"], ["12 less one", "12 take away one", "12 remainder three"]),
        "1234": ([], ["1234-ish", "1234ish"]),
        "42": (["42 clips"], ["42 perhaps", "42 supposedly", "42 ish", "42 or so"]),
    },
    "what a sentence goes on with": {
        "5 m": (["She walks 5 meters."], ["It is 5 square meters.", "It is 5 meters per second."]),
        "42": (
            ["There are 42 students.", "She has 42 apples left.", "42 people", "42 boxes of pens"],
            ["It is 42 dozen", "It is 42 and a half", "42 give or take", "42 minus", "42 hundred"],
        ),
    },
    "another unit": {
        "5\\text{ inches}": (
            ["5 inches", "5 in", "5", '5"', "five inches"],
            ["5 square inches", "5 cubic inches", "5 inches^2", "5 cm", "5 inches per second"],
        ),
        "12 cm": (["12cm", "12 centimetres"], ["12 cm squared", "12 cm^2", "12 cm/s", "12 sq cm"]),
        "$18": (["18", "18 dollars", "$18.00"], ["18%", "18 percent", "€18", "18 cents"]),
        "5 tons": (["5 t", "5 ton"], ["5 metric tons", "5 tons of TNT", "5 short tons"]),
        "18%": (["18", "18 percent"], ["$18", "18 dollars"]),
        "5\\text{ m}^2": (["5 square meters", "5 m²"], ["5 m", "5 m^3"]),
        "60 km/h": (["60 km h^{-1}", "60 kilometers per hour", "60 kph"], ["60 km", "60 mph"]),
    },
    "several candidates, of which the last would win": {
        "42": (
            ["x = 42", "Total = 42", "So the answer is **42**.", "Answer: 42", "The total is 42"],
            [
                *("41: 42", "7: 42", "41 -> 42", "41, so 42", "40, 41, so 42", "40\n41\nso 42"),
                *("It is 40. It is 41. It is 42", "1=1, so 42", "1 + 1 = 42", "40 + 3 = 42"),
                *("Everything = 42", "Anything = 42", "1 = 1 = 42", "41 => 42", "41 means 42"),
                *("x = 41, so x = 42", "forty-one, so 42", "41. 42", "41 then 42", "a; 42"),
                "2 \\cdot 3 = 42",
            ],
        ),
        "4": (
            ["n=4", "n = 4 = 4", "2 + 2 = 4", "\\sqrt{16} = 4"],
            ["a: 3\nb: 4", "n=3, n=4 so n=4", "3 is 4", "3 means 4", "\\sqrt{15} = 4"],
        ),
        "73": (["12 + 61 = 73"], ["12 + 60 = 73", "73 = 74", "7 = 73"]),
    },
    "or is no list": {
        "apple, banana": (["apple and banana"], ["apple or banana", "apple, or banana"]),
        "2, 3": (["2 and 3", "x=2 or x=3", "3, 2"], ["2 or 3", "2, or 3", "2 or x=3"]),
        "1,2,3": (["1, 2 and 3"], ["1, 2 or 3", "1 or 2 or 3"]),
        "yes, no": ([], ["yes or no"]),
        "2, -3": (["x=2 or x=-3", "x = 2 \\text{ or } x = -3"], ["2 or -3", "x=2 or y=-3"]),
        "2 or 3": (["2 or 3", "3 or 2", "2, 3"], ["2"]),
    },
    "yes and no with a reason": {
        "yes": (
            ["Yes, because it rains", "Yes.", "Yes - it rains a lot"],
            [
                *("Yes, actually nope", "Yes. Nope.", "yes - the opposite", "Yes, unless not"),
                *("Yes, perhaps", "Yes, I doubt it", "Yes, I don't think so", "Yes, no"),
            ],
        ),
        "true": (["True, as 2 is even"], ["True, but also untrue", "True, false", "True: maybe"]),
    },
    "numbers in words": {
        "-7": (["minus 7", "negative seven", "minus seven", "negative 7"], ["seven", "minus six"]),
        "1234": (
            ["one thousand two hundred thirty-four", "one thousand, two hundred and thirty-four"],
            ["one two three four", "one thousand two hundred thirty-five", "twelve thirty-four"],
        ),
        "3/4": (["three quarters", "three fourths", "3 \\div 4"], ["three thirds", "four thirds"]),
        "5 inches": (["five inches", '5"', "5''"], ["five cm", "six inches", "five square inches"]),
        "15%": (["fifteen percent"], ["fifteen hundred", "fifty percent"]),
        "$18": (["eighteen dollars"], ["eighteen euros", "eighty dollars"]),
        "1000000": (["one million", "a million", "1 million"], ["one billion"]),
        "1/2": (
            ["one half", "a half", "2^{-1}", "\\nicefrac{1}{2}", "\\frac{-1}{-2}"],
            ["two halves", "one third", "2^{-2}", "2^{1}"],
        ),
        "-\\frac{1}{2}": (["\\frac{1}{-2}", "\\frac{-1}{2}"], ["\\frac{1}{2}"]),
    },
    "equations of lines": {
        "y = 2x + 3": (
            ["y - 2x = 3", "2x - y + 3 = 0", "-2x+y=3", "y = 3 + 2x", "2y = 4x + 6"],
            ["y = 2x + 4", "y - 2x = 4", "2x + y = 3", "y = y", "y = 2x"],
        ),
        "x = 5": (["x = 5", "5 = x"], ["2x+1=11", "2x = 10", "x - 5 = 0"]),
    },
    "intervals and empty sets": {
        "(-\\infty,-1)\\cup(1,\\infty)": (
            [
                *("x<-1 or x>1", "x < -1 \\text{ or } x > 1", "(-∞, -1) or (1, ∞)"),
                *("(-oo,-1) U (1,oo)", "x>1 or x<-1", "(-infinity, -1) ∪ (1, infinity)"),
            ],
            ["x<-1 and x>1", "x<-1", "x<-1 or x>2", "x<-1 or y>1", "(-∞, -1], (1, ∞)"],
        ),
        "[0, 5)": (["[0, 5[", "x\\ge 0 and x<5", "0 <= x < 5"], ["[0, 5]", "]0, 5[", "x<5", "x≥0"]),
        "(-\\infty,3)": (["]-\\infty,3[", "(-oo,3)", "x < 3"], ["]-\\infty,3]", "(-oo, 4)"]),
        "\\emptyset": (
            ["\\{\\}", "{}", "empty set", "the empty set", "\\varnothing", "∅", "\\{ \\}"],
            ["\\{0\\}", "0", "empty", "\\{\\emptyset\\}"],
        ),
        "\\infty": (["infinity", "∞", "+\\infty", "oo"], ["-\\infty", "-infinity", "0"]),
    },
    "matrices and layout": {
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}": (
            [
                "A = \\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
                "\\begin{bmatrix} 1 & 2 \\\\[4pt] 3 & 4 \\end{bmatrix}",
            ],
            ["A = \\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}"],
        ),
        "\\binom{5}{2}": (["\\dbinom{5}{2}", "\\tbinom{5}{2}"], ["\\dbinom{5}{1}"]),
        "xy": (["x\\cdot y", "x*y"], ["x+y", "x"]),
        "101_2": (["101_2", "101_{2}", "101₂"], ["101", "5", "101_3"]),
        "5": (["No. 5", "(5)"], ["101_2", "5_6"]),
        "Paris": (["(Paris)", "It's Paris!"], ["(Paris, Rome)"]),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_TAGS)
def test_answers_in_tags(kind):
    found = {
        (truth, answer): reward(f"<answer>{answer}</answer>", truth)
        for truth, answers in IN_TAGS[kind].items()
        for answer in (*answers[0], *answers[1])
    }
    expected = {
        (truth, answer): float(answer in answers[0])
        for truth, answers in IN_TAGS[kind].items()
        for answer in (*answers[0], *answers[1])
    }
    assert {k: v for k, v in found.items() if v != expected[k]} == {}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("The answer is 41.\nThe answer is 42.", 0),
        ("The answer is 42. The answer is 42.", 1),
        ("\\boxed{42}. Wait, the answer is 41.", 0),
        ("\\boxed{42} is wrong, it is 41", 0),
        ("\\boxed{42} is wrong", 0),
        ("\\boxed{42}\n\nNo, it is not.", 0),
        ("<answer>42</answer> Actually it is 41.", 0),
        ("<answer>42</answer> I doubt it.", 0),
        ("<answer>42</answer>\nThe answer is 41.", 0),
        ("\\boxed{42}. I hope this helps!", 1),
        ("So $x = \\boxed{42}$ is the answer.", 1),
        ("<answer>42</answer>\nThis is what was asked for.", 1),
        ("\\boxed{42}\n\nThe answer is 42.", 1),
        ("It's 42!", 1),
        ("<Answer>42</Answer>", 1),
        ("\\boxed{42} 41", 0),
        ("<answer>42</answer> 41", 0),
        ("\\boxed{42}, I made an error", 0),
        ("\\boxed{42}. Correction: 41", 0),
        ("#### 42\nwait, 41", 0),
        ("#### 41\n#### 42", 0),
        ("It is not \\boxed{42}", 0),
        ("The answer isn't \\boxed{42}.", 0),
        ("Not <answer>42</answer>", 0),
        ("Maybe \\boxed{42}", 0),
        ("Answer: 41\nAnswer: 42", 0),
        ("The solution is easy. The answer is 42.", 1),
        ("So \\boxed{42} is the answer, as 40 + 2 = 42.", 1),
        ("\\boxed{42} clips in May.", 1),
        ("<answer>42</answer>.", 1),
        ("<answer>42</answer> The answer is correct.", 1),
        ("\\boxed{42}.\n\nThis is because 6 times 7 is 42.", 1),
        ("\\boxed{42}.\n\nThis is because 6 times 7 is 41.", 0),
        ("<answer>Step 1: add 40 and 2.\nThe answer is 42.</answer>", 1),
        ("<ANSWER>41</ANSWER> <answer>42</answer>", 0),
    ],
)
def test_what_is_said_around_an_answer(completion, expected):
    assert reward(completion, "42") == expected


@pytest.mark.parametrize(
    "truth",
    [
        *("$$", "$", "\\\\", "**", "\\text{}", "{}", "<think>", "nan", "NaN", "inf", "-inf", " "),
        *(
            "<answer>a</answer><answer>b</answer>",
            "\\boxed{}",
            "####",
            "''",
            "$ $",
            "\\(\\)",
            "...",
        ),
    ],
)
def test_truths_that_say_nothing(truth):
    with pytest.raises(ValueError, match="truth"):
        check_truth("accuracy", {}, truth, {})


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
    "\\gamma(3000000)",
    "\\zeta(3000001)",
    "\\Gamma(3000000)",
    "\\log(9999999999)!",
    "\\frac{1}{1+" * 12 + "2" + "}" * 12,
    "\\sqrt{1+" * 12 + "2" + "}" * 12,
    "\n" * 50000,
    "\\boxed{" * 3000 + "41" + "}" * 3000,
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
