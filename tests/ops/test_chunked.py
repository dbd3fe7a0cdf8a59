"""The chunk loop: chunk sizes change nothing, and nothing of size [N, V] is ever allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recap_fast.ops import chunked, fused_linear_policy_loss, linear_logprobs, rows
from tests.ops.batches import random_batch


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements that any operator returned, and count GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.gemm_flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = [x for x in args if isinstance(x, torch.Tensor) and x.dim() == 2][-2:]
            self.gemm_flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return result


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows of 1024 float32 logits, blocks of 4."""
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", 16 * 1024)
    monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", 4 * 1024)
    monkeypatch.setattr(chunked, "WEIGHT_ROWS", 300)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("options", "gemms"),
    [
        ({}, 3),
        ({"old": True, "ref": True, "kl_coef": 0.1, "entropy_coef": 0.1}, 3),
        ({"ratio_level": "sequence"}, 3),
        ({"ratio_level": "sequence", "old": True}, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_and_number_of_gemms(options: dict, gemms: int, dtype: torch.dtype) -> None:
    n, h, v = 70, 8, 1024
    batch = random_batch(n=n, h=h, v=v, **options)
    with LargestTensor() as seen:
        batch.run("torch", dtype)
    assert seen.elements <= 32 * v
    assert seen.gemm_flops == gemms * 2 * n * h * v
    frozen = batch.tensors["weight"].to(dtype)
    with LargestTensor() as seen:
        batch.run("torch", dtype, weight=frozen)
    assert seen.gemm_flops == (gemms - 1) * 2 * n * h * v


@pytest.mark.usefixtures("small_chunks")
def test_linear_logprobs_never_holds_all_logits() -> None:
    batch = random_batch(n=70, v=1024)
    hidden, weight = (batch.tensors[x].float().requires_grad_() for x in ("hidden", "weight"))
    with LargestTensor() as seen:
        logprobs, entropy = linear_logprobs(hidden, weight, batch.tensors["targets"])
        (logprobs.sum() + entropy.sum()).backward()
    assert seen.elements <= 16 * 1024
    assert seen.gemm_flops == 4 * 2 * 70 * 8 * 1024


def test_no_grad_callers_pay_one_gemm() -> None:
    batch = random_batch(n=30, v=50)
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in batch.tensors.items()}
    arguments["weight"].requires_grad_()
    with LargestTensor() as seen, torch.no_grad():
        fused_linear_policy_loss(**arguments)
    assert seen.gemm_flops == 2 * 30 * 8 * 50


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunk_size_does_not_change_results(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = random_batch(
        n=70, v=129, bias=True, old=True, ref=True, kl_coef=0.1, entropy_coef=0.1, logit_softcap=5.0
    )
    whole = batch.run("torch", dtype)
    for chunk, block in ((1, 1), (7, 3), (69, 64)):
        monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", chunk * 129)
        monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", block * 129)
        parts = batch.run("torch", dtype)
        for name, value in whole.items():
            if dtype == torch.bfloat16:
                torch.testing.assert_close(parts[name], value, rtol=2e-2, atol=2e-3, msg=name)
            else:
                torch.testing.assert_close(parts[name], value, msg=name)


def test_a_token_gets_the_same_log_prob_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", 16 * 1024)
    batch = random_batch(n=64, v=1024)
    hidden, weight = batch.tensors["hidden"].float(), batch.tensors["weight"].float()
    targets = batch.tensors["targets"]
    everything, _ = linear_logprobs(hidden, weight, targets)
    half, _ = linear_logprobs(hidden[:32], weight, targets[:32])
    assert torch.equal(everything[:32], half)
