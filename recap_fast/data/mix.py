"""The mix of all sources: an endless, resumable stream of steps.

The order is a pure function of the seed and the cursor. Every source walks through a new
permutation of its rows in each epoch. Rows are read, templated and tokenised, and their images
decoded and resized, as they are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recap_fast.config import DataConfig
from recap_fast.data.images import ImageEncoder
from recap_fast.data.prompts import ChatRenderer
from recap_fast.data.row_columns import DataError, nearest
from recap_fast.data.source_stream import SourceStream
from recap_fast.types import Prompt, StepRows, SupervisedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataError", "DataStream", "allocate", "mixing_shares"]


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
