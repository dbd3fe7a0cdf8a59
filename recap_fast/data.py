"""The mix of all sources: an endless, resumable stream of steps.

The order is a pure function of the seed and the cursor. Every source walks through a new
permutation of its rows in each epoch, and rows are read, templated and tokenised as they are drawn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recap_fast.config import DataConfig, SourceConfig
from recap_fast.prompts import ChatRenderer, Message, fill, resolve_template
from recap_fast.sources import DataError, nearest, open_rows, read_question, read_target, seed_of
from recap_fast.types import Prompt, StepRows, SupervisedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataError", "DataStream", "allocate", "mixing_shares"]

_MIN_ROWS_FOR_FRACTION = 20  # a share of skipped rows means little before that many


class DataStream:
    """The rows of a run, step by step.

    Args:
        config: the sources and their mix.
        tokenizer: a transformers tokenizer.
        seed: determines held-out rows, order, and what procedural sources generate.

    Raises:
        DataError: a source that is missing, malformed, empty, or smaller than its held-out part.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        renderer = ChatRenderer(tokenizer, config.enable_thinking)
        self._batch_size = config.batch_size
        self._seed = seed
        self._sources = {
            source.name: _Source(source, config, renderer, seed) for source in config.sources
        }
        # A question held out of one source is not trained on through another one either.
        held_out = {key for source in self._sources.values() for key in source.held_out_questions}
        for source in self._sources.values():
            source.excluded_questions = held_out
        self._shares = mixing_shares(
            config, {name: source.num_training_rows for name, source in self._sources.items()}
        )

    @property
    def skipped(self) -> dict[str, int]:
        """Rows skipped so far, as {"<source>/<reason>": count}."""
        return {
            f"{name}/{reason}": count
            for name, source in self._sources.items()
            for reason, count in sorted(source.skipped.items())
        }

    def next_step(self) -> StepRows:
        """Draws the next `batch_size` rows: sources in the order of the configuration.

        Raises:
            DataError: a malformed row, a source with no usable row, or one that skipped more
                than `max_skipped_fraction` of its rows.
        """
        drawn = [source.drawn for source in self._sources.values()]
        counts = allocate(self._shares, drawn, self._batch_size)
        step = StepRows(prompts=[], supervised=[])
        for source, count in zip(self._sources.values(), counts, strict=True):
            for _ in range(count):
                row = source.draw()
                if isinstance(row, Prompt):
                    step.prompts.append(row)
                else:
                    step.supervised.append(row)
        return step

    def held_out(self, source_name: str) -> list[Prompt] | list[SupervisedRow]:
        """The rows of a source that are kept out of training: prompts of an rl source,
        supervised rows of an sft source.

        Raises:
            DataError: no source has that name.
        """
        if source_name not in self._sources:
            raise DataError(f"no source {source_name!r}{nearest(source_name, self._sources)}")
        return self._sources[source_name].held_out

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as a JSON-able dict."""
        return {
            "seed": self._seed,
            "shares": list(self._shares),
            "sources": {name: source.state_dict() for name, source in self._sources.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            DataError: the cursor was taken with other sources, another mix or another seed.
        """
        ours = self.state_dict()
        for what in ("seed", "shares"):
            if state[what] != ours[what]:
                raise DataError(
                    f"the checkpoint's data cursor has {what} {state[what]}, this run has "
                    f"{ours[what]}: resume with the data section the run was started with"
                )
        theirs = {name: cursor["rows"] for name, cursor in state["sources"].items()}
        sizes = {name: cursor["rows"] for name, cursor in ours["sources"].items()}
        if theirs != sizes:
            raise DataError(
                f"the checkpoint's data cursor belongs to sources with rows {theirs}, this run's "
                f"have {sizes}: the sources have changed since"
            )
        for name, source in self._sources.items():
            source.load_state_dict(state["sources"][name])


