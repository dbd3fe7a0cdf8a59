from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import torch

from recap_fast.model.policy import Policy
from recap_fast.training.determinism import determinism, prepare_determinism
from recap_fast.training.optimization import PolicyOptimizer
from tests.tiny import tiny_config, tiny_llama
from tests.training.test_optimization import make_update


def test_only_deterministic_algorithms_inside():
    x = torch.zeros(3)
    with determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(RuntimeError, match="deterministic"):
            x.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    x.put_(torch.tensor([0]), torch.tensor([1.0]))


def test_what_was_set_before_is_put_back():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with determinism(False):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        with contextlib.suppress(KeyError), determinism(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_users_workspace_wins(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    prepare_determinism()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_determinism()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def steps(device: torch.device, config) -> list[torch.Tensor]:
    policy = Policy(tiny_llama().to(device), torch.bfloat16)
    optimizer = PolicyOptimizer(policy, None, config)
    with determinism(True):
        for seed in (3, 4):
            update = make_update(config, max_tokens=60, seed=seed).to(device)
            optimizer.step(update, torch.ones(3, device=device), 1e-2)
    return [parameter.detach().cpu() for parameter in optimizer.parameters]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_has_deterministic_algorithms_only(tmp_path, device):
    """On CUDA torch raises where one is missing."""
    prepare_determinism()
    config = tiny_config(tmp_path, tmp_path)
    first, second = (steps(torch.device(device), config) for _ in range(2))
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(first, second, strict=True))
