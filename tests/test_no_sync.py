"""The guard against host syncs catches what it claims to catch, and lets the rest through."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.no_sync import ForbidHostSync, HostSyncError

VALUES = torch.tensor([3.0, 1.0, 2.0])
MASK = VALUES > 1.5
SYNCING: dict[str, Callable[[], object]] = {
    "item": lambda: VALUES.sum().item(),
    "bool": lambda: bool(MASK.any()),
    "float": lambda: float(VALUES[0]),
    "branch": lambda: 1 if VALUES.sum() > 0 else 0,
    "slice bound": lambda: VALUES[: MASK.sum()],
    "range": lambda: range(MASK.sum()),
    "tolist": lambda: VALUES.tolist(),
    "numpy": lambda: VALUES.numpy(),
    "asarray": lambda: np.asarray(VALUES),
    "cpu": lambda: VALUES.cpu(),
    "equal": lambda: torch.equal(VALUES, VALUES),
    "allclose": lambda: torch.allclose(VALUES, VALUES),
    "nonzero": lambda: torch.nonzero(VALUES),
    "where with one argument": lambda: torch.where(MASK),
    "masked_select": lambda: torch.masked_select(VALUES, MASK),
    "bool index": lambda: VALUES[MASK],
    "bool index, written": lambda: VALUES.clone().__setitem__(MASK, VALUES[:2]),
    "unique": lambda: torch.unique(VALUES),
    "bincount": lambda: torch.bincount(VALUES.long()),
    "repeat_interleave": lambda: torch.repeat_interleave(VALUES, VALUES.long()),
    "to another device": lambda: VALUES.to("meta"),
    "copy_ to another device": lambda: torch.empty(3, device="meta").copy_(VALUES),
    "repr": lambda: repr(VALUES),
}


@pytest.mark.parametrize("call", SYNCING.values(), ids=SYNCING.keys())
def test_syncs_are_caught(call: Callable[[], object]) -> None:
    with ForbidHostSync(), pytest.raises(HostSyncError):
        call()


def test_a_sync_in_the_backward_pass_is_caught() -> None:
    x = VALUES.clone().requires_grad_()
    y = x * 2
    y.register_hook(lambda gradient: gradient * gradient.sum().item())
    with ForbidHostSync(), pytest.raises(HostSyncError):
        y.sum().backward()


def test_device_work_passes_and_the_context_ends() -> None:
    weight = VALUES.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], fused=True)
    with ForbidHostSync():
        chosen = VALUES[torch.tensor([2, 0])]
        (weight * chosen.sum()).where(MASK, 0.0).logsumexp(0).backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        torch.repeat_interleave(VALUES, torch.tensor([1, 1, 2]), output_size=4)
        VALUES.to(torch.bfloat16)
    assert weight.tolist() != VALUES.tolist()
