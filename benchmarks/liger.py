"""Liger's losses as steps, and its patches of transformers' modules, which must not stay.

Its patches hold for the whole process, and so for what is compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.inputs import Inputs

Step = Callable[[], Tensor | None]


@contextmanager
def patches_undone(model_type: str) -> Iterator[None]:
    """Leaves transformers' module of a model type as it was found, whatever was patched within."""
    module = vars(import_module(f"transformers.models.{model_type}.modeling_{model_type}"))
    before = dict(module)
    try:
        yield
    finally:
        for name in module.keys() - before.keys():
            del module[name]
        module.update(before)


def skip_without_liger(liger: bool, device: torch.device) -> None:
    """Skips a benchmark that leaves Liger out where Liger could not run anyway."""
    if not liger and device.type != "cuda":
        pytest.skip("Liger acts on CUDA only: the same as with it")


def liger_chunked(inputs: Inputs, ours: bool = False) -> Step:
    """Liger's chunked GRPO loss, or ours under its constructor and call.

    On a CPU all sequences are one chunk, its fastest setting there: every further chunk adds a
    pass over a weight-sized gradient, and compiling would touch only the loss of [B, T] log-probs.
    On CUDA it is compiled, as it is by default, with 4096 tokens in a chunk.
    """
    if ours:
        from recap_fast.integrations.liger import FusedLinearGRPOLoss
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as FusedLinearGRPOLoss

    b, t, _ = inputs.hidden.shape
    on_cpu = inputs.hidden.device.type == "cpu"
    module = FusedLinearGRPOLoss(
        beta=0.0,
        compiled=not on_cpu,
        use_ref_model=False,
        chunk_size=b if on_cpu else max(1, 4096 // t),
        loss_type="bnpo",
    )
    mask = torch.ones_like(inputs.targets)

    def step() -> None:
        loss, _ = module(inputs.hidden, inputs.weight, inputs.targets, mask, inputs.advantages)
        loss.backward()

    return step


def liger_triton(inputs: Inputs) -> Step:
    """Liger's Triton GRPO loss over whole logits, whose gradient replaces them."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    mask = torch.ones_like(inputs.targets)

    def step() -> None:
        # It wants logits of one more position, the last of which it drops.
        logits = F.linear(F.pad(inputs.hidden, (0, 0, 0, 1)), inputs.weight)
        loss, _ = triton_grpo_loss(
            logits, None, None, inputs.targets, inputs.advantages, mask,
            temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2, inplace=True,
            loss_type="bnpo", reduce=True,
        )  # fmt: skip
        loss.backward()

    return step


def liger_cute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's CuTe kernels for sm_90: negative log-likelihood and entropy of each token."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    flat = hidden.flatten(0, 1)
    nll, _ = LigerFusedLinearScaledCrossEntropyFunction.apply(
        flat, weight, targets.flatten(), 1.0, -100, 1, True
    )
    return -nll.view_as(targets)
