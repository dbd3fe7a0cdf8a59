"""Our head as a backend of verl's fused kernels, called "recap_fast".

verl patches its models' forward for the backends "torch" and "liger" with one that hands the last
hidden states and `lm_head.weight` to `FusedLinearForPPO(impl_backend=...)`. The name is looked up
at each forward, so a class in its place leads our backend to our head and others to theirs.

verl's FSDP2 makes an untied lm_head a unit of its own, whose weight is a shard outside of that
module's own forward. There we score in that forward, where FSDP gathers the weight before and
reduces its gradient after; verl's own backends fail.

Shapes: B rows, T tokens of a row, H hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from typing import Any

import verl.models.transformers.monkey_patch as monkey_patch
import verl.utils.experimental.torch_functional as torch_functional
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recap_fast.model.logits import refuse_more_than_backbone_and_head, scale_and_softcap
from recap_fast.ops.logprobs import linear_logprobs

__all__ = ["BACKEND", "FusedLinearForPPO"]

BACKEND = "recap_fast"
"""The value of actor_rollout_ref.model.fused_kernel_options.impl_backend."""


_THEIR_HEAD: Any = torch_functional.FusedLinearForPPO


class FusedLinearForPPO(_THEIR_HEAD):
    """verl's class of this name, over `linear_logprobs`.

    Args:
        chunk_size: of verl's backends; ours chooses the number of tokens at a time from V.
        impl_backend: "recap_fast", or one of verl's, which is then run.

    Raises:
        ValueError: another backend.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = BACKEND) -> None:
        super().__init__(chunk_size, "torch" if impl_backend == BACKEND else impl_backend)
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of `input_ids` and entropies under hidden_states @ weight.T / temperature.

        Args:
            hidden_states: [B, T, H] or [T, H], each already predicting its entry of `input_ids`.
            vocab_weights: [V, H].
            input_ids: [B, T] or [T], any integer dtype; -100 is ignored and gives 0.
            temperature: one number for all.

        Returns:
            log_probs and entropy, shaped as `input_ids`, float32, both differentiable. (verl's own
            entropy has the dtype of the hidden states.)

        Raises:
            ValueError: shapes that do not fit, a temperature for each sample, which verl's fused
                kernels do not take either, or the shard of a head that is no lm_head, a Linear, of
                a model patched by verl.
        """
        if self.impl_backend != BACKEND:
            theirs: tuple[Tensor, Tensor] = super().forward(
                hidden_states, vocab_weights, input_ids, temperature
            )
            return theirs
        if isinstance(temperature, Tensor):
            raise ValueError(
                f"temperature: wanted one number, got a tensor {list(temperature.shape)}: "
                "temperatures by sample need actor_rollout_ref.model.use_fused_kernels=False"
            )
        if hidden_states.shape[:-1] != input_ids.shape:
            raise ValueError(
                f"input_ids: wanted {list(hidden_states.shape[:-1])}, got {list(input_ids.shape)}"
            )
        if isinstance(vocab_weights, DTensor):
            return _score_in_module(
                _module_of(vocab_weights), hidden_states, input_ids, float(temperature)
            )
        return _score(hidden_states, vocab_weights, input_ids, float(temperature))


def _score(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs, entropy = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1).long(),
        temperature=temperature,
    )
    return logprobs.view(targets.shape), entropy.view(targets.shape)


def _score_in_module(
    module: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return _score(hidden, module.weight, targets, temperature)

    module.forward = forward  # type: ignore[method-assign, assignment]  # over its class's, for this call
    try:
        scored: tuple[Tensor, Tensor] = module(hidden)
    finally:
        del module.forward
    return scored


_patched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models that verl has patched for our backend."""


def _module_of(weight: DTensor) -> nn.Linear:
    for model in _patched:
        module = model.get_output_embeddings()  # type: ignore[operator]
        if getattr(module, "weight", None) is weight and isinstance(module, nn.Linear):
            return module
    raise ValueError(
        f"vocab_weights: wanted the whole head or the lm_head of a model patched for {BACKEND}, "
        f"got the shard {list(weight.to_local().shape)} of a head {list(weight.shape)}"
    )


class _StandIn(FusedLinearForPPO):
    """In the place of verl's class, with its default."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__(chunk_size, impl_backend)


_their_patch = monkey_patch.patch_forward_with_backends


def _patch_forward_with_backends(
    model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
) -> None:
    """verl's function of this name, which knows one backend more.

    Raises:
        ValueError: the model's logits are not hidden @ lm_head.weight.T. (verl's own backends
            leave out what it names.)
    """
    if not use_fused_kernels or fused_kernels_backend != BACKEND:
        _their_patch(model, use_fused_kernels, fused_kernels_backend)
        return
    scale, softcap = scale_and_softcap(model)
    refuse_more_than_backbone_and_head(model)
    if scale != 1 or softcap is not None:
        raise ValueError(
            f"impl_backend={BACKEND}: the logits of {type(model).__name__} are multiplied by "
            f"{scale} and capped at {softcap}, which verl's fused forward does not hand to a head: "
            "set actor_rollout_ref.model.use_fused_kernels=False"
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"impl_backend={BACKEND}: {type(model).__name__} has a bias in its lm_head, which "
            "verl's fused forward does not hand to a head: "
            "set actor_rollout_ref.model.use_fused_kernels=False"
        )
    _their_patch(model, use_fused_kernels, "torch")
    _patched.add(model)
    model._verl_fused_kernels_backend = BACKEND  # what their forward constructs the head with


torch_functional.FusedLinearForPPO = _StandIn
monkey_patch.patch_forward_with_backends = _patch_forward_with_backends
