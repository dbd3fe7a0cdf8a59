"""Boxes in answers and truths, and their overlap."""

from __future__ import annotations

import pytest

from recap_fast.rewards.boxes import iou
from recap_fast.types import RewardSample

SIZES = {"original_image_sizes": [[200, 100]], "model_image_sizes": [[100, 50]]}


def tagged(text, answer, **entry):
    return RewardSample(f"Well. <answer>{text}</answer>", answer, entry, 10, 100, "stop")


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("[0, 0, 10, 10]", [0, 0, 10, 10], 1.0),
        ("[0,0,10,10]", "[0, 0, 10, 10]", 1.0),
        ("[5, 0, 15, 10]", [0, 0, 10, 10], 50 / 150),
        ("[2.5, 2.5, 7.5, 7.5]", [0.0, 0.0, 10.0, 10.0], 0.25),
        ("[-5, -5, 5, 5]", [0, 0, 10, 10], 25 / 175),
        ("[20, 20, 30, 30]", [0, 0, 10, 10], 0.0),
        ("[10, 0, 20, 10]", [0, 0, 10, 10], 0.0),
        ("[0, 0, 10, 10] (that is [0.0, 0, 1e1, 10])", [0, 0, 10, 10], 1.0),
        ('{"bbox_2d": [0, 0, 10, 10]}', [0, 0, 10, 10], 1.0),
        ("[10, 10, 0, 0]", [0, 0, 10, 10], 0.0),
        ("[0, 0, 10]", [0, 0, 10, 10], 0.0),
        ("[0, 0, 10, 10, 10]", [0, 0, 10, 10], 0.0),
        ("[a, b, c, d]", [0, 0, 10, 10], 0.0),
        (f"[0, 0, {'9' * 400}, 10]", [0, 0, 10, 10], 0.0),
        ("nothing", [0, 0, 10, 10], 0.0),
    ],
)
def test_iou(text, truth, expected):
    assert iou(tagged(text, truth)) == pytest.approx(expected)


REF = "<|object_ref_start|>the cat [2, 2, 9, 9]<|object_ref_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "(0,0),(10,10)",
        "<|box_start|>(0,0),(10,10)<|box_end|>",
        f"{REF}<|box_start|>(0,0),(10,10)<|box_end|>",
        f"{REF}<|box_start|>[0, 0, 10, 10]<|box_end|>",
        "(0, 0) (10, 10)",
        "[0, 0], [10, 10]",
        "[[0, 0], [10, 10]]",
        "[(0, 0), (10, 10)]",
        "(0, 0, 10, 10)",
        "[.0, 0., +10, 1e1]",
        "[0e0, 0, 1E+1, 100e-1]",
        "[0, 0, 10, 10, ]",
        "[0 0 10 10]",
        "[0; 0; 10; 10]",
        "[[0, 0, 10, 10]]",
        "[\n0,\n0,\n10,\n10\n]",
        "0, 0, 10, 10",
        "0 0 10 10",
        "The box is 0, 0, 10, 10.",
        "x1 to y2: 0, 0, 10, 10",
        '```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "cat 7"}]\n```',
        '{"bbox": [0, 0, 10, 10]}',
        "[0, 0, 10, 10] [0, 0, 10, 10]",
        "[0, 0, 10, 10], or (0,0),(10,10)",
    ],
)
def test_boxes_in_every_notation(text):
    assert iou(tagged(text, [0, 0, 10, 10])) == 1.0
    assert iou(tagged("[0, 0, 10, 10]", text)) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        # Lists of candidates, the right one among them.
        "[9, 9, 19, 19] or [0, 0, 10, 10]",
        "[0, 0, 10, 10] or [9, 9, 9, 9]",
        "[[0, 0, 10, 10], [0, 0, 11, 11]]",
        "(0,0),(10,10) and (0,0),(11,11)",
        "[0, 0, 10, 10] (0,0),(11,11)",
        '[{"bbox_2d": [0, 0, 10, 10]}, {"bbox_2d": [1, 1, 5, 5]}]',
        "(0,0),(10,10),(5,5)",
        "(0,0),(10,0),(10,10),(0,10)",
        # Four numbers among others, or within brackets that do not close.
        "0, 0, 10, 10, 10",
        "0, 0, 10, 10 and 3",
        "4 cats: 0, 0, 10",
        "[0, 0, 10, 10",
        "(0,0),(10,10",
        "0, 0, 10, 10]",
        "0, 0 to 10, 10",
        "0-0-10-10",
        "[0, 0, 1e999, 10]",
        "[0, 0, 10, 10, 10, 10, 10, 10]",
        "(0,0)",
        "[10, 10], [0, 0]",
        "",
    ],
)
def test_what_is_no_box_or_more_than_one(text):
    assert iou(tagged(text, [0, 0, 10, 10])) == 0.0


def test_tags_make_one_of_several_the_answer():
    thoughts = "<think>[1, 1, 2, 2] or [3, 3, 4, 4]?</think>"
    answers = ("<answer>[0, 0, 10, 10]</answer>", "\\boxed{[0, 0, 10, 10]}", "[0, 0, 10, 10]")
    for answer in answers:
        sample = RewardSample(thoughts + answer, [0, 0, 10, 10], {}, 10, 100, "stop")
        assert iou(sample) == 1.0


