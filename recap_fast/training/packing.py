"""Packs rollouts and supervised rows into flat batches without padding.

Everything that the device needs is decided here, on the host, from masks and rewards: which
sequences carry a gradient, which hidden states enter the loss, and the denominators. After the
upload nothing has to be asked back. A prompt that several rollouts share is packed once, with its
images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recap_fast.model.attention import SDPA, Backend, build_layout
from recap_fast.model.attention_layout import Segment
from recap_fast.model.batch import PackedBatch
from recap_fast.model.upload import to_device
from recap_fast.model.vision import VisionAdapter, VisionError
from recap_fast.ops._validate import IGNORED_TARGET
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.types import ImageInput, Rollout, SupervisedRow

MAX_OVERFILL = 1.05
"""A pass may have this many times `max_tokens` where the step then needs one pass less."""


@dataclass(frozen=True, slots=True)
class PackedUpdate:
    """A process's passes of one optimizer step, and what all passes share.

    S sequences of all processes, K objectives.
    """

    batches: list[PackedBatch]
    advantages: Tensor  # [S, K] float32; NaN where the objective is absent
    denominators: Tensor  # [K] float32
    kl_denominator: Tensor  # [] float32
    counts: Tensor  # [K] float32, like the denominators but 0 where an objective is absent
    num_policy_tokens: int  # that enter the loss, over all processes' batches
    num_packed_tokens: int  # over all processes' batches
    has_images: bool  # of any process's batches

    def to(self, device: torch.device) -> PackedUpdate:
        return to_device(self, device)


@dataclass(frozen=True, slots=True)
class _Sequence:
    index: int  # row of `advantages`
    prompt: list[int]
    completion: list[int]
    logprobs: list[float] | None  # None: supervised
    objective: int  # -1: policy
    group: int  # sequences of a group share their prompt; -1: shares with none
    images: tuple[ImageInput, ...]  # of the prompt
    row: str  # for messages
    num_image_tokens: int  # of the prompt's


def pack_update(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    supervised: Sequence[SupervisedRow],
    supervised_objectives: Sequence[int],
    *,
    config: PolicyLossConfig,
    max_tokens: int,
    share_prefixes: bool = True,
    attention: Backend = SDPA,
    vision: VisionAdapter | None = None,
    rank: int = 0,
    size: int = 1,
) -> PackedUpdate:
    """Packs the rows of one optimizer step.

    Rollouts whose advantages are all zero, or absent, have no gradient when there is neither a KL
    nor an entropy term. They are left out of the batches, and counted in the denominators.

    Args:
        advantages: [S, K] float32 of the rollouts, NaN where the objective is absent.
        supervised_objectives: for each supervised row the objective its tokens belong to.
        max_tokens: packed tokens in one batch at most, or `MAX_OVERFILL` times as many where that
            saves a batch.
        share_prefixes: whether rollouts of a group share their prompt's tokens.
        attention: what the batches are laid out for; all models that run them must be able to.
        vision: the model's adapter, if it has one.
        rank: of the `size` processes that pack the same rows, which one's passes to pack. All have
            the same number, of about the same cost: tokens, and what the vision tower takes to make
            those of images. Empty ones where rows run out.

    Raises:
        ValueError: a sequence alone has more than `max_tokens` tokens.
        VisionError: a row's images do not fit its tokens, or the model takes none.
    """
    num_objectives = advantages.shape[1]
    sequences = _to_sequences(rollouts, supervised, supervised_objectives, vision)
    table = np.full((len(sequences), num_objectives), np.nan, dtype=np.float32)
    table[: len(rollouts)] = advantages
    has_signal = np.any(np.nan_to_num(table), axis=1).tolist()
    keep_all = bool(config.kl_coef or config.entropy_coef)
    kept = [s for s in sequences if s.objective >= 0 or keep_all or has_signal[s.index]]
    # Passes of one process follow each other, whatever each costs; those of several run together.
    image_cost = vision.token_cost if vision is not None and size > 1 else 0.0
    chunks = list(_split(kept, max_tokens, share_prefixes, size, image_cost))
    batches = [_pack(chunk, share_prefixes, attention, vision) for chunk in chunks[rank::size]]
    counts = torch.from_numpy(_counts(sequences, table, config))
    return PackedUpdate(
        batches=batches,
        advantages=torch.from_numpy(table),
        counts=counts,
        denominators=counts.clamp(min=1.0),
        kl_denominator=torch.tensor(
            _count(sequences[: len(rollouts)], config), dtype=torch.float32
        ),
        num_policy_tokens=sum(len(s.completion) for s in kept if s.objective < 0),
        num_packed_tokens=sum(int(_Sizes.of(chunk, share_prefixes).starts[-1]) for chunk in chunks),
        has_images=any(sequence.images for sequence in kept),
    )


def _to_sequences(
    rollouts: Sequence[Rollout],
    supervised: Sequence[SupervisedRow],
    supervised_objectives: Sequence[int],
    vision: VisionAdapter | None,
) -> list[_Sequence]:
    def num_image_tokens(images: Sequence[ImageInput]) -> int:
        return 0 if vision is None else sum(vision.num_tokens(image) for image in images)

    sequences = [
        _Sequence(
            i, r.prompt.token_ids, r.token_ids, r.logprobs, -1, r.group, r.prompt.images,
            f"{r.prompt.source}:{r.prompt.row}", num_image_tokens(r.prompt.images),
        )
        for i, r in enumerate(rollouts)
    ]  # fmt: skip
    for row, objective in zip(supervised, supervised_objectives, strict=True):
        split = row.num_prompt_tokens
        ids = row.token_ids
        sequences.append(
            _Sequence(
                len(sequences), ids[:split], ids[split:], None, objective, -1, row.images,
                f"{row.source}:{row.row}", num_image_tokens(row.images),
            )
        )  # fmt: skip
    return sequences


def _count(sequences: Sequence[_Sequence], config: PolicyLossConfig) -> int:
    if config.aggregation == "token":
        return sum(len(s.completion) for s in sequences)
    return sum(bool(s.completion) for s in sequences)


def _counts(
    sequences: Sequence[_Sequence], table: np.ndarray, config: PolicyLossConfig
) -> np.ndarray:
    """[K] tokens (or sequences) to which each objective applies."""
    counts = np.zeros(table.shape[1], dtype=np.float32)
    for sequence in sequences:
        amount = _count([sequence], config)
        if sequence.objective >= 0:
            counts[sequence.objective] += amount
        else:
            counts += amount * ~np.isnan(table[sequence.index])
    return counts


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Packed tokens of any run of consecutive sequences, where one of an image counts as more. A
    run repeats its first group's prompt."""

    alone: list[float]  # of each sequence by itself
    starts: list[float]  # of sequence i when all are packed end to end; one entry more, the end
    extra: list[float]  # of the prompt that a run starting at sequence i repeats; 0 at the end

    @classmethod
    def of(
        cls, sequences: Sequence[_Sequence], share_prefixes: bool, image_cost: float = 0.0
    ) -> _Sizes:
        alone: list[float] = []
        starts: list[float] = [0]
        extra: list[float] = []
        group = -1
        for sequence in sequences:
            prompt = len(sequence.prompt) + image_cost * sequence.num_image_tokens
            alone.append(prompt + len(sequence.completion) - 1)
            shares = share_prefixes and sequence.group >= 0 and sequence.group == group
            extra.append(prompt if shares else 0)
            starts.append(starts[-1] + alone[-1] - extra[-1])
            group = sequence.group
        return cls(alone, starts, [*extra, 0])

    def run(self, start: int, stop: int) -> float:
        return self.starts[stop] - self.starts[start] + self.extra[start]

    def fullest(self, limit: float) -> list[int]:
        """For each sequence, where the longest run from it ends that stays within `limit`."""
        stops, stop = [], 0
        for start in range(len(self.alone)):
            while stop < len(self.alone) and self.run(start, stop + 1) <= limit:
                stop += 1
            stops.append(stop)
        return stops


