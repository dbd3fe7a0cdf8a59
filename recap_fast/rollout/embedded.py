"""Rollouts from the trained module itself. Always works; there are no weights to sync.

A prompt is read once, its images too, and its keys and values are shared out to its group. Prompts
of like length are batched, padded on the left; finished rollouts leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from recap_fast.config import RolloutConfig
from recap_fast.model.attention import IMPLEMENTATION
from recap_fast.model.train_mode import evaluating
from recap_fast.model.vision import PackedImages, VisionAdapter, make_adapter
from recap_fast.rollout.protocol import (
    ExpectedWeights,
    OnGroup,
    build_rollouts,
    check_prompts,
    iter_weights,
    prompt_seed,
    stop_token_ids,
)
from recap_fast.types import Prompt, Rollout, SamplingSpec, WeightSyncError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAX_CACHED_TOKENS = 65_536
"""Bounds a batch's KV cache, in tokens over all its rollouts: 1.5 GiB for a 135M model."""

_COMPACT_BELOW = 0.75
"""Finished rollouts are dropped once fewer than this share of a batch's rows is unfinished;
dropping at every finish would copy the cache too often."""


class EmbeddedEngine:
    """Generates with the trainer's own module.

    Args:
        config: its `dtype` "auto" is bfloat16 autocast on CUDA and the parameters' dtype on a CPU,
            where autocast makes small decode steps slower.
    """

    name = "transformers"
    version = transformers.__version__
    ranks = 1

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._vision = make_adapter(model)
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._stop_ids = stop_token_ids(model, tokenizer)
        parameter = model.get_input_embeddings().weight
        if config.dtype == "auto":
            self.dtype = torch.bfloat16 if parameter.is_cuda else parameter.dtype
        else:
            self.dtype = getattr(torch, config.dtype)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        on_group: OnGroup | None = None,
    ) -> list[Rollout]:
        check_prompts(prompts, sampling, self._max_model_len, self._vision)
        n = sampling.n if sampling.temperature > 0 else 1
        groups: list[list[Rollout]] = [[] for _ in prompts]
        with inference_state(self._model, self.dtype):
            for batch in _batches(prompts, n, sampling.max_new_tokens):
                rows = [prompts[index] for index in batch]
                firsts = [prompt_seed(sampling.seed, sampling.group(i)) for i in batch]
                seeds = [first + j for first in firsts for j in range(n)]
                decoder = _Decoder(
                    self._model, self._vision, rows, n, seeds, sampling, self._stop_ids
                )
                completions = decoder.run()
                for place, index in enumerate(batch):
                    groups[index] = build_rollouts(
                        [prompts[index]],
                        [completions[place * n : (place + 1) * n]],
                        sampling.n,
                        self._stop_ids,
                        self._tokenizer,
                        first_group=sampling.group(index),
                    )
                    if on_group is not None:
                        on_group(groups[index])
        return [rollout for group in groups for rollout in group]

    def any_rank(self, here: bool) -> bool:
        return here

    def sleep(self) -> None:
        """Nothing to give back between batches."""

    def sync_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int = 0
    ) -> None:
        """Nothing to do: the engine samples from the trained module."""

    def close(self) -> None:
        """Nothing to give back: the module is the trainer's."""


class DetachedEngine(EmbeddedEngine):
    """Samples from a model of its own, where the trained one is in shards: each process then
    generates by itself, however many tokens its prompts take."""

    def sync_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int = 0
    ) -> None:
        own = dict(iter_weights(self._model))
        expected = ExpectedWeights(own)
        for name, tensor in expected.watch(named_tensors):
            if name not in own:
                raise WeightSyncError(f"the engine's model has no weight {name}")
            own[name].copy_(tensor)
        expected.check(f"{self.name} {self.version}")