@pytest.mark.thinned(3)
@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text", ["[" * 9999, "1 " * 9999, "(1,1)," * 9999, "[1,1,1," * 9999, "9" * 9999]
)
def test_long_answers_are_read_at_once(text):
    assert iou(tagged(text, [0, 0, 10, 10])) == 0.0


@pytest.mark.parametrize(
    "truth", [None, "[0, 0, 1, 1] [0, 0, 2, 2]", [1, 2, 3], "box", [10, 10, 0, 0], 5, ["a"] * 4]
)
def test_iou_with_an_unusable_truth(truth):
    with pytest.raises(ValueError, match="the truth must be a box"):
        iou(tagged("[0, 0, 10, 10]", truth))


@pytest.mark.parametrize(
    ("text", "truth", "parameters", "expected"),
    [
        # Pixels of the file against pixels of the image as the model sees it, half as large.
        ("[10, 10, 50, 30]", [20, 20, 100, 60], {}, 1.0),
        ("[20, 20, 100, 60]", [20, 20, 100, 60], {}, 30 * 10 / (80 * 40 + 40 * 20 - 30 * 10)),
        ("[10, 10, 50, 30]", [20, 20, 80, 40], {"box_format": "xywh"}, 1.0),
        ("[10, 10, 50, 30]", [0.1, 0.2, 0.5, 0.6], {"units": "fraction"}, 1.0),
        ("[10, 10, 50, 30]", [0.1, 0.2, 0.4, 0.4], {"units": "fraction", "box_format": "xywh"}, 1),
        ("[10, 10, 50, 30]", [100, 200, 500, 600], {"units": "thousandths"}, 1.0),
        ("[100, 200, 500, 600]", [20, 20, 100, 60], {"answer_units": "thousandths"}, 1.0),
        ("[0.1, 0.2, 0.5, 0.6]", [20, 20, 100, 60], {"answer_units": "fraction"}, 1.0),
        ("[10, 10, 50, 30]", "<answer>[20, 20, 100, 60]</answer>", {}, 1.0),
        ("[10, 10, 50, 30]", (20, 20.0, 100, 60), {}, 1.0),
        # A truth a pixel over the edge is cut off; an answer beyond the edge counts as it is.
        ("[0, 0, 100, 50]", [-1, 0, 201, 100], {}, 1.0),
        ("[0, 0, 200, 50]", [0, 0, 200, 100], {}, 0.5),
        ("[300, 300, 400, 400]", [20, 20, 100, 60], {}, 0.0),
        ("[50, 30, 10, 10]", [20, 20, 100, 60], {}, 0.0),
        ("[10, 10, 40, 20]", [20, 20, 80, 40], {"box_format": "xywh"}, 0.375),
    ],
)
def test_iou_in_units(text, truth, parameters, expected):
    assert iou(tagged(text, truth, **SIZES), **parameters) == pytest.approx(expected)


def test_iou_threshold():
    half = tagged("[0, 0, 5, 10]", [0, 0, 10, 10])
    assert iou(half) == 0.5
    assert iou(half, threshold=0.5) == 0.0
    assert iou(half, threshold=0.49) == 1.0
    assert iou(tagged("nothing", [0, 0, 10, 10]), threshold=0.0) == 0.0


def test_iou_units_without_an_image():
    same = {"units": "fraction", "answer_units": "thousandths"}
    assert iou(tagged("[100, 200, 500, 600]", [0.1, 0.2, 0.5, 0.6]), **same) == pytest.approx(1)
    with pytest.raises(ValueError, match="the row has no image whose size would connect them"):
        iou(tagged("[1, 1, 2, 2]", [0.1, 0.2, 0.5, 0.6]), units="fraction")
    assert iou(tagged("[0, 0, 9, 9]", [0, 0, 9, 9], **{k: [] for k in SIZES})) == 1.0


@pytest.mark.parametrize(
    ("truth", "parameters", "message"),
    [
        ([20, 20, 300, 60], {}, "not inside its image if it is in pixels"),
        ([-20, 20, 100, 60], {}, "not inside its image"),
        ([20, 20, 100, 60], {"units": "fraction"}, "not inside its image if it is in fraction"),
        ([300, 20, 310, 60], {}, "other units"),
        ([201, 20, 203, 60], {}, "not inside its image"),
        ([0, 0, 0, 10], {"box_format": "xywh"}, r"a box \[x1, y1, width, height\]"),
        ([0, 0, float("nan"), 10], {}, "the truth must be a box"),
        ([0, 0, float("inf"), 10], {}, "the truth must be a box"),
        ([[0, 0, 10, 10]], {}, "the truth must be a box"),
        ([True, 0, 10, 10], {}, "the truth must be a box"),
    ],
)
def test_iou_with_a_truth_in_other_units(truth, parameters, message):
    with pytest.raises(ValueError, match=message):
        iou(tagged("[10, 10, 50, 30]", truth, **SIZES), **parameters)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>[0, 0, 10, 10]</answer>[5, 5, 9, 9]", 0.0),
        ("<answer>[0, 0, 10, 10]</answer> or (5,5),(9,9)", 0.0),
        ("\\boxed{[0, 0, 10, 10]} [5, 5, 9, 9]", 0.0),
        ("<answer>[0, 0, 10, 10]</answer>\\boxed{[5, 5, 9, 9]}", 0.0),
        ("<answer>[1, 2, 3][0, 0, 10, 10]</answer>", 0.0),
        ("<answer>[0, 0, 10, 10] (1, 2, 3, 4, 5)</answer>", 0.0),
        ("<answer>[0, 0, 10, 10]</answer> That is [0, 0, 10, 10].", 1.0),
        ("The dog is at [5, 5, 9, 9]. <answer>[0, 0, 10, 10]</answer>", 1.0),
        ("<think>[5, 5, 9, 9]</think><answer>[0, 0, 10, 10]</answer>", 1.0),
        ("\\boxed{\\left[0, 0, 10, 10\\right]}", 1.0),
        ("<answer>\\left( 0, 0, 10, 10 \\right)</answer>", 1.0),
    ],
)
def test_one_box_is_committed_to(completion, expected):
    assert iou(RewardSample(completion, [0, 0, 10, 10], {}, 10, 100, "stop")) == expected