def _fewest(stops: Sequence[int]) -> list[int]:
    """For each sequence, how many passes it and all after it need, given `_Sizes.fullest`."""
    passes = [0] * (len(stops) + 1)
    for start in reversed(range(len(stops))):
        passes[start] = 1 + passes[stops[start]]
    return passes


def _split(
    sequences: Sequence[_Sequence],
    max_tokens: int,
    share_prefixes: bool,
    multiple: int = 1,
    image_cost: float = 0.0,
) -> Iterator[Sequence[_Sequence]]:
    """As few passes as there can be, of about equal cost, in order; a multiple of `multiple`, the
    last ones empty where there are not so many sequences.

    A group is parted only where that is worth more tokens of balance than its prompt has.
    """
    sizes = _Sizes.of(sequences, share_prefixes)
    if max(sizes.alone, default=0) > max_tokens:
        raise ValueError(
            f"one sequence has {max(sizes.alone)} tokens, training.max_tokens is {max_tokens}"
        )
    costs = _Sizes.of(sequences, share_prefixes, image_cost)
    stops = sizes.fullest(max_tokens)
    needed = _fewest(stops)
    # A pass reads and adds up to all weights' gradients: one less is worth a little memory.
    stretched = sizes.fullest(max_tokens * MAX_OVERFILL)
    needed_stretched = _fewest(stretched)
    if needed_stretched[0] < needed[0]:
        stops, needed = stretched, needed_stretched
    start = 0
    for left in reversed(range(-(-needed[0] // multiple) * multiple)):
        if start == len(sequences):
            yield []
            continue
        # Where the passes that are left can take the rest.
        ends = [end for end in range(start + 1, stops[start] + 1) if needed[end] <= left]
        wanted = costs.run(start, len(sequences)) / (left + 1)
        off = [abs(costs.run(start, end) - wanted) + costs.extra[end] for end in ends]
        end = ends[off.index(min(off))]
        yield sequences[start:end]
        start = end


def _pack(
    sequences: Sequence[_Sequence],
    share_prefixes: bool,
    attention: Backend,
    vision: VisionAdapter | None,
) -> PackedBatch:
    """Lays sequences end to end. The last token of each predicts nothing and is left out."""
    if not sequences:
        return _empty(attention, vision)
    ids: list[int] = []
    positions: list[Tensor] = []
    segments: list[Segment] = []
    hidden_index: list[int] = []
    images: list[ImageInput] = []
    image_index: list[int] = []
    group, prefix, next_position = -1, range(0), 0
    for sequence in sequences:
        own = sequence.completion[:-1]
        shares = share_prefixes and sequence.group >= 0
        if not (shares and sequence.group == group):
            group = sequence.group
            prefix = range(len(ids), len(ids) + len(sequence.prompt))
            ids += sequence.prompt
            positions.append(_prompt_positions(sequence, vision))
            next_position = int(positions[-1].max()) + 1
            if vision is not None and sequence.images:
                images += sequence.images
                places = vision.image_positions(sequence.prompt)
                image_index += [prefix.start + place for place in places]
            if shares:
                segments.append(Segment(range(0), prefix))
        start = len(ids)
        ids += own
        following = torch.arange(next_position, next_position + len(own))
        positions.append(following.expand(*positions[0].shape[:-1], -1))
        tail = range(start, start + len(own))
        if not shares:
            segments.append(Segment(range(0), range(prefix.start, tail.stop)))
        elif own:
            segments.append(Segment(prefix, tail))
        hidden_index += [prefix.stop - 1, *tail]
    return PackedBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.cat(positions, dim=-1),
        layout=build_layout(segments, attention),
        hidden_index=torch.tensor(hidden_index),
        targets=torch.tensor([t for s in sequences for t in s.completion]),
        sequence_ids=_repeat([s.index for s in sequences], sequences),
        token_objectives=_repeat([s.objective for s in sequences], sequences),
        rollout_logprobs=torch.tensor(
            [p for s in sequences for p in (s.logprobs or [0.0] * len(s.completion))],
            dtype=torch.float32,
        ),
        images=vision.pack(images, image_index) if vision is not None and images else None,
    )


def _empty(attention: Backend, vision: VisionAdapter | None) -> PackedBatch:
    """One token that predicts an ignored one: a pass for the sake of the other processes."""
    nothing = _Sequence(0, [0], [0], None, 0, -1, (), "", 0)
    batch = _pack([nothing], share_prefixes=False, attention=attention, vision=vision)
    return replace(batch, targets=torch.full_like(batch.targets, IGNORED_TARGET))


def _prompt_positions(sequence: _Sequence, vision: VisionAdapter | None) -> Tensor:
    """[P], or [3, P] with an adapter."""
    if vision is None:
        if sequence.images:
            raise VisionError(f"row {sequence.row} has images, but the model takes none")
        return torch.arange(len(sequence.prompt))
    try:
        return vision.positions(sequence.prompt, sequence.images)
    except VisionError as error:
        raise VisionError(f"row {sequence.row}: {error}") from error


def _repeat(values: Sequence[int], sequences: Sequence[_Sequence]) -> Tensor:
    lengths = torch.tensor([len(s.completion) for s in sequences])
    return torch.tensor(values, dtype=torch.int32).repeat_interleave(lengths)
