"""Boxes in an image: reading them, and their overlap with the true one."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from recap_fast.rewards.commitment import closing, extract_answer, spoken
from recap_fast.types import MODEL_IMAGE_SIZES, ORIGINAL_IMAGE_SIZES, RewardSample

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_BETWEEN = r"(?:\s*[,;]\s*|\s+)"
_PAIR = rf"[\[(]\s*{_NUMBER}{_BETWEEN}{_NUMBER}\s*[\])]"
_BOX = re.compile(
    rf"[\[(]\s*{_NUMBER}(?:{_BETWEEN}{_NUMBER}){{3}}\s*,?\s*[\])]"  # [x1, y1, x2, y2]
    rf"|{_PAIR}(?:\s*,?\s*{_PAIR})+"  # (x1,y1),(x2,y2); more corners are no box
)
_BARE_BOX = re.compile(rf"(?<![\w.]){_NUMBER}(?:{_BETWEEN}{_NUMBER}){{3}}(?!\w)")
_ANY_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}")
_MARKS = re.compile(
    r"<\|object_ref_start\|>.*?<\|object_ref_end\|>|<\|box_(?:start|end)\|>", re.DOTALL
)
"""Around the object's name and the box, as Qwen2-VL writes them."""
_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)\s*(?=[\[\](){}])")
_LIST = re.compile(rf"[\[(]\s*{_NUMBER}(?:{_BETWEEN}{_NUMBER}){{2,}}\s*,?\s*[\])]")
"""Three numbers or more, but no box: half of one, or corners of several."""
_ANSWER_END = re.compile(r"</answer>|\\(?:boxed|fbox)\s*(?=\{)")
_Box = tuple[float, float, float, float]  # x1, y1, x2, y2
_Extent = tuple[float, float]  # how many units an image is wide and high

BoxFormat = Literal["xyxy", "xywh"]
BoxUnits = Literal["pixels", "fraction", "thousandths"]

_UNITS: dict[BoxUnits, _Extent | None] = {
    "pixels": None,
    "fraction": (1.0, 1.0),
    "thousandths": (1000.0, 1000.0),
}
_OUTSIDE = 0.02
"""By how much of the image's side a true box may reach over its edge; annotators' boxes do, by a
pixel or two. More means that the truth is in other units."""


def iou(
    sample: RewardSample,
    *,
    box_format: BoxFormat = "xyxy",
    units: BoxUnits = "pixels",
    answer_units: BoxUnits = "pixels",
    threshold: float | None = None,
) -> float:
    """Intersection over union of the box in the answer and the true one, in [0, 1].

    The answer's box is [x1, y1, x2, y2] with x1 < x2 and y1 < y2, alone or in JSON, or
    (x1,y1),(x2,y2), as Qwen2-VL writes it, or four numbers without brackets and no others. The
    reward is 0 without one and for several that differ: listing candidates must not pay. What of a
    box lies outside of the image counts as not overlapping.

    Pixels of the truth are those of the image's file, pixels of the answer those of the image as
    the model sees it, after resizing; the sizes of the row's first image connect the two. In a row
    without images both are the same pixels.

    Args:
        box_format: of the truth, "xyxy" or "xywh" (x1, y1, width, height).
        units: of the truth: "pixels", "fraction" (0 to 1 over the image's sides) or "thousandths".
        answer_units: of the answer: what the model was trained to write. Qwen2.5-VL writes
            pixels, Qwen2-VL and Qwen3-VL thousandths.
        threshold: if given, the reward is 1 for an overlap above it and 0 for one up to it.

    Raises:
        ValueError: the truth is no such box, is smaller than a pixel, or lies outside of the image.
    """
    original = _extent(units, sample.entry.get(ORIGINAL_IMAGE_SIZES))
    seen = _extent(answer_units, sample.entry.get(MODEL_IMAGE_SIZES))
    if (original is None) != (seen is None):
        raise ValueError(
            f"the truth is in {units} and the answer in {answer_units}, but the row has no image "
            f"whose size would connect them"
        )
    truth = _true_box(sample.answer, box_format, units)
    box = _committed_box(sample.assistant_turn)
    if original is not None and seen is not None:
        truth = _inside(_relative(truth, original), sample.answer, units)
        box = None if box is None else _relative(box, seen)
    overlap = 0.0 if box is None else _overlap(box, truth)
    return overlap if threshold is None else float(overlap > threshold)


