"""What the autograd functions of this package share."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_double_backward(name: str) -> None:
    """Raise where backward is itself to be differentiated: a silent zero would be the alternative.

    Raises:
        RuntimeError: called from a backward with create_graph=True.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no double backward: its gradient is made outside autograd. Call backward "
            f'without create_graph=True, or use impl="reference"'
        )


def graph_is_kept() -> bool:
    """Whether the running backward keeps its graph, so that it may be run again."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def empty_if_none(value: Tensor | None, like: Tensor) -> Tensor:
    """What a custom operator returns in the place of None."""
    return like.new_empty(0) if value is None else value


def none_if_empty(value: Tensor) -> Tensor | None:
    """Undoes `empty_if_none`. A gradient [0, H] of no tokens is a tensor, not None."""
    return None if value.shape == (0,) else value
