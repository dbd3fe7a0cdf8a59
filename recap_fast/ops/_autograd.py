"""What the autograd functions of this package share."""

from __future__ import annotations

import torch


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
