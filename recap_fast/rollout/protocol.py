"""What the trainer asks of a rollout engine, and what engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from recap_fast.model.chat_template import turn_end_id
from recap_fast.model.vision import VisionAdapter, VisionError
from recap_fast.types import FinishReason, Prompt, Rollout, SamplingSpec, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EngineError(UserError):
    """An engine that cannot run here, or prompts that it cannot take."""


OnGroup = Callable[[Sequence[Rollout]], None]
"""Takes the finished rollouts of one group, while others are still being generated."""


class RolloutEngine(Protocol):
    """Samples completions from the policy."""

    name: str
    version: str
    dtype: torch.dtype
    """What the engine computes in; log-probs can agree with the trainer's only that closely."""

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

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the trainer's weights, as `iter_weights` gives them.

        Raises:
            WeightSyncError: the stream was incomplete, or the engine did not take it.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine holds. It cannot be used afterwards."""
        ...


def iter_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All weights under their Hugging Face names, in layer order; views, not copies.

    A tied head is sent under its own name too: vLLM keeps its old head when it is left out, and
    says nothing.
    """
    seen = set()
    for name, tensor in model.state_dict().items():
        seen.add(name)
        yield name, tensor.detach()
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    if head_name is not None and f"{head_name}.weight" not in seen:
        yield f"{head_name}.weight", head.weight.detach()


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
) -> list[Rollout]:
    """Makes the records from each prompt's completions (token ids and log-probs).

    A greedy engine gives one completion a prompt, which stands for all n. Texts keep all tokens but
    the one that stopped: tags such as <think> are special tokens of some tokenizers.
    """
    rollouts = []
    pairs = zip(prompts, completions, strict=True)
    for group, (prompt, samples) in enumerate(pairs, start=first_group):
        for token_ids, logprobs in list(samples) * (n // len(samples)):
            stopped = bool(token_ids) and token_ids[-1] in stop_ids
            reason: FinishReason = "stop" if stopped else "length"
            said = token_ids[:-1] if stopped else token_ids
            text = tokenizer.decode(said, skip_special_tokens=False)
            rollouts.append(Rollout(prompt, group, token_ids, logprobs, reason, text))
    return rollouts


def column_picks(num_columns: int, count: int) -> Tensor:
    """Evenly spaced column numbers, at most `count`, for comparing a sample of a weight."""
    picks = torch.linspace(0, num_columns - 1, min(count, num_columns), dtype=torch.float32)
    return picks.long()
