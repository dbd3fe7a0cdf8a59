"""`linear_token_statistics`: its five fields against float64, by hand, and against TRL's."""

from __future__ import annotations

from dataclasses import fields
from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recap_fast.ops import (
    TokenStatistics,
    chunked,
    linear_logprobs,
    linear_token_statistics,
    rows,
    triton_rows,
)
from tests.no_sync import ForbidHostSync
from tests.ops.batches import distance

INFINITY = float("inf")
NAMES = tuple(field.name for field in fields(TokenStatistics))
impls = pytest.mark.parametrize("impl", ["torch", "triton"])
every_impl = pytest.mark.parametrize("impl", ["torch", "triton", "reference"])


def operands(seed: int, n: int, h: int, v: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Hidden [N, H], weight [V, H], bias [V], and targets [N], every second one the likeliest."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight, bias = normal(n, h), normal(v, h), normal(v)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[::2] = (hidden.double() @ weight.double().T + bias.double()).argmax(-1)[::2]
    targets[::5] = -100
    return [hidden, weight, bias], targets


def results(
    leaves: list[Tensor], targets: Tensor, dtype: torch.dtype, impl: str, **options: float | None
) -> dict[str, Tensor]:
    """All fields, and the gradients of a mixture of log-probs and entropies."""
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    hidden, weight, bias = leaves
    found = linear_token_statistics(hidden, weight, targets, bias=bias, impl=impl, **options)
    mix = torch.linspace(-1, 2, len(targets), dtype=found.logprobs.dtype)
    loss = (mix * found.logprobs).sum() + (mix.flip(0) * found.entropy).sum()
    gradients = torch.autograd.grad(loss, leaves)
    named = zip(("d_hidden", "d_weight", "d_bias"), gradients, strict=True)
    return dict(zip(NAMES, in_order(found), strict=True)) | dict(named)


def in_order(found: TokenStatistics) -> list[Tensor]:
    return [getattr(found, name).detach() for name in NAMES]


@impls
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 9999),
    n=st.integers(0, 20),
    h=st.sampled_from([1, 8, 33]),
    v=st.sampled_from([1, 2, 37, 300]),
    temperature=st.sampled_from([1.0, 0.6]),
    softcap=st.sampled_from([None, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_error_is_bounded_by_that_of_eager(
    impl: str,
    seed: int,
    n: int,
    h: int,
    v: int,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    leaves, targets = operands(seed, n, h, v, dtype)
    options = {"temperature": temperature, "logit_softcap": softcap}
    truth = results(leaves, targets, torch.float64, "reference", **options)
    eager = results(leaves, targets, dtype, "reference", **options)
    ours = results(leaves, targets, dtype, impl, **options)
    tiny = 1e-6 if dtype == torch.float32 else 2e-3
    for name, exact in truth.items():
        if name == "is_top1":  # rounded logits may tie or change places
            assert torch.equal(ours[name], eager[name])
            continue
        bound = 1.5 * distance(eager[name], exact)
        assert distance(ours[name], exact) <= bound + tiny * (1 + distance(exact, 0 * exact)), name


def test_float64_is_exact() -> None:
    leaves, targets = operands(0, 12, 8, 37, torch.float64)
    options = {"temperature": 0.6, "logit_softcap": 3.0}
    truth = results(leaves, targets, torch.float64, "reference", **options)
    ours = results(leaves, targets, torch.float64, "torch", **options)
    for name, exact in truth.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-12, atol=1e-12, msg=name)


@every_impl
def test_a_row_worked_out_by_hand(impl: str) -> None:
    logits = torch.tensor([0.0, 2 * log(3.0)])
    found = linear_token_statistics(
        torch.ones(2, 1), logits[:, None], torch.tensor([0, 1]), temperature=2.0, impl=impl
    )
    torch.testing.assert_close(found.logprobs, torch.tensor([0.25, 0.75]).log())
    torch.testing.assert_close(
        found.log_sum_sq_probs, torch.full((2,), log(0.25 * 0.25 + 0.75 * 0.75))
    )
    torch.testing.assert_close(found.mean_logits, torch.full((2,), log(3.0) / 2))
    assert found.is_top1.tolist() == [False, True]


def of_logits(logits: Tensor, targets: list[int], impl: str) -> TokenStatistics:
    """Statistics of logits [N, V]: a bias, as infinity times 0 would be NaN; row by row."""
    found = [
        in_order(
            linear_token_statistics(
                row.new_zeros(1, 1), row.new_zeros(len(row), 1), torch.tensor([target]), bias=row,
                impl=impl,
            )
        )
        for row, target in zip(logits, targets, strict=True)
    ]  # fmt: skip
    return TokenStatistics(*(torch.cat(field) for field in zip(*found, strict=True)))


def use_blocks(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    for name, group in (("LAUNCHES", 4), ("UNALIGNED_LAUNCHES", 1)):
        launches = {size: triton_rows.RowLaunch(columns, group, 4) for size in (2, 4)}
        monkeypatch.setattr(triton_rows, name, launches)


@pytest.mark.thinned(5)
@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [80, 77])
def test_of_equal_logits_the_first_is_top(
    impl: str, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_blocks(monkeypatch, 16)
    logits = torch.randn(6, width).clamp(max=4.0)
    logits[:, [5, 6, 20, width - 1]] = 5.0  # in one block, and across blocks
    logits = logits.to(dtype)
    assert of_logits(logits, [5, 6, 20, width - 1, 4, 7], impl).is_top1.tolist() == [True] + 5 * [
        False
    ]
    flat = torch.zeros(3, width, dtype=dtype)
    assert of_logits(flat, [0, 1, width - 1], impl).is_top1.tolist() == [True, False, False]


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_vocabulary(
    impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_blocks(monkeypatch, 16)
    logits = torch.full((4, 80), -INFINITY)
    logits[0, 40:45] = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.5])
    logits[1, :3] = torch.tensor([1.0, 3.0, 2.0])
    logits[2, 79] = 0.25
    logits[3] = 3.0
    logits[3, 11] = -INFINITY
    found = of_logits(logits.to(dtype), [43, 1, 79, 11], impl)
    probs = logits.double().softmax(-1)
    torch.testing.assert_close(
        found.log_sum_sq_probs, probs.square().sum(-1).log().float(), rtol=1e-5, atol=1e-6
    )
    assert found.mean_logits.tolist() == [-INFINITY] * 4
    assert found.is_top1.tolist() == [False, True, True, False]
    assert found.logprobs.isneginf().tolist() == [False, False, False, True]


@every_impl
@pytest.mark.parametrize("column", [0, 60])
def test_nan_logits_are_not_hidden(impl: str, column: int) -> None:
    logits = torch.randn(3, 70)
    logits[1, column] = float("nan")
    logits[1, 9] = logits[0, 9] = 9.0
    found = of_logits(logits, [9, 9, 1], impl)
    expected = [False, True, False]
    for values in (found.logprobs, found.log_sum_sq_probs, found.mean_logits):
        assert values.isnan().tolist() == expected
    assert found.is_top1.tolist() == [True, False, False]
    assert of_logits(logits, [9, column, 1], impl).is_top1.tolist() == [True, False, False]


@every_impl
@pytest.mark.parametrize("peak", [1e4, -1e4])
def test_extreme_logits(impl: str, peak: float) -> None:
    logits = torch.tensor([[peak, peak - 1.0, peak - 300.0, peak]]).repeat(2, 1)
    found = of_logits(logits, [0, 3], impl)
    probs = logits[0].double().softmax(-1)
    expected = probs.square().sum().log().float().expand(2)
    torch.testing.assert_close(found.log_sum_sq_probs, expected)
    torch.testing.assert_close(found.mean_logits, logits.double().mean(-1).float())
    assert found.is_top1.tolist() == [True, False]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("v", [101, 160])
@pytest.mark.parametrize("columns", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_the_kernel_change_rounding_only(
    columns: int, v: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, targets = operands(1, 8, 8, v, dtype)
    expected = results(leaves, targets, dtype, "triton", temperature=0.7, logit_softcap=5.0)
    use_blocks(monkeypatch, columns)
    got = results(leaves, targets, dtype, "triton", temperature=0.7, logit_softcap=5.0)
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name], msg=name)


@pytest.mark.thinned(2)
@impls
def test_chunks_change_rounding_only(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, targets = operands(2, 40, 8, 129, torch.float32)
    whole = results(leaves, targets, torch.float32, impl, temperature=0.7)
    for chunk, block in ((1, 1), (7, 3), (39, 16)):
        monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", chunk * 129)
        monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", block * 129)
        parts = results(leaves, targets, torch.float32, impl, temperature=0.7)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, msg=name)


@every_impl
def test_ignored_targets_give_zero_everywhere(impl: str) -> None:
    leaves, targets = operands(3, 10, 8, 20, torch.float32)
    leaves[0][targets == -100] = float("nan")  # not even read
    found = results(leaves, targets, torch.float32, impl)
    for name in NAMES:
        ignored = found[name][targets == -100]
        assert len(ignored) == 2
        assert torch.equal(ignored, torch.zeros_like(ignored)), name
    leaves[0].requires_grad_()
    nothing = linear_token_statistics(*leaves[:2], torch.full((10,), -100), impl=impl)
    assert torch.equal(torch.stack(in_order(nothing)), torch.zeros(5, 10))


@impls
def test_log_probs_and_entropies_are_those_of_linear_logprobs(impl: str) -> None:
    leaves, targets = operands(4, 12, 8, 37, torch.float32)
    hidden, weight, bias = leaves
    logprobs, entropy = linear_logprobs(hidden, weight, targets, bias=bias, impl=impl)
    found = linear_token_statistics(hidden, weight, targets, bias=bias, impl=impl)
    assert torch.equal(found.logprobs, logprobs)
    assert torch.equal(found.entropy, entropy)


@every_impl
def test_three_fields_carry_no_gradient(impl: str) -> None:
    leaves, targets = operands(5, 12, 8, 37, torch.float32)
    hidden, weight = (leaf.requires_grad_() for leaf in leaves[:2])
    found = linear_token_statistics(hidden, weight, targets, impl=impl)
    learns = {name: getattr(found, name).requires_grad for name in NAMES}
    assert learns == {name: name in ("logprobs", "entropy") for name in NAMES}
    (alone,) = torch.autograd.grad(found.entropy.sum(), hidden, retain_graph=True)
    assert alone.abs().sum() > 0
    if impl != "reference":
        with pytest.raises(RuntimeError, match="linear_token_statistics has no double backward"):
            torch.autograd.grad(found.logprobs.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("target", [37, 40, -1])
def test_targets_that_there_are_not_are_nan_and_never_top(target: int) -> None:
    logits = torch.zeros(1, 37)
    found = of_logits(logits, [target], "triton")
    assert found.logprobs.isnan().all()
    assert found.is_top1.tolist() == [False]
    torch.testing.assert_close(found.log_sum_sq_probs, torch.tensor([-log(37)]))


@every_impl
def test_follows_autocast(impl: str) -> None:
    leaves, targets = operands(8, 12, 8, 37, torch.float32)
    expected = results(leaves, targets, torch.bfloat16, impl)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(leaves, targets, torch.float32, impl)
    for name in NAMES:
        assert torch.equal(got[name], expected[name]), name


def test_no_host_sync() -> None:
    leaves, targets = operands(6, 12, 8, 37, torch.float32)
    hidden, weight = (leaf.requires_grad_() for leaf in leaves[:2])
    with ForbidHostSync():
        found = linear_token_statistics(hidden, weight, targets)
        (found.logprobs.sum() + found.entropy.sum()).backward()


def test_refuses_what_linear_logprobs_refuses() -> None:
    hidden, weight, targets = torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3).long()
    with pytest.raises(ValueError, match=r"weight: wanted shape \[V, H=4\], got \[9, 5\]"):
        linear_token_statistics(hidden, torch.zeros(9, 5), targets)
    with pytest.raises(ValueError, match="temperature: wanted a number > 0, got 0.0"):
        linear_token_statistics(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="impl: wanted one of .*got 'cuda'"):
        linear_token_statistics(hidden, weight, targets, impl="cuda")


@pytest.mark.thinned(3)
@impls
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_agrees_with_trl(impl: str, softcap: float | None) -> None:
    trl = pytest.importorskip("trl.kernels.chunked_logprob")
    leaves, targets = operands(7, 30, 16, 517, torch.float32)
    targets = targets.where(targets != -100, 3)  # TRL drops ignored targets before
    ours = results(leaves, targets, torch.float32, impl, temperature=0.7, logit_softcap=softcap)
    hidden, weight, bias = (leaf.clone().requires_grad_() for leaf in leaves)
    found = trl.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 0.7, 128, softcap)
    mix = torch.linspace(-1, 2, 30)
    loss = (mix * found[0]).sum() + (mix.flip(0) * found[1]).sum()
    expected = [*found, *torch.autograd.grad(loss, [hidden, weight, bias])]
    for (name, got), value in zip(ours.items(), expected, strict=True):
        torch.testing.assert_close(got, value.detach(), rtol=2e-5, atol=2e-5, msg=name)
