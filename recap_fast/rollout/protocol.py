"""What the trainer asks of a rollout engine, and what engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from recap_fast.model.chat_template import turn_end_id
from recap_fast.model.lora import is_of_adapter, merged_weights, plain_name
from recap_fast.model.vision import VisionAdapter, VisionError
from recap_fast.types import (
    FinishReason,
    Prompt,
    Rollout,
    SamplingSpec,
    UserError,
    WeightSyncError,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EngineError(UserError):
    """An engine that cannot run here, or prompts that it cannot take."""


class SamplingStoppedError(UserError):
    """An engine has given up waiting for its servers, because the run is to stop."""


OnGroup = Callable[[Sequence[Rollout]], None]
"""Takes the finished rollouts of one group, while others are still being generated."""


class RolloutEngine(Protocol):
    """Samples completions from the policy."""

    name: str
    version: str
    dtype: torch.dtype
    """What the engine computes in; log-probs can agree with the trainer's only that closely."""
    ranks: int
    """How many processes sample together, neighbours by rank. Each gives the same prompts and the
    same `sampling`, and gets the same rollouts and calls of `on_group` in the same order."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        on_group: OnGroup | None = None,
    ) -> list[Rollout]:
        """Samples `sampling.n` completions of each prompt.

        `on_group` is called with the rollouts of each group as soon as they are complete, in
        whatever order groups finish. What it raises ends the sampling, and leaves the engine fit
        for another.

        Returns them in the prompts' order, a group's side by side. Log-probs are those of the
        sampled tokens under the tempered distribution (temperature 0 is greedy; log-probs are then
        those at temperature 1). The same weights, prompts and `sampling` give the same rollouts,
        and torch's global random state is left as it was.

        Raises:
            EngineError: a prompt that is empty, or too long to leave room for the completion.
        """
        ...

    def any_rank(self, here: bool) -> bool:
        """Whether it is so in one of the processes that sample together, all of which ask."""
        ...

    def sleep(self) -> None:
        """Gives back, until the next sync, the memory that only sampling needs."""
        ...

    def sync_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int = 0
    ) -> None:
        """Takes over the trainer's weights, as `iter_weights` gives them. Wakes the engine.

        Args:
            policy_version: optimizer steps since the start.

        Raises:
            WeightSyncError: the stream was incomplete, or the engine did not take it.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine holds. It cannot be used afterwards."""
        ...


@runtime_checkable
class Stoppable(Protocol):
    """An engine that waits for servers, which may be gone for longer than a run that is to stop
    shall wait."""

    def heed(self, stop: Sequence[int]) -> None:
        """From now on, once `stop` is filled from outside, `sync_weights` and, where no server is
        there, `generate` end soon, with `SamplingStoppedError`."""
        ...


def iter_weights(
    model: PreTrainedModel, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """All weights under their Hugging Face names, in layer order; views, not copies, but for those
    with adapters, to which these are added one at a time.

    Those of a sharded model are gathered, a layer or several at a time, which every process takes
    part in.

    A tied head is sent under its own name too, behind the embedding: vLLM keeps its old head when
    it is left out, and says nothing.

    Args:
        dtype: the engine's; where it is narrower, shards are cast before they are gathered.
    """
    return merged_weights(model, dtype)


def weight_names(model: PreTrainedModel) -> frozenset[str]:
    """The names that `iter_weights` gives, for which nothing is gathered."""
    return frozenset(weight_shapes(model))


def weight_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The same with their whole shapes."""
    return {
        plain_name(name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not is_of_adapter(name)
    }


class ExpectedWeights:
    """Sees, while an engine takes weights over, whether they are all there.

    Args:
        names: what a complete stream contains.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._missing = set(names)

    def watch(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same stream, noted as it goes by."""
        for name, tensor in named_tensors:
            self._missing.discard(name)
            yield name, tensor

    def check(self, engine: str) -> None:
        """Raises `WeightSyncError` where something has not come by.

        Args:
            engine: its name and version, for the message.
        """
        if not self._missing:
            return
        names, limit = sorted(self._missing), 5
        rest = f" and {len(names) - limit} more" if len(names) > limit else ""
        raise WeightSyncError(
            f"{engine} was sent an incomplete set of weights; it lacked "
            f"{', '.join(names[:limit])}{rest}"
        )


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a completion: the generation config's and the tokenizer's EOS, and
    what the chat template ends an assistant's turn with, which base models' configurations do not
    mention and replayed rows teach."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    found = configured if isinstance(configured, list) else [configured]
    found = [*found, tokenizer.eos_token_id, turn_end_id(tokenizer)]
    return frozenset(int(x) for x in found if x is not None)


def check_prompts(
    prompts: Sequence[Prompt],
    sampling: SamplingSpec,
    max_model_len: int,
    vision: VisionAdapter | None = None,
) -> None:
    """Raises `EngineError` for a prompt that the engine cannot complete.

    Args:
        vision: the model's adapter, if it has one.
    """
    for prompt in prompts:
        where = f"prompt {prompt.source}:{prompt.row}"
        if not prompt.token_ids:
            raise EngineError(f"{where} has no tokens")
        if len(prompt.token_ids) + sampling.max_new_tokens > max_model_len:
            raise EngineError(
                f"{where} has {len(prompt.token_ids)} tokens, which with {sampling.max_new_tokens} "
                f"new ones exceeds the engine's limit of {max_model_len}"
            )
        if prompt.images and vision is None:
            raise EngineError(f"{where} has images, but the model takes none")
        if vision is not None:
            try:
                vision.check(prompt.token_ids, prompt.images)
            except VisionError as error:
                raise EngineError(f"{where}: {error}") from error


def prompt_seed(seed: int, index: int) -> int:
    """A 31-bit seed for the step's prompt number `index`, unrelated to its neighbours'."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0]) >> 1


def build_rollouts(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[tuple[list[int], list[float]]]],
    n: int,
    stop_ids: frozenset[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    first_group: int = 0,
    versions: Sequence[Sequence[Sequence[int]]] | None = None,
) -> list[Rollout]:
    """Makes the records from each prompt's completions (token ids and log-probs).

    A greedy engine gives one completion a prompt, which stands for all n. Texts keep all tokens but
    the one that stopped: tags such as <think> are special tokens of some tokenizers.

    Args:
        versions: of each token of each completion, `Rollout.versions`.
    """
    rollouts = []
    for place, (prompt, samples) in enumerate(zip(prompts, completions, strict=True)):
        group = first_group + place
        known = versions[place] if versions is not None else [()] * len(samples)
        pairs = list(zip(samples, known, strict=True))
        for (token_ids, logprobs), sampled_by in pairs * (n // len(samples)):
            stopped = bool(token_ids) and token_ids[-1] in stop_ids
            reason: FinishReason = "stop" if stopped else "length"
            said = token_ids[:-1] if stopped else token_ids
            text = tokenizer.decode(said, skip_special_tokens=False)
            rollouts.append(Rollout(prompt, group, token_ids, logprobs, reason, text, sampled_by))
    return rollouts


def column_picks(num_columns: int, count: int) -> Tensor:
    """Evenly spaced column numbers, at most `count`, for comparing a sample of a weight."""
    picks = torch.linspace(0, num_columns - 1, min(count, num_columns), dtype=torch.float32)
    return picks.long()
