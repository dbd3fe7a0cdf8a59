"""Digit scenes: what they say about themselves is true, and held-out digits stay out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from recap_fast.config import SourceConfig
from recap_fast.data import digit_scenes as scenes
from recap_fast.data.digit_scenes import (
    HEIGHT,
    MAX_DIGITS,
    TASKS,
    WIDTH,
    PlacedDigit,
    SceneRows,
    digit_split,
    draw_scene,
    references,
)
from recap_fast.data.sources import open_rows
from recap_fast.rewards.functions import accuracy, iou, thinking_format
from recap_fast.types import RewardSample


def _rows(task: str, seed: int = 0, held_out: int = 4) -> SceneRows:
    return SceneRows(task, size=60, held_out=held_out, seed=seed)


def _sample(row, completion: str) -> RewardSample:
    return RewardSample(completion, row["answer"], row, 1, 99, "stop")


def test_training_and_held_out_digits_are_disjoint(monkeypatch):
    training, held_out = digit_split()
    assert len(training) + len(held_out) == 1797
    assert not set(training) & set(held_out)

    pools = []
    monkeypatch.setattr(
        scenes,
        "draw_scene",
        lambda random, pool, *args: pools.append(pool) or draw_scene(random, pool, *args),
    )
    rows = _rows("range")
    for number in (0, 3, 4, 59):
        rows[number]
    assert [pool is held_out for pool in pools] == [True, True, False, False]


@pytest.mark.parametrize("task", TASKS)
def test_a_row_depends_on_seed_and_number_alone_and_held_out_rows_on_the_number(task):
    one, again, other = _rows(task, seed=1), _rows(task, seed=1), _rows(task, seed=2)
    assert one[7] == again[7]
    assert one[7]["image"].tobytes() != other[7]["image"].tobytes()
    assert one[7]["image"].tobytes() != one[8]["image"].tobytes()
    assert one[2] == other[2]


def test_held_out_rows_differ_from_each_other():
    rows = SceneRows("transcribe", size=359, held_out=359, seed=0)
    assert len({rows[number]["image"].tobytes() for number in range(359)}) == 359


def test_boxes_hold_all_the_ink_of_their_digits_and_digits_do_not_overlap():
    random = np.random.RandomState(3)
    counts = set()
    for _ in range(40):
        scene = draw_scene(random, digit_split()[0])
        counts.add(len(scene.digits))
        pixels = np.asarray(scene.image)
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        ink = pixels[..., 0] >= scenes._INK
        right = 0
        for digit in scene.digits:
            x1, y1, x2, y2 = digit.box
            assert right <= x1 < x2 <= WIDTH
            assert 0 <= y1 < y2 <= HEIGHT
            inside = ink[y1:y2, x1:x2]
            # Tight: every side of the box touches ink.
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            ink[y1:y2, x1:x2] = False
            right = x2
        assert not ink.any()
    assert counts == set(range(1, MAX_DIGITS + 1))


def test_references_mean_one_digit_each():
    boxes = [(10 * i, 0, 10 * i + 5, 9) for i in range(4)]
    digits = tuple(PlacedDigit(v, box) for v, box in zip((7, 2, 7, 9), boxes, strict=True))
    assert dict(references(digits)) == {
        "the digit on the left": digits[0],
        "the digit on the right": digits[3],
        "the 2": digits[1],
        "the 7 on the left": digits[0],
        "the 7 on the right": digits[2],
        "the 9": digits[3],
        "the largest digit": digits[3],
        "the smallest digit": digits[1],
    }
    # Two largest digits: the phrase would mean both.
    assert "the largest digit" not in dict(references((digits[0], digits[2])))


def test_good_replies_earn_the_rewards_of_their_task():
    for number in range(20):
        row = _rows("range")[number]
        assert accuracy(_sample(row, row["worked"])) == 1
        assert thinking_format(_sample(row, row["worked"])) == 1
        assert accuracy(_sample(row, row["short"])) == 1
        assert thinking_format(_sample(row, row["short"])) == 0
        seen, difference = row["worked"].split("<think>")[1].split("=")[0].split(":")
        digits = sorted(map(int, seen.split()))
        assert len(digits) in (2, 3)
        assert [digits[-1], digits[0]] == [int(term) for term in difference.split("-")]
        assert str(digits[-1] - digits[0]) == row["answer"]

        row = _rows("locate")[number]
        assert iou(_sample(row, row["worked"])) == 1
        x1, y1, x2, y2 = json.loads(row["answer"])
        assert iou(_sample(row, f"<answer>[{x1}, {y1}, {x2}, {y2 + 5}]</answer>")) < 1


def test_transcription_reads_the_scene_of_its_image(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        scenes, "draw_scene", lambda *args: drawn.append(draw_scene(*args)) or drawn[-1]
    )
    row = _rows("transcribe")[10]
    assert row["answer"] == " ".join(str(digit.value) for digit in drawn[0].digits)
    assert row["image"] is drawn[0].image


def test_a_source_can_name_a_task():
    config = SourceConfig.model_validate(
        {
            "name": "reading", "kind": "sft", "digit_scenes": "transcribe", "images": "image",
            "size": 30, "held_out": 5,
        }
    )  # fmt: skip
    rows = open_rows(config, seed=0)
    assert len(rows) == 30
    assert rows.where(3) == "digit scenes 'transcribe': row 3"
    assert rows.held_out_rows == range(5)


def test_a_source_is_one_thing_only():
    with pytest.raises(ValueError, match="exactly one of `path`, `reasoning_gym` and `digit_sce"):
        SourceConfig.model_validate(
            {"name": "x", "kind": "sft", "digit_scenes": "range", "reasoning_gym": "chain_sum"}
        )
