"""How much of the weights a step changes: the count, held against one made by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.weight_changes import STEPS, _measure


@pytest.mark.parametrize(("rate", "share"), [(1e-9, 0.0), (1.0, 1.0)])
def test_the_share_that_a_step_changes(rate: float, share: float) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 32)
    with torch.no_grad():
        model.weight.fill_(1.0)  # whose neighbour in bfloat16 is 2 ** -8 away
        model.bias.fill_(1.0)
    found = _measure(model, rate)
    assert len(found["changed_share_by_step"]) == STEPS
    assert found["changed_share_by_step"][0] == pytest.approx(share, abs=0.01)
