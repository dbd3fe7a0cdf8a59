"""The endless stream of one source's rows, as prompts or supervised rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recap_fast.config import DataConfig, SourceConfig
from recap_fast.data.images import (
    BadImage,
    ImageEncoder,
    RawImage,
    decode_image,
    digest,
    image_cells,
    read_image,
)
from recap_fast.data.messages import question_key, question_keys, without_none
from recap_fast.data.prompts import (
    ChatRenderer,
    Message,
    count_markers,
    fill,
    place_images,
    resolve_template,
)
from recap_fast.data.row_columns import (
    DataError,
    RowError,
    read_choices,
    read_column,
    read_images,
    read_question,
    read_target,
    without_column,
)
from recap_fast.data.seeds import permutation
from recap_fast.data.sources import image_folder, open_rows
from recap_fast.rewards.functions import check_truth
from recap_fast.types import (
    MODEL_IMAGE_SIZES,
    ORIGINAL_IMAGE_SIZES,
    PROMPT_OPENS_THINK,
    ImageInput,
    Prompt,
    SupervisedRow,
)

logger = logging.getLogger(__name__)

_MIN_ROWS_FOR_FRACTION = 20  # a share of skipped rows means little before that many

_Key = tuple[str, str]
"""What makes two questions the same: their text, and the digest of their images ("" for none)."""


@dataclass(frozen=True, slots=True)
class _RowImages:
    """A row's images, and how large they were before they were resized."""

    inputs: tuple[ImageInput, ...]
    original_sizes: list[list[int]]