def mixing_shares(config: DataConfig, sizes: Mapping[str, int]) -> list[float]:
    """Share of every source in a step's rows, in the order of `config.sources`; they add up to 1.

    "uniform" gives all sources the same, "proportional" goes by their training rows (the paper's
    PropMix), "coreset" gives the replay sources together half the rows of the others, equally
    within each of the two (the paper's Coreset). Explicit ratios are normalised; sources that they
    leave out get nothing.
    """
    sources = config.sources
    if isinstance(config.mixing, dict):
        ratios = [config.mixing.get(source.name, 0.0) for source in sources]
    elif config.mixing == "proportional":
        ratios = [float(sizes[source.name]) for source in sources]
    elif config.mixing == "coreset":
        num_replay = sum(source.is_replay for source in sources)
        replay, others = 1 / max(num_replay, 1), 2 / max(len(sources) - num_replay, 1)
        ratios = [replay if source.is_replay else others for source in sources]
    else:
        ratios = [1.0] * len(sources)
    return [ratio / sum(ratios) for ratio in ratios]


def allocate(shares: Sequence[float], drawn: Sequence[int], batch_size: int) -> list[int]:
    """How many of the next `batch_size` rows each source gives.

    Row by row, the source that is furthest behind its share of all rows so far is next; the first
    of them on a tie. Random draws would give the same shares on average, but a different mix in
    every step, and that noise would reach the objectives' windows and pass there for instability.

    Args:
        shares: they add up to 1.
        drawn: rows that each source has given before.
    """
    counts = [0] * len(shares)
    total = sum(drawn)
    for _ in range(batch_size):
        total += 1
        deficits = [
            share * total - before - now if share else -np.inf
            for share, before, now in zip(shares, drawn, counts, strict=True)
        ]
        counts[int(np.argmax(deficits))] += 1
    return counts


