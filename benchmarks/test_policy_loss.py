"""The head and the policy loss, forward and backward, beside peers and the GEMM floor."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.peers import POLICY_LOSSES, Implementation


@pytest.mark.parametrize("implementation", POLICY_LOSSES, ids=str)
def test_policy_loss(implementation: Implementation, measure_loss: Callable[..., None]) -> None:
    measure_loss(implementation, "policy_loss")