class SourceStream:
    """The rows of one source, its held-out part, its cursor and what it skipped.

    Args:
        config: the source.
        data: limits and tolerances.
        renderer: makes token ids.
        images: the model's image encoder; None for a text model.
        seed: of the run.

    Raises:
        DataError: as `DataStream`.
    """

    def __init__(
        self,
        config: SourceConfig,
        data: DataConfig,
        renderer: ChatRenderer,
        images: ImageEncoder | None,
        seed: int,
    ) -> None:
        self.config = config
        self.drawn = 0
        self.skipped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self._data = data
        self._renderer = renderer
        self._encoder = images
        self._image_folder = image_folder(config)
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._looked_at = 0
        self._first_texts: dict[str, str] = {}  # of each reason to skip a row
        self._excluded: set[_Key] = set()
        self._excluded_texts: set[str] = set()
        self._order: tuple[int, np.ndarray] | None = None  # epoch and its permutation
        if config.images is not None and images is None:
            raise DataError(
                f"source {config.name!r}: has `images`, but the model takes none (or the data "
                f"stream was made without its image encoder)"
            )
        try:
            self._template = resolve_template(config.prompt)
        except ValueError as error:
            raise DataError(f"source {config.name!r}: {error}") from None
        if "{answer}" not in config.target:
            raise DataError(
                f"source {config.name!r}: target must have {{answer}} in it, got {config.target!r}"
            )
        self._has_prompted = False
        self._reward_specs = list(config.reward_specs.values())
        self._rows = open_rows(config, seed)
        self._held_out_built: list[Any] = []
        self._held_out_rows, self.held_out_questions = self._hold_out()

    @property
    def num_training_rows(self) -> int:
        return len(self._rows) - len(self._held_out_rows)

    def exclude(self, questions: set[_Key]) -> None:
        """Keeps rows with these questions from being drawn."""
        self._excluded = questions
        self._excluded_texts = {text for text, _ in questions}

    def held_out(self) -> list[Any]:
        if self.config.images is None:
            return self._held_out_built
        counters = self.skipped.copy(), self.noted.copy(), self._looked_at
        rows = [self._build(self._rows[row], row) for row in self._held_out_rows]
        self.skipped, self.noted, self._looked_at = counters  # they were counted when chosen
        gone = [row for row, built in zip(self._held_out_rows, rows, strict=True) if built is None]
        if gone:
            raise DataError(
                f"source {self.config.name!r}: {self._rows.where(gone[0])}: a held-out row cannot "
                f"be read any more: its images have changed since the run began"
            )
        return rows

    def draw(self, *, counts: bool = True) -> Prompt | SupervisedRow:
        """The next usable row of the endless stream, which `drawn` counts or not."""
        for _ in range(2 * len(self._rows)):  # at least one whole epoch from any position
            row = self._next_row()
            if row in self._held_out_rows:
                continue
            entry = self._rows[row]
            if self._is_excluded(entry, row):
                continue
            built = self._build(entry, row)
            if built is not None:
                self.drawn += counts
                return built
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        raise DataError(
            f"source {self.config.name!r} has no row to train on among {len(self._rows)}: its "
            f"questions all equal held-out ones, or were skipped ({reasons or 'none'})"
            f"{self._first_text()}"
        )

    def draw_again(self, row: int) -> Prompt | SupervisedRow | None:
        """A row that was drawn before, which `drawn` counts and the order does not; None where it
        cannot be used any more."""
        built = self._build(self._rows[row], row)
        self.drawn += built is not None
        return built

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": len(self._rows),
            "epoch": self._epoch,
            "position": self._position,
            "drawn": self.drawn,
            "looked_at": self._looked_at,
            "skipped": dict(self.skipped),
            "noted": dict(self.noted),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._position = state["epoch"], state["position"]
        self.drawn, self._looked_at = state["drawn"], state["looked_at"]
        self.skipped = Counter(state["skipped"])
        self.noted = Counter(state.get("noted", {}))  # cursors of earlier versions have none

    def _hold_out(self) -> tuple[dict[int, None], set[_Key]]:
        """Chooses the held-out rows: numbers, in order, and keys of their (distinct) questions."""
        numbers: dict[int, None] = {}
        questions: set[_Key] = set()
        wanted = self.config.held_out
        order = permutation(len(self._rows), self._seed, self.config.name, "held out")
        # Generated rows may be reserved for it: then what they are made of is held out with them.
        for row in map(int, getattr(self._rows, "held_out_rows", order)):
            if len(numbers) == wanted:
                break
            entry = self._rows[row]
            key = self._key(entry, row)
            if key in questions:
                continue
            built = self._build(entry, row)
            if built is not None:
                assert key is not None
                numbers[row] = None
                questions.add(key)
                if self.config.images is None:
                    self._held_out_built.append(built)
        if len(numbers) < wanted or wanted == len(self._rows):
            raise DataError(
                f"source {self.config.name!r} has {len(self._rows)} rows, {len(numbers)} usable "
                f"ones with distinct questions were found for held_out: {wanted}, and none is "
                f"left to train on; lower held_out{self._first_text()}"
            )
        return numbers, questions

    def _is_excluded(self, entry: Mapping[str, Any], row: int) -> bool:
        """Whether a row asks a held-out question, in its last turn or in an earlier one."""
        try:
            keys = question_keys(self._question(entry, row))
        except RowError:
            return False  # skipped when it is built
        # The text first: reading and hashing images only where the text is the same.
        if not any(text in self._excluded_texts for text, _ in keys):
            return False
        raw = self._raw_images(entry, row)
        return raw is not None and any(
            (text, _digest(raw[images])) in self._excluded for text, images in keys
        )

    def _key(self, entry: Mapping[str, Any], row: int) -> _Key | None:
        """None for a row that cannot be read, and is skipped when it is built."""
        try:
            text = question_key(self._question(entry, row))
        except RowError:
            return None
        raw = self._raw_images(entry, row)
        return None if raw is None else (text, _digest(raw))

    def _raw_images(self, entry: Mapping[str, Any], row: int) -> list[RawImage] | None:
        """A row's images before decoding; None where one cannot be read."""
        try:
            return [read_image(cell, self._image_folder) for cell in self._cells(entry, row)]
        except (BadImage, RowError):
            return None

    def _next_row(self) -> int:
        if self._position == len(self._rows):
            self._epoch, self._position = self._epoch + 1, 0
        if self._order is None or self._order[0] != self._epoch:
            order = permutation(len(self._rows), self._seed, self.config.name, self._epoch)
            self._order = (self._epoch, order)
        self._position += 1
        return int(self._order[1][self._position - 1])

    def _build(self, entry: Mapping[str, Any], row: int) -> Prompt | SupervisedRow | None:
        """Templates and tokenises a row; None, and counted, if it must be skipped."""
        self._looked_at += 1
        try:
            messages = self._messages(self._question(entry, row))
            text = messages[-1]["content"]
            if not self._may_be_rendered(messages, entry, row):
                return None
            images = self._images(entry, row)
            messages = place_images(messages, len(images.inputs))
            if self.config.kind == "rl":
                return self._build_prompt(entry, row, messages, text, images)
            return self._build_supervised(entry, row, messages, images)
        except BadImage as error:
            self._skip(error.reason, row, str(error))
        except RowError as error:
            self._skip("bad_cell", row, error.problem)
        except DataError:
            raise  # too many were skipped
        except (ValueError, TypeError) as error:  # of the chat template, or of the tokenizer
            self._skip("cannot_be_rendered", row, str(error))
        return None

    def _may_be_rendered(
        self, messages: Sequence[Message], entry: Mapping[str, Any], row: int
    ) -> bool:
        """Whether a row has as many markers as images, and no token of images in its text."""
        if self.config.images is not None:
            markers, images = count_markers(messages), len(self._cells(entry, row))
            if markers not in (0, images):
                self._skip(
                    "image_placeholders", row, f"{markers} times <image> for {images} images"
                )
                return False
        texts = [message["content"] for message in messages]
        if self.config.kind == "sft":
            texts.append(read_target(entry, self.config, self._rows.where(row)))
        for text in texts:
            if token := self._renderer.vision_token_in(text):
                self._skip("image_token_in_text", row, f"its text spells out the token {token}")
                return False
        return True

    def _build_prompt(
        self,
        entry: Mapping[str, Any],
        row: int,
        messages: list[Message],
        text: str,
        images: _RowImages,
    ) -> Prompt | None:
        token_ids = self._renderer.prompt(messages, self._image_tokens(images))
        if len(token_ids) > self._data.max_prompt_tokens:
            self._skip("prompt_too_long", row, f"its prompt has {len(token_ids)} tokens")
            return None
        answer = None
        if self.config.answer is not None:
            answer = read_column(entry, self.config.answer, self.config, self._rows.where(row))
        entry = self._for_rewards(entry, images, row)
        if self._renderer.opens_thought(token_ids):
            entry = {**entry, PROMPT_OPENS_THINK: True}
        self._check_thinking(PROMPT_OPENS_THINK in entry)
        for spec in self._reward_specs if self.config.answer is not None else ():
            try:
                check_truth(spec.function, spec.parameters, answer, entry)
            except (ValueError, TypeError, KeyError, ArithmeticError) as error:
                self._skip("bad_answer", row, f"reward {spec.function!r}: {error}")
                return None
        return Prompt(self.config.name, row, token_ids, text, answer, entry, images.inputs)

    def _build_supervised(
        self, entry: Mapping[str, Any], row: int, messages: list[Message], images: _RowImages
    ) -> SupervisedRow | None:
        answer = read_target(entry, self.config, self._rows.where(row))
        if not answer.strip():
            self._skip("empty_target", row, "its target is empty")
            return None
        target = fill(self.config.target, answer=answer)
        token_ids, num_prompt_tokens = self._renderer.supervised(
            messages, target, self._image_tokens(images)
        )
        if len(token_ids) > self._data.max_supervised_tokens:
            self._skip("row_too_long", row, f"prompt and target have {len(token_ids)} tokens")
            return None
        return SupervisedRow(self.config.name, row, token_ids, num_prompt_tokens, images.inputs)

    def _cells(self, entry: Mapping[str, Any], row: int) -> list[Any]:
        if self.config.images is None:
            return []
        where = self._rows.where(row)
        return image_cells(read_images(entry, self.config, where))

    def _images(self, entry: Mapping[str, Any], row: int) -> _RowImages:
        """A row's images, prepared for the model.

        Raises:
            BadImage: one of them cannot be used.
        """
        inputs: list[ImageInput] = []
        sizes: list[list[int]] = []
        for number, cell in enumerate(self._cells(entry, row), start=1):
            assert self._encoder is not None
            try:
                image, is_animated = decode_image(read_image(cell, self._image_folder))
            except BadImage as error:
                name = cell.get("path") if isinstance(cell, Mapping) else cell
                shown = f" ({name[:200]})" if isinstance(name, str) else ""
                raise BadImage(error.reason, f"image {number}{shown}: {error}") from error
            if is_animated:
                self._note("animated_image", row, "of an animation the first frame is used")
            sizes.append(list(image.size))
            inputs.append(self._encoder.encode(image, self.config.max_image_side))
        return _RowImages(tuple(inputs), sizes)

    def _image_tokens(self, images: _RowImages) -> list[int]:
        if self._encoder is None:
            return []
        return [self._encoder.num_tokens(image) for image in images.inputs]

    def _for_rewards(
        self, entry: Mapping[str, Any], images: _RowImages, row: int
    ) -> Mapping[str, Any]:
        """The row as reward workers get it: sizes of images instead of images, which would be sent
        to another process with every rollout, and options without the labels of other rows."""
        choices = self.config.choices
        if choices is not None:
            # By the name that rewards know: a path with dots is no column of the row.
            where = self._rows.where(row)
            has_options = read_choices(entry, self.config, where).texts
            options = read_column(entry, choices, self.config, where) if has_options else None
            is_mapping = isinstance(options, Mapping)
            entry = {**entry, choices: without_none(options) if is_mapping else options}
        if self.config.images is None or self._encoder is None:
            return entry
        sizes = [list(self._encoder.model_size(image)) for image in images.inputs]
        rest = without_column(entry, self.config.images)
        if self.config.images == self.config.question:  # the images stood in the conversation
            rest[self.config.images] = self._question(entry, row)
        return {**rest, ORIGINAL_IMAGE_SIZES: images.original_sizes, MODEL_IMAGE_SIZES: sizes}

    def _check_thinking(self, is_opened: bool) -> None:
        """Says so, once, where a reward's parameter contradicts the prompts."""
        for spec in self._reward_specs if not self._has_prompted else ():
            told = spec.parameters.get(PROMPT_OPENS_THINK, is_opened)
            if spec.function == "thinking_format" and told != is_opened:
                logger.warning(
                    "source %r: thinking_format has prompt_opens_think: %s, but its prompts %s "
                    "with <think>; leave the parameter out to go by the prompts",
                    self.config.name,
                    str(told).lower(),
                    "end" if is_opened else "do not end",
                )
        self._has_prompted = True

    def _skip(self, reason: str, row: int, text: str) -> None:
        """Counts a skipped row, and says so the first time. Raises `DataError` when too many are.

        Args:
            reason: short, part of a metric's name.
            text: what is wrong with the row.
        """
        if reason not in self._first_texts:
            self._first_texts[reason] = f"{self._rows.where(row)}: {text}"
            self._say(reason, "skipped")
        self.skipped[reason] += 1
        total, limit = sum(self.skipped.values()), self._data.max_skipped_fraction
        if self._looked_at >= _MIN_ROWS_FOR_FRACTION and total > limit * self._looked_at:
            reasons = ", ".join(f"{count} {name}" for name, count in self.skipped.items())
            raise DataError(
                f"source {self.config.name!r} skipped {total} of {self._looked_at} rows "
                f"({reasons}), more than data.max_skipped_fraction {limit}{self._limits()}"
                f"{self._first_text()}"
            )

    def _limits(self) -> str:
        """The limits that rows were skipped for."""
        limits = {"prompt_too_long": "max_prompt_tokens", "row_too_long": "max_supervised_tokens"}
        reached = [name for reason, name in limits.items() if self.skipped[reason]]
        return "".join(f"; data.{name} is {getattr(self._data, name)}" for name in reached)

    def _note(self, what: str, row: int, text: str) -> None:
        if what not in self._first_texts:
            self._first_texts[what] = f"{self._rows.where(row)}: {text}"
            self._say(what, "used")
        self.noted[what] += 1

    def _say(self, what: str, verdict: str) -> None:
        logger.warning(
            "source %r: %s: the row is %s; more such rows are only counted (%s)",
            self.config.name,
            self._first_texts[what],
            verdict,
            what,
        )

    def _first_text(self) -> str:
        """What was wrong with the first row skipped for the most frequent reason."""
        for reason, _ in self.skipped.most_common():
            if reason in self._first_texts:
                return f"; the first {reason}: {self._first_texts[reason]}"
        return ""

    def _question(self, entry: Mapping[str, Any], row: int) -> str | list[Message]:
        return read_question(entry, self.config, self._rows.where(row))

    def _messages(self, question: str | list[Message]) -> list[Message]:
        """The conversation, with the template applied to its last turn, the user's."""
        turns: list[Message] = []
        if isinstance(question, str):
            question = [{"role": "user", "content": question}]
        if self.config.system is not None and question[0]["role"] != "system":
            turns.append({"role": "system", "content": self.config.system})
        text = fill(self._template, question=question[-1]["content"])
        return [*turns, *question[:-1], {**question[-1], "content": text}]


def _digest(images: Sequence[RawImage]) -> str:
    return digest(images) if images else ""
