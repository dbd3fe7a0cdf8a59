"""The chunk loop: chunk sizes change nothing, and nothing of size [N, V] is ever allocated."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from recap_fast.ops import chunked, fused_linear_policy_loss, linear_logprobs, rows
from recap_fast.ops.launch import recording
from tests.no_sync import DispatchModeInside
from tests.ops.batches import random_batch


class LargestTensor(DispatchModeInside):
    """Remember the largest number of elements that any operator returned, and count GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.gemm_flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.call(func, args, kwargs or {})
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


impls = pytest.mark.parametrize("impl", ["torch", "triton"])


@impls
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
def test_memory_and_number_of_gemms(
    impl: str, options: dict, gemms: int, dtype: torch.dtype
) -> None:
    n, h, v = 70, 8, 1024
    batch = random_batch(n=n, h=h, v=v, **options)
    # The kernels' own numbers do not matter here, nor does the interpreter's time.
    record = recording(lambda _: None) if impl == "triton" else nullcontext()
    with LargestTensor() as seen, record:
        batch.run(impl, dtype)
    assert seen.elements <= 32 * v
    assert seen.gemm_flops == gemms * 2 * n * h * v
    frozen = batch.tensors["weight"].to(dtype)
    record = recording(lambda _: None) if impl == "triton" else nullcontext()
    with LargestTensor() as seen, record:
        batch.run(impl, dtype, weight=frozen)
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


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("torch", torch.float64),
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        ("triton", torch.float32),
        ("triton", torch.bfloat16),
    ],
)
def test_chunk_size_does_not_change_results(
    impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = random_batch(
        n=70, v=129, bias=True, old=True, ref=True, kl_coef=0.1, entropy_coef=0.1, logit_softcap=5.0
    )
    whole = batch.run(impl, dtype)
    for chunk, block in ((1, 1), (7, 3), (69, 64)):
        monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", chunk * 129)
        monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", block * 129)
        parts = batch.run(impl, dtype)
        for name, value in whole.items():
            if dtype == torch.bfloat16:
                torch.testing.assert_close(parts[name], value, rtol=2e-2, atol=2e-3, msg=name)
            else:
                torch.testing.assert_close(parts[name], value, msg=name)


@pytest.mark.parametrize(("chunks", "dtype"), [(1, "bf16"), (3, "bf16"), (4, "fp32"), (12, "fp32")])
def test_sums_over_any_number_of_chunks_are_as_good_as_one_of_float32(
    chunks: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rounding of the sum, and one of each summand: sqrt(2) times a single rounding's error."""
    batch = random_batch(n=1536, h=32, v=512)
    exact = batch.run("torch", torch.float64, rounded=torch.bfloat16)
    single = batch.run("torch", torch.bfloat16)["d_weight"]
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", 1536 // chunks * 512)
    summed = []
    accumulate = chunked._accumulate_weight
    monkeypatch.setattr(
        chunked,
        "_accumulate_weight",
        lambda total, *rest: (summed.append(total.dtype), accumulate(total, *rest)),
    )
    got = batch.run("torch", torch.bfloat16)["d_weight"]
    assert summed == [torch.bfloat16 if dtype == "bf16" else torch.float32] * chunks
    error, single_error = (
        (x.double() - exact["d_weight"]).norm() / exact["d_weight"].norm() for x in (got, single)
    )
    assert error < 1.5 * single_error


@impls
def test_a_token_gets_the_same_log_prob_in_any_batch(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", 16 * 1024)
    batch = random_batch(n=64, v=1024)
    hidden, weight = batch.tensors["hidden"].float(), batch.tensors["weight"].float()
    targets = batch.tensors["targets"]
    everything, _ = linear_logprobs(hidden, weight, targets, impl=impl)
    half, _ = linear_logprobs(hidden[:32], weight, targets[:32], impl=impl)
    assert torch.equal(everything[:32], half)


@impls
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_is_added_to_an_existing_one(impl: str, dtype: torch.dtype) -> None:
    batch = random_batch(n=40, v=1024, entropy_coef=0.1)
    expected = batch.run(impl, dtype)
    main_grad = torch.randn(1024, 8)
    before = main_grad.clone()
    got = batch.run(impl, dtype, weight=batch.tensors["weight"].to(dtype), weight_grad=main_grad)
    assert "d_weight" not in got
    torch.testing.assert_close(got["d_hidden"], expected["d_hidden"])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    added = (main_grad - before).to(dtype)
    torch.testing.assert_close(added, expected["d_weight"].to(dtype), **tolerance)


@pytest.mark.thinned(2)
@impls
@pytest.mark.usefixtures("small_chunks")
def test_a_weight_that_takes_a_float32_gradient_gets_the_sum_unrounded(impl: str) -> None:
    """With torch's own attribute, which autograd alone would satisfy by a cast of the rounded."""
    batch = random_batch(n=300, v=1024)
    weight = batch.tensors["weight"].bfloat16()
    exact = batch.run("reference", torch.float64, weight=weight.double().requires_grad_())
    errors = {}
    for wanted in (torch.bfloat16, torch.float32):
        leaf = weight.clone().requires_grad_()
        leaf.grad_dtype = wanted
        got = batch.run(impl, torch.float32, weight=leaf)["d_weight"]
        assert got.dtype == wanted
        errors[wanted] = (got - exact["d_weight"]).norm() / exact["d_weight"].norm()
    assert errors[torch.bfloat16] > 1e-3
    assert errors[torch.float32] < 1e-6


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(8, 1024).t(), "wanted a contiguous tensor"),
        (torch.zeros(1024, 8).bfloat16(), "weight_grad: wanted dtype float32, got bfloat16"),
        (torch.zeros(1024, 9), r"weight_grad: wanted shape \[V=1024, H=8\]"),
    ],
)
def test_refuses_gradients_that_cannot_be_added_to(grad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_batch(n=4, v=1024).run("torch", torch.bfloat16, weight_grad=grad)
