"""Hangs gradients that were made in the forward pass onto a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recap_fast.ops._autograd import graph_is_kept, none_if_empty, refuse_double_backward


@torch.library.custom_op("recap_fast::attach_gradients", mutates_args=())
def attach_gradients(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    loss_scale: Tensor | None,
) -> Tensor:
    """The loss [], whose backward gives d_hidden, d_weight and d_bias times the loss's gradient.

    They are gradients of the loss times `loss_scale` [], by which backward divides. An empty
    gradient is none. The gradients are used up by backward, unless the graph is kept.
    """
    return loss.clone()


@attach_gradients.register_fake
def _(loss: Tensor, *others: Tensor | None) -> Tensor:
    return torch.empty_like(loss)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[4:])


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward("fused_linear_policy_loss")
    # A compiled backward may not write to what it was given; it finds its own place for results.
    keep = torch.compiler.is_compiling() or graph_is_kept()
    *saved, loss_scale = ctx.saved_tensors
    # Exactly 1 where the loss was multiplied by the same scale.
    factor = grad_output if loss_scale is None else grad_output / loss_scale
    gradients = [none_if_empty(gradient) for gradient in saved]
    scaled = [None if g is None else _scaled(g, factor, keep) for g in gradients]
    return (None, *scaled, None, None, None, None)


attach_gradients.register_autograd(_backward, setup_context=_save)


def _scaled(gradient: Tensor, factor: Tensor, keep: bool) -> Tensor:
    """gradient * factor without reading the factor on the host; in place unless kept for later."""
    if factor.is_cuda:
        # CUDA would round a 0-dim factor to bfloat16 first; with dimensions it promotes.
        factor = factor.reshape([1] * gradient.dim())
    if keep:
        return torch.mul(gradient, factor).to(gradient.dtype)
    return torch.mul(gradient, factor, out=gradient)
