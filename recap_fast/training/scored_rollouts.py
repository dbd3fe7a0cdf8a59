"""Rollouts and their rewards: groups are scored while others are still being generated."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recap_fast.rewards.scorer import RewardScorer, RewardTally, Scoring
from recap_fast.rollout.protocol import RolloutEngine, SamplingStoppedError
from recap_fast.training.distributed import ALONE, World
from recap_fast.types import Prompt, RewardTable, Rollout, SamplingSpec, UserError


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """What a set of prompts gave."""

    rollouts: list[Rollout]  # in the prompts' order
    rewards: RewardTable  # rows in the rollouts' order
    rollout_seconds: float
    reward_seconds: float  # that scoring went on after the last rollout


class _Stopped(Exception):
    pass


def generate_and_score(
    engine: RolloutEngine,
    scorer: RewardScorer,
    prompts: Sequence[Prompt],
    sampling: SamplingSpec,
    stop: Sequence[int] = (),
    world: World = ALONE,
    tally: RewardTally | None = None,
) -> ScoredRollouts | None:
    """Samples completions of all processes' prompts; each group is scored as it is complete.

    Every process gives the same prompts, samples its own share of them, and gets all rollouts.
    Processes that share an engine sample the same ones, and score each a part of the groups.

    Args:
        sampling: its groups, where it gives numbers, rise from prompt to prompt.
        stop: filled from outside when the run is to end, in any process; sampling is then given up
            there after the group in progress, and None returned everywhere.
        tally: of a step that samples several times.
    """
    engine_number, place = divmod(world.rank, engine.ranks)
    own = range(engine_number, len(prompts), world.size // engine.ranks)
    numbers = tuple(sampling.group(index) for index in own)
    scored = frozenset(numbers[place :: engine.ranks])
    mine = replace(sampling, groups=numbers)
    here: ScoredRollouts | None = None

    def work() -> tuple[dict[str, Tensor], Any]:
        nonlocal here
        scoring = scorer.start(sampling.max_new_tokens, tally)
        here = _generate_and_score(engine, scoring, [prompts[i] for i in own], mine, scored, stop)
        return ({}, None) if here is None or world.size == 1 else encoded(here)

    parts = world.exchange(work)
    if world.size == 1:
        return here
    if any(note is None for _, note in parts):
        return None
    by_group = {sampling.group(index): prompt for index, prompt in enumerate(prompts)}
    return merged([decoded(tensors, note, by_group) for tensors, note in parts])


def encoded(scored: ScoredRollouts) -> tuple[dict[str, Tensor], Any]:
    """As tensors and a note, without the prompts, which every process has."""
    rollouts, rewards = scored.rollouts, scored.rewards
    tensors = {
        "groups": torch.tensor([r.group for r in rollouts], dtype=torch.int64),
        "lengths": torch.tensor([len(r.token_ids) for r in rollouts], dtype=torch.int64),
        "tokens": torch.tensor([t for r in rollouts for t in r.token_ids], dtype=torch.int64),
        "logprobs": torch.tensor([p for r in rollouts for p in r.logprobs], dtype=torch.float64),
        "versions": torch.tensor([v for r in rollouts for v in r.versions], dtype=torch.int64),
        "known": torch.tensor([len(r.versions) for r in rollouts], dtype=torch.int64),
        "rewards": torch.from_numpy(np.ascontiguousarray(rewards.values)),
    }
    note = {
        "texts": [r.text for r in rollouts],
        "reasons": [r.finish_reason for r in rollouts],
        "failures": dict(rewards.failures),
        "unreadable": dict(rewards.unreadable),
        "seconds": [scored.rollout_seconds, scored.reward_seconds],
    }
    return tensors, note


def decoded(
    tensors: Mapping[str, Tensor], note: Any, prompts: Mapping[int, Prompt]
) -> ScoredRollouts:
    """`encoded` again as it was. `prompts` has those of all groups, by number."""
    lengths = tensors["lengths"].tolist()
    columns = zip(
        tensors["groups"].tolist(),
        tensors["tokens"].split(lengths),
        tensors["logprobs"].split(lengths),
        note["reasons"],
        note["texts"],
        tensors["versions"].split(tensors["known"].tolist()),
        strict=True,
    )
    return ScoredRollouts(
        rollouts=[
            Rollout(
                prompts[group],
                group,
                tokens.tolist(),
                logprobs.tolist(),
                reason,
                text,
                versions.tolist(),
            )
            for group, tokens, logprobs, reason, text, versions in columns
        ],
        rewards=RewardTable(tensors["rewards"].numpy(), note["failures"], note["unreadable"]),
        rollout_seconds=note["seconds"][0],
        reward_seconds=note["seconds"][1],
    )


def merged(parts: Sequence[ScoredRollouts]) -> ScoredRollouts:
    """All processes' in the order of the groups' numbers. Times are the slowest one's."""
    rollouts = [rollout for part in parts for rollout in part.rollouts]
    order = np.argsort([rollout.group for rollout in rollouts], kind="stable")
    failures: Counter[str] = Counter()
    unreadable: Counter[str] = Counter()
    for part in parts:
        failures.update(part.rewards.failures)
        unreadable.update(part.rewards.unreadable)
    return ScoredRollouts(
        rollouts=[rollouts[i] for i in order],
        rewards=RewardTable(
            np.concatenate([part.rewards.values for part in parts])[order], failures, unreadable
        ),
        rollout_seconds=max(part.rollout_seconds for part in parts),
        reward_seconds=max(part.reward_seconds for part in parts),
    )


def _generate_and_score(
    engine: RolloutEngine,
    scoring: Scoring,
    prompts: Sequence[Prompt],
    sampling: SamplingSpec,
    scored: frozenset[int],
    stop: Sequence[int],
) -> ScoredRollouts | None:
    """This process's part, the groups in `scored`, or None where `stop` was filled."""
    started = time.perf_counter()
    finished: list[int] = []
    problems: list[UserError] = []

    def score(group: Sequence[Rollout]) -> None:
        if engine.any_rank(bool(stop or problems)):
            raise _Stopped
        if group[0].group not in scored:
            return
        finished.extend(rollout.group for rollout in group)
        try:
            scoring.add(group)
        except UserError as error:  # not out of here: others of the engine would wait for this one
            problems.append(error)

    try:
        rollouts: list[Rollout] | None = (
            engine.generate(prompts, sampling, score) if prompts else []
        )
    except _Stopped:
        rollouts = None
    except SamplingStoppedError:
        if not stop:  # the run's, but not what asked for these
            raise
        rollouts = None
    if problems:
        raise problems[0]
    if rollouts is None:
        return None
    sampled = time.perf_counter()
    table = scoring.table()
    if stop:
        return None
    # A stable sort brings the rows, which came as groups finished, into the rollouts' order.
    order = np.argsort(np.array(finished, dtype=np.int64), kind="stable")
    return ScoredRollouts(
        rollouts=[rollout for rollout in rollouts if rollout.group in scored],
        rewards=replace(table, values=table.values[order]),
        rollout_seconds=sampled - started,
        reward_seconds=time.perf_counter() - sampled,
    )