class _Source:
    """One source: its rows, its held-out part, its cursor and what it skipped."""

    def __init__(
        self, config: SourceConfig, data: DataConfig, renderer: ChatRenderer, seed: int
    ) -> None:
        self.config = config
        self.drawn = 0
        self.skipped: Counter[str] = Counter()
        self.excluded_questions: set[str] = set()
        self._data = data
        self._renderer = renderer
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._looked_at = 0
        self._order: tuple[int, np.ndarray] | None = None  # epoch and its permutation
        try:
            self._template = resolve_template(config.prompt)
        except ValueError as error:
            raise DataError(f"source {config.name!r}: {error}") from None
        if "{answer}" not in config.target:
            raise DataError(
                f"source {config.name!r}: target must have {{answer}} in it, got {config.target!r}"
            )
        self._rows = open_rows(config, seed)
        self._held_out_rows, self.held_out, self.held_out_questions = self._hold_out()

    @property
    def num_training_rows(self) -> int:
        return len(self._rows) - len(self._held_out_rows)

    def draw(self) -> Prompt | SupervisedRow:
        """The next usable row of the endless stream."""
        for _ in range(2 * len(self._rows)):  # at least one whole epoch from any position
            row = self._next_row()
            if row in self._held_out_rows:
                continue
            entry = self._rows[row]
            if _question_key(self._question(entry, row)) in self.excluded_questions:
                continue
            built = self._build(entry, row)
            if built is not None:
                self.drawn += 1
                return built
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        raise DataError(
            f"source {self.config.name!r} has no row to train on among {len(self._rows)}: its "
            f"questions all equal held-out ones, or were skipped ({reasons or 'none'})"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": len(self._rows),
            "epoch": self._epoch,
            "position": self._position,
            "drawn": self.drawn,
            "looked_at": self._looked_at,
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._position = state["epoch"], state["position"]
        self.drawn, self._looked_at = state["drawn"], state["looked_at"]
        self.skipped = Counter(state["skipped"])

    def _hold_out(self) -> tuple[set[int], list[Any], set[str]]:
        """Chooses the held-out rows: numbers, built rows, keys of their (distinct) questions."""
        numbers: set[int] = set()
        built_rows: list[Any] = []
        questions: set[str] = set()
        wanted = self.config.held_out
        order = _permutation(len(self._rows), self._seed, self.config.name, "held out")
        for row in map(int, order):
            if len(numbers) == wanted:
                break
            entry = self._rows[row]
            key = _question_key(self._question(entry, row))
            if key in questions:
                continue
            built = self._build(entry, row)
            if built is not None:
                numbers.add(row)
                built_rows.append(built)
                questions.add(key)
        if len(numbers) < wanted or wanted == len(self._rows):
            raise DataError(
                f"source {self.config.name!r} has {len(self._rows)} rows, {len(numbers)} usable "
                f"ones with distinct questions were found for held_out: {wanted}, and none is "
                f"left to train on; lower held_out"
            )
        return numbers, built_rows, questions

    def _next_row(self) -> int:
        if self._position == len(self._rows):
            self._epoch, self._position = self._epoch + 1, 0
        if self._order is None or self._order[0] != self._epoch:
            order = _permutation(len(self._rows), self._seed, self.config.name, self._epoch)
            self._order = (self._epoch, order)
        self._position += 1
        return int(self._order[1][self._position - 1])

    def _build(self, entry: Mapping[str, Any], row: int) -> Prompt | SupervisedRow | None:
        """Templates and tokenises a row; None, and counted, if it must be skipped."""
        self._looked_at += 1
        messages = self._messages(self._question(entry, row))
        text = messages[-1]["content"]
        try:
            if self.config.kind == "rl":
                return self._build_prompt(entry, row, messages, text)
            return self._build_supervised(entry, row, messages)
        except DataError:
            raise
        except ValueError as error:  # the renderer's: it knows nothing of sources
            raise DataError(
                f"source {self.config.name!r}: {self._rows.where(row)}: {error}"
            ) from error

    def _build_prompt(
        self, entry: Mapping[str, Any], row: int, messages: list[Message], text: str
    ) -> Prompt | None:
        token_ids = self._renderer.prompt(messages)
        if len(token_ids) > self._data.max_prompt_tokens:
            self._skip("prompt_too_long")
            return None
        answer = None if self.config.answer is None else entry[self.config.answer]
        return Prompt(self.config.name, row, token_ids, text, answer, entry)

    def _build_supervised(
        self, entry: Mapping[str, Any], row: int, messages: list[Message]
    ) -> SupervisedRow | None:
        answer = read_target(entry, self.config, self._rows.where(row))
        if not answer.strip():
            self._skip("empty_target")
            return None
        target = fill(self.config.target, answer=answer)
        token_ids, num_prompt_tokens = self._renderer.supervised(messages, target)
        if len(token_ids) > self._data.max_supervised_tokens:
            self._skip("row_too_long")
            return None
        return SupervisedRow(self.config.name, row, token_ids, num_prompt_tokens)

    def _skip(self, reason: str) -> None:
        self.skipped[reason] += 1
        total, limit = sum(self.skipped.values()), self._data.max_skipped_fraction
        if self._looked_at >= _MIN_ROWS_FOR_FRACTION and total > limit * self._looked_at:
            reasons = ", ".join(f"{count} {name}" for name, count in self.skipped.items())
            raise DataError(
                f"source {self.config.name!r} skipped {total} of {self._looked_at} rows "
                f"({reasons}), more than data.max_skipped_fraction {limit}; limits are "
                f"data.max_prompt_tokens {self._data.max_prompt_tokens} and "
                f"data.max_supervised_tokens {self._data.max_supervised_tokens}"
            )

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
        return [*turns, *question[:-1], {"role": "user", "content": text}]


def _question_key(question: str | list[Message]) -> str:
    """What makes two questions the same: their text, whitespace at the ends aside."""
    if isinstance(question, str):
        return question.strip()
    return json.dumps([[turn["role"], turn["content"].strip()] for turn in question])


def _permutation(size: int, *seed_parts: Any) -> np.ndarray:
    # RandomState, because NumPy guarantees its stream across versions and Generator's not: a run
    # may be resumed on another machine.
    return np.random.RandomState(seed_of(*seed_parts)).permutation(size)