def _extent(units: BoxUnits, sizes: Any) -> _Extent | None:
    """Width and height of the row's first image in the given units; None for pixels of a row
    without images."""
    if units != "pixels" or not sizes:
        return _UNITS[units]
    width, height = sizes[0]
    return float(width), float(height)


def _true_box(answer: Any, box_format: BoxFormat, units: BoxUnits) -> _Box:
    numbers = _numbers(answer)
    if numbers is not None and box_format == "xywh":
        x1, y1, width, height = numbers
        numbers = (x1, y1, x1 + width, y1 + height)
    if numbers is None or not _is_box(numbers):
        shape = "[x1, y1, x2, y2]" if box_format == "xyxy" else "[x1, y1, width, height]"
        raise ValueError(f"the truth must be a box {shape}, got {answer!r}")
    x1, y1, x2, y2 = numbers
    if units == "pixels" and max(x2 - x1, y2 - y1) <= 1:
        raise ValueError(
            f"the true box {answer!r} is smaller than a pixel: is it in fractions of the image "
            f"(units: fraction)?"
        )
    return numbers


def _numbers(answer: Any) -> _Box | None:
    """Four numbers, as a list or in a text."""
    values = _find(answer) if isinstance(answer, str) else answer
    if not isinstance(values, list | tuple) or len(values) != 4:
        return None
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in values):
        return None
    x1, y1, x2, y2 = map(float, values)
    return x1, y1, x2, y2


def _find(text: str) -> tuple[float, ...] | None:
    """The numbers of the one box that a text names, however often; None for none or several."""
    text = _SIZE.sub("", _MARKS.sub(" ", text))
    if _LIST.search(_BOX.sub(" ", text)):
        return None
    found = {_floats(match) for match in _BOX.findall(text)}
    if not found and not any(bracket in text for bracket in "[](){}"):
        bare = _BARE_BOX.search(text)
        if bare is not None and len(_ANY_NUMBER.findall(text)) == 4:
            return _floats(bare[0])
    return found.pop() if len(found) == 1 else None


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in re.findall(_NUMBER, text))


def _box(text: str) -> _Box | None:
    """The box of an answer, if it is one."""
    numbers = _numbers(text)
    return numbers if numbers is not None and _is_box(numbers) else None


def _committed_box(completion: str) -> _Box | None:
    """The box that a completion commits to; None where another one follows it."""
    box = _box(extract_answer(completion))
    text = spoken(completion)
    ends = list(_ANSWER_END.finditer(text))
    if box is None or not ends:
        return box
    end = ends[-1].end()
    if not ends[-1][0].endswith(">"):
        end = closing(text, end) or end
    rest = _SIZE.sub("", _MARKS.sub(" ", text[end:]))
    others = {_floats(match) for match in _BOX.findall(rest)}
    return box if others <= {box} else None


def _is_box(box: _Box) -> bool:
    x1, y1, x2, y2 = box
    return x1 < x2 and y1 < y2 and math.isfinite(_area(box))


def _relative(box: _Box, extent: _Extent) -> _Box:
    """A box in fractions of the image. Overlaps are the same there: both axes are merely scaled."""
    width, height = extent
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _inside(box: _Box, answer: Any, units: BoxUnits) -> _Box:
    """A true box, cut off at the image's edges."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in box)
    far = any(not -_OUTSIDE <= value <= 1 + _OUTSIDE for value in box)
    if far or not _is_box((x1, y1, x2, y2)):
        raise ValueError(
            f"the true box {answer!r} is not inside its image if it is in {units}; is it in other "
            f"units, or has it another box_format?"
        )
    return x1, y1, x2, y2


def _overlap(box: _Box, truth: _Box) -> float:
    width = max(0.0, min(box[2], truth[2]) - max(box[0], truth[0]))
    height = max(0.0, min(box[3], truth[3]) - max(box[1], truth[1]))
    common = width * height
    return common / (_area(box) + _area(truth) - common)


def _area(box: _Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
