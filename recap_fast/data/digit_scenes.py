"""Digit scenes: an offline benchmark with the paper's three kinds of objectives, on real images.

scikit-learn's handwritten digits (8 x 8 pixels) are enlarged and placed on small canvases, and one
of three tasks asks about each canvas:

- `range`, reasoning: "What is the largest digit minus the smallest?". Accuracy and thinking format.
- `locate`, grounding: "Where is the 7 on the left?". IoU with the ink's box, and answer format.
- `transcribe`, OCR: "Read the digits from left to right.". Next-token loss.

A row is drawn from its number when it is asked for. The held-out rows show images of digits that no
other row shows, and are the same for every seed: scores of different seeds are then scores on the
same test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from recap_fast.data.seeds import seed_of

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT = 64, 32
"""Size of a canvas in pixels: 32 image tokens at a patch of 4 and a merge of 2."""

MAX_DIGITS = 3
SIZE = 16
"""Side of an enlarged digit in pixels. MAX_DIGITS fit side by side."""
STEP = 8
"""Digits stand at multiples of this many pixels, the side of an image token. Anywhere else, a model
of this size needs several times as many rows to learn to read them."""

_INK = 64  # of 255: a paler pixel is the blur of enlarging and not part of the digit
_HELD_OUT_SHARE = 0.2
_SPLIT_SEED = 0  # one split for all runs: a base must not have seen what a later run is tested on

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PlacedDigit:
    """One digit of a scene; `box` is that of its ink: x1, y1, x2, y2 in pixels, ends excluded."""

    value: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """An RGB image of WIDTH x HEIGHT pixels, and its digits from left to right."""

    image: Image
    digits: tuple[PlacedDigit, ...]


class SceneRows:
    """The rows of one task, as a source of the data stream.

    A row has the columns `question`, `answer` (a text), `worked` (the answer as a good reply gives
    it: thoughts and tags), `short` (without the thoughts) and `image`.

    Args:
        task: one of `TASKS`.
        size: how many rows there are, the held-out ones included.
        held_out: how many of them, from row 0 on, show held-out digits.
        seed: determines the other rows.
    """

    def __init__(self, task: str, *, size: int, held_out: int, seed: int) -> None:
        self._task, self._size, self._seed = task, size, seed
        self.held_out_rows = range(min(held_out, size))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        is_held_out = row in self.held_out_rows
        seed = None if is_held_out else self._seed
        random = np.random.RandomState(seed_of(self._task, seed, row))
        pool = digit_split()[is_held_out]
        # Held-out rows must differ: each begins with another digit.
        first = int(pool[row % len(pool)]) if is_held_out else None
        fewest, make_row = _TASKS[self._task]
        return make_row(draw_scene(random, pool, fewest, first), random)

    def where(self, row: int) -> str:
        return f"digit scenes {self._task!r}: row {row}"


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8] uint8 from 0 (paper) to 255 (ink), and their values [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target


@lru_cache(maxsize=1)
def digit_split() -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the digit images for training, and of those held out; they are disjoint."""
    images, _ = _digits()
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(images))
    held_out = round(_HELD_OUT_SHARE * len(images))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@lru_cache(maxsize=2048)  # every digit: 0.5 MB
def _tile(number: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A digit enlarged to [SIZE, SIZE] uint8, and the box of its ink."""
    from PIL import Image

    picture = Image.fromarray(_digits()[0][number]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    tile = np.asarray(picture)
    columns, rows = (np.flatnonzero((tile >= _INK).any(axis)) for axis in (0, 1))
    return tile, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def draw_scene(
    random: np.random.RandomState, pool: np.ndarray, fewest: int = 1, first: int | None = None
) -> Scene:
    """Places `fewest` to MAX_DIGITS digits beside each other, at random heights and gaps.

    Args:
        pool: numbers of the digit images to choose from.
        first: number of the image of the digit on the left, instead of a random one.
    """
    from PIL import Image

    count = random.randint(fewest, MAX_DIGITS + 1)
    numbers = random.choice(pool, count)
    if first is not None:
        numbers[0] = first
    # Sorted shifts within what the digits leave free: no two overlap, and none has to be redrawn.
    shifts = np.sort(random.randint(0, (WIDTH - count * SIZE) // STEP + 1, count))
    lefts = STEP * shifts + SIZE * np.arange(count)
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    placed = []
    for number, x in zip(numbers.tolist(), lefts.tolist(), strict=True):
        y = STEP * random.randint(0, (HEIGHT - SIZE) // STEP + 1)
        tile, (x1, y1, x2, y2) = _tile(number)
        canvas[y : y + SIZE, x : x + SIZE] = tile
        placed.append(PlacedDigit(int(_digits()[1][number]), (x + x1, y + y1, x + x2, y + y2)))
    return Scene(Image.fromarray(canvas).convert("RGB"), tuple(placed))


def references(digits: tuple[PlacedDigit, ...]) -> list[tuple[str, PlacedDigit]]:
    """Every phrase that means exactly one of the digits, with that digit."""
    found = [("the digit on the left", digits[0]), ("the digit on the right", digits[-1])]
    values = [digit.value for digit in digits]
    for value in sorted(set(values)):
        same = [digit for digit in digits if digit.value == value]
        if len(same) == 1:
            found.append((f"the {value}", same[0]))
        else:
            found.append((f"the {value} on the left", same[0]))
            found.append((f"the {value} on the right", same[-1]))
    for name, extreme in (("largest", max(values)), ("smallest", min(values))):
        if values.count(extreme) == 1:
            found.append((f"the {name} digit", digits[values.index(extreme)]))
    return found


def _range(scene: Scene, random: np.random.RandomState) -> Row:
    values = [digit.value for digit in scene.digits]
    largest, smallest = max(values), min(values)
    answer = str(largest - smallest)
    thoughts = f"{' '.join(map(str, values))} : {largest} - {smallest} = {answer}"
    short = f"<answer> {answer} </answer>"
    return {
        "question": "What is the largest digit minus the smallest?",
        "answer": answer,
        "worked": f"<think> {thoughts} </think> {short}",
        "short": short,
        "image": scene.image,
    }


def _locate(scene: Scene, random: np.random.RandomState) -> Row:
    found = references(scene.digits)
    phrase, digit = found[random.randint(len(found))]
    box = str(list(digit.box))
    worked = f"<answer>{box}</answer>"
    return {
        "question": f"Where is {phrase}?",
        "answer": box,
        "worked": worked,
        "short": worked,
        "image": scene.image,
    }


def _transcribe(scene: Scene, random: np.random.RandomState) -> Row:
    text = " ".join(str(digit.value) for digit in scene.digits)
    return {
        "question": "Read the digits from left to right.",
        "answer": text,
        "worked": text,
        "short": text,
        "image": scene.image,
    }


_TASKS: dict[str, tuple[int, Callable[[Scene, np.random.RandomState], Row]]] = {
    "range": (2, _range),
    "locate": (1, _locate),
    "transcribe": (1, _transcribe),
}
"""Fewest digits of a scene, and what is asked about it."""
TASKS = tuple(_TASKS)
"""Names of the tasks."""
