"""The mix of all sources: an endless, resumable stream of steps.

The order is a pure function of the seed and the cursor, and of what `follow` was told where shares
are adaptive or solved prompts reviewed. Every source walks through a new permutation of its rows in
each epoch. Rows are read, templated and tokenised, and their images
decoded and resized, as they are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recap_fast.config import DataConfig
from recap_fast.data.images import ImageEncoder
from recap_fast.data.prompts import ChatRenderer
from recap_fast.data.review import ReviewQueue
from recap_fast.data.row_columns import DataError, nearest
from recap_fast.data.shares import AdaptiveShares, allocate, mixing_shares
from recap_fast.data.source_stream import SourceStream
from recap_fast.types import Prompt, StepFeedback, StepRows, SupervisedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataError", "DataStream"]


class DataStream:
    """The rows of a run, step by step.

    Args:
        config: the sources and their mix.
        tokenizer: a transformers tokenizer.
        seed: determines held-out rows, order, and what procedural sources generate.
        images: the model's image encoder (`load_image_encoder`); None for a text model.

    Raises:
        DataError: a source that is missing, malformed, empty, or smaller than its held-out part.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        images: ImageEncoder | None = None,
    ) -> None:
        vision = None if images is None else images.tokens
        renderer = ChatRenderer(tokenizer, config.enable_thinking, vision)
        self._batch_size = config.batch_size
        self._seed = seed
        self._sources = {
            source.name: SourceStream(source, config, renderer, images, seed)
            for source in config.sources
        }
        # A question held out of one source is not trained on through another one either.
        held_out = {key for source in self._sources.values() for key in source.held_out_questions}
        for source in self._sources.values():
            source.exclude(held_out)
        self._shares = mixing_shares(
            config, {name: source.num_training_rows for name, source in self._sources.items()}
        )
        self._adaptive: AdaptiveShares | None = None
        if config.mixing == "adaptive":
            self._adaptive = AdaptiveShares(
                self._shares, config.adaptive.most, [one.objectives for one in config.sources]
            )
        self._reviews: dict[str, ReviewQueue] = {}
        if config.review is not None:
            judging = set(config.review.rewards)
            self._reviews = {
                source.name: ReviewQueue(config.review)
                for source in config.sources
                if judging.intersection(source.rewards)
            }
        self._step = 0  # of the next rows
        self._reviewed: dict[str, list[bool | None]] = {name: [] for name in self._reviews}

    @property
    def skipped(self) -> dict[str, int]:
        """Rows skipped so far, as {"<source>/<reason>": count}."""
        return {
            f"{name}/{reason}": count
            for name, source in self._sources.items()
            for reason, count in sorted(source.skipped.items())
        }

    @property
    def noted(self) -> dict[str, int]:
        """Rows used so far with something left out, as {"<source>/<what>": count}: animations, of
        which the first frame is used."""
        return {
            f"{name}/{what}": count
            for name, source in self._sources.items()
            for what, count in sorted(source.noted.items())
        }

    def next_step(self) -> StepRows:
        """Draws the next `batch_size` rows: sources in the order of the configuration.

        Raises:
            DataError: a malformed row, a source with no usable row, or one that skipped more
                than `max_skipped_fraction` of its rows.
        """
        step = StepRows(prompts=[], supervised=[])
        for name, count in zip(self._sources, self._allocate(), strict=True):
            for row in self._draw(name, count):
                if isinstance(row, Prompt):
                    step.prompts.append(row)
                else:
                    step.supervised.append(row)
        self._step += 1
        return step

    def _allocate(self) -> list[int]:
        if self._adaptive is not None:
            return self._adaptive.allocate(self._batch_size)
        drawn = [source.drawn for source in self._sources.values()]
        return allocate(self._shares, drawn, self._batch_size)

    def _draw(self, name: str, count: int) -> Iterator[Prompt | SupervisedRow]:
        """Rows of a source: those that are reviewed first."""
        source, queue = self._sources[name], self._reviews.get(name)
        for number in [] if queue is None else queue.take(count, self._step):
            assert queue is not None
            row = source.draw_again(number)
            if row is None:
                queue.forget(number)
                continue
            count -= 1
            yield row
        for _ in range(count):
            yield source.draw()

    def follow(self, feedback: StepFeedback) -> None:
        """Sets the mix of the rows to come by what a step gave, where it depends on it.

        Every process of a run tells its stream the same at the same place between its draws.
        """
        if self._adaptive is not None:
            self._adaptive.follow(feedback.weights)
        self._reviewed = {name: [] for name in self._reviews}
        for name, row, is_solved in feedback.groups:
            if name in self._reviews and self._reviews[name].report(row, is_solved, self._step):
                self._reviewed[name].append(is_solved)

    @property
    def mix_metrics(self) -> dict[str, float]:
        """Shares of the rows to come where they are adaptive, and what became of the prompts that
        the last step reviewed: how many, and the share of them that was solved again."""
        metrics: dict[str, float] = {}
        if self._adaptive is not None:
            shares = zip(self._sources, self._adaptive.shares, strict=True)
            metrics |= {f"mixing/{name}": share for name, share in shares}
        for name, solved in self._reviewed.items():
            metrics[f"review/{name}"] = len(solved)
            known = [one for one in solved if one is not None]
            metrics[f"review_solved/{name}"] = sum(known) / len(known) if known else float("nan")
        return metrics

    def refill(self, sources: Sequence[str]) -> list[Prompt]:
        """Draws another prompt for each one that was dropped from a step, given by its source.

        They do not count in the mix, which is that of the rows that are kept: neither this step's
        nor a later one's shares change.

        Raises:
            DataError: as `next_step`.
        """
        drawn = [self._sources[name].draw(counts=False) for name in sources]
        return [row for row in drawn if isinstance(row, Prompt)]

    def held_out(self, source_name: str) -> list[Prompt] | list[SupervisedRow]:
        """The rows of a source that are kept out of training: prompts of an rl source,
        supervised rows of an sft source. Those with images are prepared anew each time: they would
        take megabytes each for the whole run.

        Raises:
            DataError: no source has that name.
        """
        if source_name not in self._sources:
            raise DataError(f"no source {source_name!r}{nearest(source_name, self._sources)}")
        return self._sources[source_name].held_out()

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as a JSON-able dict."""
        state: dict[str, Any] = {
            "seed": self._seed,
            "shares": list(self._shares),
            "sources": {name: source.state_dict() for name, source in self._sources.items()},
        }
        if self._adaptive is not None:
            state["adaptive"] = self._adaptive.state_dict()
        if self._reviews:
            queues = {name: queue.state_dict() for name, queue in self._reviews.items()}
            state["review"] = {"step": self._step, "queues": queues}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            DataError: the cursor was taken with other sources, another mix or another seed.
        """
        ours = self.state_dict()
        if state["seed"] != ours["seed"]:
            raise DataError(
                f"the run was started with seed {state['seed']}, which decides on the order of its "
                f"rows, and cannot go on with seed {ours['seed']}: resume with seed {state['seed']}"
            )
        if state["shares"] != ours["shares"]:
            raise DataError(
                f"the checkpoint's data cursor has shares {state['shares']}, this run has "
                f"{ours['shares']}: resume with the data section the run was started with"
            )
        for key, setting in (("adaptive", "data.mixing: adaptive"), ("review", "data.review")):
            if (key in state) != (key in ours):
                had, has = ("had", "has not") if key in state else ("had not", "has")
                raise DataError(
                    f"the run of the checkpoint's data cursor {had} {setting}, and this one {has}: "
                    f"resume with the data section the run was started with"
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
        if self._adaptive is not None:
            self._adaptive.load_state_dict(state["adaptive"])
        if self._reviews:
            self._step = state["review"]["step"]
            for name, queue in self._reviews.items():
                queue.load_state_dict(state["review"]["queues"][name])
