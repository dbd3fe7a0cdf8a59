"""Does the engine sample from the trainer's policy? A metric, a guard and a diagnosis.

The trainer computes log-probs of the very tokens that the engine sampled. Both should agree to the
precision of the engine's dtype; a weight that a sync lost makes them part.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from recap_fast.config import RolloutConfig
from recap_fast.model.sharding import compute_device
from recap_fast.model.vision import make_adapter
from recap_fast.rollout.embedded import (
    forward_logits,
    inference_state,
    left_padded_positions,
    pack_left_padded,
)
from recap_fast.rollout.protocol import (
    RolloutEngine,
    column_picks,
    iter_weights,
)
from recap_fast.types import Prompt, Rollout, SamplingSpec, WeightSyncError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Mean |log-prob difference| that rounding alone can explain, with room: measured floors are 4e-6
in float32 and 0.045 in bfloat16."""

_PROBED_COLUMNS = 16
_STALE = 1e-2
"""Relative difference from which a weight is called stale although the trainer may have taken
optimizer steps since the last sync; such steps change weights far less."""


def logprob_diff(
    trainer_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and maximum of |difference| over the sampled tokens; 0 where there are none.

    Args:
        trainer_logprobs, rollout_logprobs: [N] float32.
        mask: [N] bool, True where the token was sampled by the engine. Other entries may hold NaN.

    Returns:
        Two scalars on the tensors' device. Nothing waits for the device.
    """
    if trainer_logprobs.numel() == 0:
        zero = trainer_logprobs.new_zeros(())
        return zero, zero
    difference = (trainer_logprobs.detach() - rollout_logprobs).abs()
    difference = torch.where(mask.bool(), difference, 0.0)
    return difference.sum() / mask.bool().sum().clamp(min=1), difference.max()


@runtime_checkable
class InspectableEngine(Protocol):
    """An engine whose weights can be read back."""

    def read_columns(self, shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, Tensor]:
        """See `VllmEngine.read_columns`."""
        ...


def weight_differences(
    engine: RolloutEngine, named_tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, float]:
    """Relative difference between the engine's weights and the given ones, by name.

    A sample of each weight is compared in the engine's dtype; 0 means bitwise equal. Weights that
    cannot be read back are left out, so that the result is empty for an engine that shows none.
    """
    if not isinstance(engine, InspectableEngine):
        return {}
    shapes, columns = {}, {}
    for name, tensor in named_tensors:  # one at a time: some are made for this alone
        shapes[name] = tuple(tensor.shape)
        columns[name] = _columns(tensor.detach(), engine.dtype)
    differences = {}
    for name, actual in engine.read_columns(shapes, _PROBED_COLUMNS).items():
        wanted = columns[name]
        scale = max(wanted.norm().item(), actual.norm().item(), 1e-30)
        differences[name] = (wanted - actual).norm().item() / scale
    return differences


def _columns(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.ndim == 2:
        picks = column_picks(weight.shape[1], _PROBED_COLUMNS)
        weight = weight[:, picks.to(weight.device)]
    return weight.to(dtype).float().cpu()


class MismatchGuard:
    """Watches the mismatch of each step.

    Args:
        config: `warn_logprob_diff` and `max_logprob_diff` bound the mean.
        model: the trained model; when given, the error names the weights that the engine lacks.
    """

    def __init__(
        self, config: RolloutConfig, engine: RolloutEngine, model: PreTrainedModel | None = None
    ) -> None:
        self._config = config
        self._engine = engine
        self._model = model

    def check(self, mean: float, max: float, step: int, staleness: int = 0) -> None:
        """Judges one step's mismatch, given as host numbers.

        Args:
            staleness: optimizer steps since the oldest of the weights that sampled the step. Above
                0 the difference is mostly what the policy has changed, of which nobody is warned.

        Raises:
            WeightSyncError: the mean is above the configured maximum, or not a number.
        """
        stop = self._config.max_logprob_diff
        if not math.isfinite(mean) or (stop is not None and mean > stop):
            raise WeightSyncError(
                f"step {step}: log-probs from {self._engine.name} {self._engine.version} differ "
                f"from the trainer's by {mean:.3g} on average (at most {max:.3g}); "
                f"rollout.max_logprob_diff is {stop}. {self._cause(mean, staleness)}"
            )
        if mean > self._config.warn_logprob_diff and not staleness:
            logger.warning(
                "step %d: log-probs from %s %s differ from the trainer's by %.3g on average (at "
                "most %.3g); rollout.warn_logprob_diff is %g",
                step,
                self._engine.name,
                self._engine.version,
                mean,
                max,
                self._config.warn_logprob_diff,
            )

    def _cause(self, mean: float, staleness: int) -> str:
        if not math.isfinite(mean):
            return "Log-probs that are not numbers come from weights that have diverged."
        differences = {}
        if self._model is not None:
            differences = weight_differences(
                self._engine, iter_weights(self._model, self._engine.dtype)
            )
        if staleness and not _stale(differences, _STALE):
            return (
                f"Tokens are up to {staleness} optimizer steps old, and the policy has moved on "
                f"since: lower optimizer.learning_rate or rollout.async, or raise the bound."
            )
        return _explain(differences, _STALE)


def _explain(differences: Mapping[str, float], threshold: float) -> str:
    """The likely cause, in words, from what `weight_differences` found."""
    stale = _stale(differences, threshold)
    if stale:
        shown = ", ".join(f"{name} (off by {differences[name]:.2g})" for name in stale[:5])
        more = f" and {len(stale) - 5} more" if len(stale) > 5 else ""
        return (
            f"The engine does not hold the trainer's values of {len(stale)} of "
            f"{len(differences)} weights: {shown}{more}. The sync does not deliver them."
        )
    if differences:
        return (
            f"The engine holds the trainer's values of all {len(differences)} weights that can be "
            f"compared, so look for something other than the sync: sampling at another "
            f"temperature than loss.temperature, another chat template or model revision, or a "
            f"kernel that computes differently."
        )
    return (
        "Likely causes: a weight that the sync does not deliver (a tied lm_head is the usual "
        "one), a prefix cache that outlived the sync, or another temperature than the trainer's."
    )


def _stale(differences: Mapping[str, float], threshold: float) -> list[str]:
    """Names past the threshold, the furthest off first."""
    names = [name for name, value in differences.items() if not value <= threshold]
    return sorted(names, key=lambda name: -differences[name])


@dataclass(frozen=True, slots=True)
class SyncReport:
    """Outcome of `verify_sync`."""

    mean: float
    """Mean |log-prob difference| over the generated tokens."""
    max: float
    stale: list[str]
    """Weights whose values in the engine are not the trainer's, the furthest off first."""
    num_compared: int
    """How many weights could be read back from the engine."""


def verify_sync(
    engine: RolloutEngine,
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 8,
    tolerance: float | None = None,
) -> SyncReport:
    """Generates a few tokens greedily and compares log-probs and weights with the trainer's.

    To be run right after a sync, or before the first step.

    Args:
        prompts: a handful will do.
        tolerance: mean |log-prob difference| allowed; None: what rounding in the engine's dtype
            can explain.

    Raises:
        WeightSyncError: log-probs differ by more; the text names the weights that are off.
    """
    tolerance = _TOLERANCE[engine.dtype] if tolerance is None else tolerance
    rollouts = engine.generate(prompts, SamplingSpec(1, max_new_tokens, 0.0, 0))
    differences = weight_differences(engine, iter_weights(model, engine.dtype))
    stale = _stale(differences, 0.0)
    with inference_state(model, engine.dtype):
        pairs = [
            (sequence_logprobs(model, rollout), torch.tensor(rollout.logprobs, dtype=torch.float32))
            for rollout in rollouts
        ]
    ours, theirs = (torch.cat([pair[side].cpu() for pair in pairs]) for side in (0, 1))
    mean, largest = (x.item() for x in logprob_diff(ours, theirs, torch.ones_like(ours)))
    if not mean <= tolerance:
        raise WeightSyncError(
            f"log-probs of greedy tokens from {engine.name} {engine.version} differ from the "
            f"trainer's by {mean:.3g} on average (at most {largest:.3g}; {tolerance:.3g} is "
            f"allowed in {engine.dtype}). {_explain(differences, 0.0)}"
        )
    if stale:
        logger.warning(
            "%s %s: log-probs agree, but %s", engine.name, engine.version, _explain(differences, 0)
        )
    return SyncReport(mean, largest, stale, len(differences))


def sequence_logprobs(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """The model's own log-probs of a rollout's tokens, [number of tokens] float32."""
    vision = make_adapter(model)
    prompt, count = rollout.prompt, len(rollout.token_ids)
    device = compute_device(model)
    ids = torch.tensor([prompt.token_ids + rollout.token_ids], device=device)
    positions = left_padded_positions([prompt], vision)
    following = positions.amax(-1, keepdim=True) + torch.arange(1, count + 1)
    # The logits at a position predict the next token; the last position's are not needed.
    logits = forward_logits(
        model,
        vision,
        ids,
        pack_left_padded([prompt], vision, device),
        logits_to_keep=count + 1,
        position_ids=torch.cat([positions, following], -1).to(device),
        use_cache=False,
    )[0, :-1]
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(1, ids[0, -count:, None])[:, 0]
