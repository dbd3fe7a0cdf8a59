"""Parts of the tests of rollouts that are sampled ahead. The engine is a stand-in that completes
groups when a test says so; rows and rewards are real."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from recap_fast.training.distributed import World
from recap_fast.training.rollout_source import StepBatch
from recap_fast.types import Prompt, Rollout, SamplingSpec, StepFeedback
from tests.tiny import tiny_config
from tests.tiny_tokenizer import tiny_tokenizer

STEPS = 8
VOWEL = tiny_tokenizer().convert_tokens_to_ids("a")


class Engine:
    """Completes groups at once, or, with `holds`, when `complete` is called.

    Attributes:
        version: of the weights; a token carries the one at which its group was asked for.
        flat: whether a prompt's rollouts are all the same, which no reward then tells apart.
        asked: (row, seed, priority) of each request.
        log: (prompt, priority, number in its step) of each.
    """

    ranks = 1

    def __init__(
        self, holds: bool = False, flat: Callable[[Prompt], bool] = lambda prompt: False
    ) -> None:
        self.holds, self.version, self.flat = holds, 0, flat
        self.asked: list[tuple[int, int, int]] = []
        self.log: list[tuple[Prompt, int, int]] = []
        self.open: list[tuple[Prompt, SamplingSpec, int, Future[list[Rollout]], int]] = []

    def submit(
        self, prompt: Prompt, sampling: SamplingSpec, index: int, priority: int = 0
    ) -> Future[list[Rollout]]:
        self.asked.append((prompt.row, sampling.seed, priority))
        self.log.append((prompt, priority, index))
        future: Future[list[Rollout]] = Future()
        self.open.append((prompt, sampling, index, future, self.version))
        if not self.holds:
            self.complete()
        return future

    def complete(self, count: int | None = None, start: int = 0) -> None:
        chosen = self.open[start:][:count]
        self.open = [one for one in self.open if one not in chosen]
        for prompt, sampling, index, future, version in chosen:
            future.set_result(self.group(prompt, sampling, index, version))

    def group(
        self, prompt: Prompt, sampling: SamplingSpec, index: int, version: int
    ) -> list[Rollout]:
        random = np.random.default_rng((sampling.seed, sampling.group(index)))
        rollouts = []
        same = random.integers(5, 30, size=4).tolist()
        for member in range(sampling.n):
            tokens = random.integers(5, 30, size=4).tolist() + member * [VOWEL]
            if self.flat(prompt):
                tokens = same
            text = tiny_tokenizer().decode(tokens)
            rollouts.append(
                Rollout(prompt, sampling.group(index), tokens, [-1.0] * len(tokens), "stop", text,
                        [version] * len(tokens))
            )  # fmt: skip
        return rollouts

    def take_metrics(self) -> dict[str, float]:
        return {}

    def any_rank(self, here: bool) -> bool:
        return here

    def generate(self, prompts: Any, sampling: SamplingSpec, on_group: Any) -> list[Rollout]:
        groups = [self.group(prompt, sampling, i, self.version) for i, prompt in enumerate(prompts)]
        for group in groups:
            on_group(group)
        return [rollout for group in groups for rollout in group]


def make_config(folder: Path, model: Path, depth: int, *more: str) -> Any:
    return tiny_config(
        folder, model, f"training.steps={STEPS}", "rollout.engine=vllm_server",
        "loss.rollout_is_cap=2.0", f"rollout.async.depth={depth}", *more,
    )  # fmt: skip


def rows(batch: StepBatch) -> list[int]:
    found = []
    for rollout in batch.drawn.scored.rollouts:
        if not found or found[-1] != rollout.prompt.row:
            found.append(rollout.prompt.row)
    return found


def silent(step: int, batch: StepBatch) -> StepFeedback:
    return StepFeedback()


def train(
    source: Any,
    engine: Engine,
    first: int,
    last: int,
    told: Callable[[int, StepBatch], StepFeedback] = silent,
) -> list[StepBatch]:
    """Steps of a trainer that tells the data stage what `told` makes of each."""
    batches = []
    for step in range(first, last):
        batch = source.next(step, [])
        assert batch is not None
        batches.append(batch)
        engine.version = step + 1
        source.trained(step + 1, told(step, batch))
    return batches


def tokens(batch: StepBatch) -> list[Any]:
    return [
        (r.prompt.source, r.prompt.row, r.group, r.token_ids) for r in batch.drawn.scored.rollouts
    ]


class Told(World):
    """Hears of nobody else."""

    def exchange(self, work: Any) -> Any:
        return [work()]