@contextmanager
def inference_state(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Evaluation mode without gradients, in `dtype`, with an attention that reads a KV cache.

    The trainer's packed attention knows only packed batches; SDPA takes its place meanwhile. A
    vision tower keeps its own.
    """
    packed = model.config._attn_implementation == IMPLEMENTATION
    # A frozen vision tower, whose parameters come first, may be kept in another dtype.
    autocast = dtype != model.get_input_embeddings().weight.dtype
    try:
        if packed:
            model.set_attn_implementation({"": "sdpa", "text_config": "sdpa"})
        # Autocast around the whole loop: it then casts each weight once, not once a token.
        compute = torch.autocast(model.device.type, dtype, enabled=autocast)
        with evaluating(model), torch.no_grad(), compute:
            yield
    finally:
        if packed:
            model.set_attn_implementation({"": IMPLEMENTATION, "text_config": IMPLEMENTATION})


def _batches(prompts: Sequence[Prompt], n: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts, shortest first, in batches whose cache stays within bounds."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids)):
        length = len(prompts[index].token_ids) + max_new_tokens
        if batch and (len(batch) + 1) * n * length > _MAX_CACHED_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class _Decoder:
    """Decodes one batch of B prompts, n rows each. R rows are still unfinished."""

    def __init__(
        self,
        model: PreTrainedModel,
        vision: VisionAdapter | None,
        prompts: Sequence[Prompt],
        n: int,
        seeds: list[int],
        sampling: SamplingSpec,
        stop_ids: frozenset[int],
    ) -> None:
        self._model = model
        self._vision = vision
        self._sampling = sampling
        self._n = n
        device = model.device
        tokens = [prompt.token_ids for prompt in prompts]
        # One generator a row: what it samples then does not depend on the rest of its batch.
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._stop_ids = torch.tensor(sorted(stop_ids), device=device)
        self._rows = torch.arange(len(tokens) * n, device=device)  # [R], the row's first number
        length = max(map(len, tokens))
        self._capacity = length + sampling.max_new_tokens
        ids = torch.zeros(len(tokens), length, dtype=torch.int64)
        mask = torch.zeros(len(tokens), self._capacity, dtype=torch.int64)
        for row, prompt in enumerate(tokens):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        self._ids, self._mask = ids.to(device), mask.to(device)
        positions = left_padded_positions(prompts, vision)  # [B, L] or [3, B, L]
        self._positions = positions.to(device)
        # [R, 1] or [3, R, 1]: where the next token stands, in all three dimensions alike.
        self._next_position = positions.amax(-1, keepdim=True).to(device) + 1
        self._images = pack_left_padded(prompts, vision, device)
        self._length = length  # of prompt and completion so far, padding included
        self._cache = DynamicCache(config=model.config)
        for i, layer in enumerate(self._cache.layers):
            if type(layer) is DynamicLayer:
                self._cache.layers[i] = _PreallocatedLayer(self._capacity)

    def run(self) -> list[tuple[list[int], list[float]]]:
        """Returns token ids and log-probs of the B*n rows."""
        n, steps = self._n, self._sampling.max_new_tokens
        num_rows = len(self._rows)
        sampled = torch.zeros(num_rows, steps, dtype=torch.int64, device=self._rows.device)
        logprobs = torch.zeros(num_rows, steps, dtype=torch.float32, device=self._rows.device)
        lengths = torch.full((num_rows,), steps, device=self._rows.device)
        logits = self._prefill().repeat_interleave(n, dim=0)  # [R, V]
        alive = torch.ones(num_rows, dtype=torch.bool, device=self._rows.device)  # [R]
        for step in range(steps):
            token, logprob = self._sample(logits)
            sampled[self._rows, step], logprobs[self._rows, step] = token, logprob
            stops = alive & torch.isin(token, self._stop_ids)
            lengths[self._rows[stops]] = step + 1
            alive &= ~stops
            num_alive = int(alive.sum())
            if num_alive == 0 or step == steps - 1:
                break
            if num_alive < _COMPACT_BELOW * len(alive):
                token = self._keep(alive, token)
                alive = alive[alive]
            logits = self._decode(token)
        return [
            (ids[:length], values[:length])
            for ids, values, length in zip(
                sampled.tolist(), logprobs.tolist(), lengths.tolist(), strict=True
            )
        ]

    def _prefill(self) -> Tensor:
        mask = self._mask[:, : self._length]
        logits = self._forward(self._ids, mask, self._positions, self._images)
        self._cache.batch_repeat_interleave(self._n)
        self._mask = self._mask.repeat_interleave(self._n, dim=0)
        self._next_position = self._next_position.repeat_interleave(self._n, dim=-2)
        return logits

    def _decode(self, token: Tensor) -> Tensor:
        self._length += 1
        logits = self._forward(token[:, None], self._mask[:, : self._length], self._next_position)
        self._next_position = self._next_position + 1
        return logits

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, images: PackedImages | None = None
    ) -> Tensor:
        """Returns the last position's logits, [rows, V]."""
        return forward_logits(
            self._model,
            self._vision,
            ids,
            images,
            logits_to_keep=1,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )[:, -1]

    def _sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens [R] and their log-probs [R]."""
        temperature = self._sampling.temperature
        logits = logits.float()
        if temperature > 0:
            logits = logits / temperature
        logprobs = logits.log_softmax(-1)
        scores = logprobs - self._gumbel_noise(logprobs) if temperature > 0 else logprobs
        token = scores.argmax(-1)
        return token, logprobs.gather(1, token[:, None])[:, 0]

    def _gumbel_noise(self, like: Tensor) -> Tensor:
        """Log of exponential noise: argmax(logp - log E) samples from the softmax. [R, V]."""
        noise = torch.empty_like(like)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return noise.log_()

    def _keep(self, alive: Tensor, token: Tensor) -> Tensor:
        kept = alive.nonzero()[:, 0]
        self._cache.batch_select_indices(kept)
        self._rows, self._mask = self._rows[kept], self._mask[kept]
        self._next_position = self._next_position.index_select(-2, kept)
        self._generators = [self._generators[row] for row in kept.tolist()]
        return token[kept]


def forward_logits(
    model: PreTrainedModel,
    vision: VisionAdapter | None,
    ids: Tensor,
    images: PackedImages | None,
    *,
    logits_to_keep: int,
    **arguments: Any,
) -> Tensor:
    """Logits of the last positions of rows [R, L], with the prompts' images or without."""
    if images is None:
        output = model(input_ids=ids, logits_to_keep=logits_to_keep, **arguments)
        logits: Tensor = output.logits
        return logits
    assert vision is not None, "images were packed with an adapter"
    return vision.logits(ids, images, logits_to_keep=logits_to_keep, **arguments)


def left_padded_positions(prompts: Sequence[Prompt], vision: VisionAdapter | None) -> Tensor:
    """Positions of prompts padded on the left: [B, L], or [3, B, L] with an adapter. Padding,
    which the mask hides, stands at 0."""
    rows = [
        torch.arange(len(prompt.token_ids))
        if vision is None
        else vision.positions(prompt.token_ids, prompt.images)
        for prompt in prompts
    ]
    length = max(row.shape[-1] for row in rows)
    return torch.stack([nn.functional.pad(row, (length - row.shape[-1], 0)) for row in rows], -2)


def pack_left_padded(
    prompts: Sequence[Prompt], vision: VisionAdapter | None, device: torch.device
) -> PackedImages | None:
    """The images of prompts padded on the left and laid end to end; None where there are none."""
    images = [image for prompt in prompts for image in prompt.images]
    if vision is None or not images:
        return None
    length = max(len(prompt.token_ids) for prompt in prompts)
    places = []
    for row, prompt in enumerate(prompts):
        start = (row + 1) * length - len(prompt.token_ids)
        if prompt.images:
            places += [start + place for place in vision.image_positions(prompt.token_ids)]
    return vision.pack(images, places).to(device)


class _PreallocatedLayer(DynamicLayer):
    """A cache layer with room for the whole completion.

    DynamicLayer copies all keys and values at every token. Here a token's are written in place,
    and attention reads a view.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None  # [rows, heads, capacity, dim]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            # A prompt's cache is filled once and then repeated, so it has no room to spare.
            self.keys, self.values = key_states, value_states
            self._buffers = (key_states, value_states)
            return self.keys, self.values
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self._view(end)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        length = self.keys.shape[-2]
        self._buffers = (self._grown(self.keys, repeats), self._grown(self.values, repeats))
        self._view(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        assert self._buffers is not None
        length = self.keys.shape[-2]
        self._buffers = (self._buffers[0][indices], self._buffers[1][indices])
        self._view(length)

    def _grown(self, states: Tensor, repeats: int) -> Tensor:
        rows, heads, length, dim = states.shape
        buffer = states.new_empty(rows * repeats, heads, self._capacity, dim)
        buffer[:, :, :length] = states.repeat_interleave(repeats, dim=0)
        return buffer

    def _view(self, length: int) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
