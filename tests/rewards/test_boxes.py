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
        ("[9, 9, 9, 9] or [0, 0, 10, 10]", [0, 0, 10, 10], 1.0),
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


@pytest.mark.parametrize("truth", [None, [1, 2, 3], "box", [10, 10, 0, 0], 5, ["a"] * 4])
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
