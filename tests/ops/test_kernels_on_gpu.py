"""What the interpreter cannot show: the compiled kernels, real shapes, row offsets past 2^31."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recap_fast.ops import linear_logprobs, reference, selective_logprobs
from recap_fast.ops.adamw import adamw_8bit, adamw_bfloat16
from recap_fast.ops.adamw_step import AdamWStep
from tests.no_sync import ForbidHostSync
from tests.ops.batches import Batch, batches, distance, random_batch

pytestmark = pytest.mark.gpu
impls = pytest.mark.parametrize("impl", ["torch", "triton"])
VOCABULARY = 151936


def _on_cuda(batch: Batch) -> Batch:
    return Batch({name: value.cuda() for name, value in batch.tensors.items()}, batch.config)


@impls
@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_error_is_bounded_by_that_of_eager(impl: str, batch: Batch, dtype: torch.dtype) -> None:
    # A weight near a bound may fall on either side: a masked one must be known beforehand.
    assume(batch.config.rollout_is_mode == "truncate" or "old_logprobs" in batch.tensors)
    batch = _on_cuda(batch)
    truth = batch.run("reference", torch.float64, rounded=dtype)
    eager = batch.run("reference", dtype)
    with ForbidHostSync("cuda"):
        ours = batch.run(impl, dtype)
    coarse = torch.bfloat16 in (dtype, getattr(torch, batch.config.logits_dtype))
    tiny = 4e-3 if coarse else 5e-4 if dtype == torch.float16 else 2e-6
    for name, exact in truth.items():
        # A ratio within rounding of a bound may fall on either side.
        if name in ("clip_fraction", "importance_bounded"):
            continue
        # A gradient of zeros must not pass: its rounding is relative to its size, nearly.
        scale = distance(exact, torch.zeros_like(exact)) + (0.02 if name.startswith("d_") else 1)
        assert distance(ours[name], exact) <= 1.5 * distance(eager[name], exact) + tiny * scale


@impls
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
def test_real_vocabulary_over_two_chunks(impl: str, logits_dtype: str) -> None:
    batch = _on_cuda(
        random_batch(n=5000, h=64, v=VOCABULARY, s=50, old=True, ref=True, kl_coef=0.1,
                     entropy_coef=0.01, logits_dtype=logits_dtype)
    )  # fmt: skip
    ours = batch.run(impl, torch.bfloat16)
    again = batch.run(impl, torch.bfloat16)
    truth = batch.run("reference", torch.float32, rounded=torch.bfloat16)
    for name, value in ours.items():
        assert torch.equal(again[name], value), f"{name} is not the same twice"
        size = distance(truth[name], torch.zeros_like(truth[name]))
        if name != "clip_fraction":
            assert distance(value, truth[name]) <= 2e-2 * size + 1e-6, name


@pytest.mark.parametrize("v", [VOCABULARY, VOCABULARY + 1, 50257])
def test_row_offsets_past_two_to_the_31(v: int) -> None:
    n = 2**31 // v + 300
    logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, v, (n,), device="cuda")
    logprobs, entropy = selective_logprobs(logits, targets, impl="triton")
    last = slice(n - 200, n)
    expected = reference.selective_logprobs(logits[last], targets[last])
    torch.testing.assert_close(logprobs[last], expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy[last], expected[1], rtol=1e-5, atol=1e-4)


@impls
def test_logprobs_and_their_gradient(impl: str) -> None:
    hidden = torch.randn(300, 64, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(VOCABULARY, 64, device="cuda").bfloat16().requires_grad_()
    targets = torch.randint(0, VOCABULARY, (300,), device="cuda")
    gradients = []
    for way in (impl, "reference"):
        logprobs, entropy = linear_logprobs(
            hidden, weight, targets, logit_softcap=30.0, temperature=0.8, impl=way
        )
        loss = logprobs.sum() + 0.1 * entropy.sum()
        gradients.append(torch.autograd.grad(loss, [hidden, weight]))
    for ours, eager in zip(*gradients, strict=True):
        assert distance(ours, eager) <= 2e-2 * distance(eager, torch.zeros_like(eager))


@pytest.mark.parametrize("first", [0, (1 << 32) - 100])
def test_adamw_on_compact_moments_is_that_of_torch_on_a_cpu(first: int) -> None:
    """Random rounding included; a float32 sum whose last bit differs may be rounded otherwise."""
    torch.manual_seed(0)
    rows, columns = 300, 700
    parameter, gradient = torch.randn(rows, columns), torch.randn(rows, columns)
    moments = [torch.randn(rows, columns).bfloat16(), torch.rand(rows, columns).bfloat16()]
    codes = [torch.full((rows, columns), 127, dtype=torch.uint8), torch.rand(rows, 3)] * 2
    found = []
    for device in ("cpu", "cuda"):
        one = [tensor.to(device, copy=True) for tensor in (parameter, gradient, *moments)]
        other = [tensor.to(device, copy=True) for tensor in (parameter, gradient, *codes)]
        number = torch.tensor(3.0, device=device)
        step = AdamWStep(
            1e-2, 0.9, 0.999, 1e-8, 0.1,
            torch.tensor(2.0, device=device), torch.tensor(0.0, device=device),
        )  # fmt: skip
        with ForbidHostSync(device) if device == "cuda" else nullcontext():
            adamw_bfloat16(*one, number, step, key=7, first=first)
        adamw_8bit(*other, number, step)
        found.append([tensor.cpu() for tensor in (*one, *other)])
    for wanted, ours in zip(*found, strict=True):
        if wanted.dtype == torch.float32:
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
        else:
            assert (ours != wanted).float().mean() < 1e-2
