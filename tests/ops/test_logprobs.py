from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recap_fast.ops import linear_logprobs, reference, selective_logprobs, triton_rows
from recap_fast.ops.launch import Launch, recording
from tests.no_sync import ForbidHostSync
from tests.ops.batches import distance

impls = pytest.mark.parametrize("impl", ["torch", "triton"])


def _operands(seed: int, n: int, h: int, v: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64)
    bias = torch.randn(v, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[::4] = -100
    return hidden, weight, bias, targets


def _results(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    rounded: torch.dtype,
    impl: str,
    **options: Any,
) -> list[Tensor]:
    """Log-probs, entropies, and the gradients of a mixture of both."""
    leaves = [t.to(rounded).to(dtype).requires_grad_() for t in operands[:3]]
    hidden, weight, bias = leaves
    logprobs, entropy = linear_logprobs(
        hidden, weight, operands[3], bias=bias, impl=impl, **options
    )
    mix = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    loss = (mix * logprobs).sum() + (mix.flip(0) * entropy).sum()
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]


@impls
@settings(max_examples=15, deadline=None)
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
    operands = _operands(seed, n, h, v)
    options = {"temperature": temperature, "logit_softcap": softcap}
    truth = _results(operands, torch.float64, dtype, "reference", **options)
    eager = _results(operands, dtype, dtype, "reference", **options)
    ours = _results(operands, dtype, dtype, impl, **options)
    tiny = 1e-6 if dtype == torch.float32 else 2e-3
    for name, o, e, t in zip(
        ("logprobs", "entropy", "hidden", "weight", "bias"), ours, eager, truth, strict=True
    ):
        bound = 1.5 * distance(e, t) + tiny * (1 + distance(t, torch.zeros_like(t)))
        assert distance(o, t) <= bound, name


def test_gradcheck_in_float64() -> None:
    hidden, weight, bias, targets = _operands(0, 7, 4, 9)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=0.8, logit_softcap=4.0
        )

    assert torch.autograd.gradcheck(both, leaves)
    logits = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: selective_logprobs(x, targets, temperature=0.8), [logits]
    )


@impls
def test_log_probs_of_a_row_worked_out_by_hand(impl: str) -> None:
    logits = torch.tensor([[0.0, 2.0 * torch.log(torch.tensor(3.0)).item()]])
    for target, p in ((0, 0.25), (1, 0.75)):
        targets = torch.tensor([target])
        logprobs, entropy = selective_logprobs(logits, targets, temperature=2.0, impl=impl)
        torch.testing.assert_close(logprobs, torch.tensor([p]).log())
        torch.testing.assert_close(
            entropy, torch.special.entr(torch.tensor([0.25, 0.75])).sum(0, True)
        )


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(impl: str, dtype: torch.dtype) -> None:
    logits = torch.tensor(
        [
            [1e4, -1e4, 0.0, -float("inf")],
            [-float("inf"), 1.0, -float("inf"), 2.0],
            [-1e4, -1e4, -1e4, -1e4],
            [1e4, 1e4, 1e4, 1e4],
        ],
        dtype=dtype,
        requires_grad=True,
    )
    targets = torch.tensor([0, 3, 1, 2])
    logprobs, entropy = selective_logprobs(logits, targets, impl=impl)
    expected = reference.selective_logprobs(logits.detach(), targets)
    torch.testing.assert_close(logprobs, expected[0])
    torch.testing.assert_close(entropy, expected[1])
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    assert gradient.isfinite().all()
    forbidden = torch.tensor([3, 0, 0, 0])
    assert selective_logprobs(logits, forbidden, impl=impl)[0].isneginf()[:2].all()


@impls
def test_nan_logits_are_not_hidden(impl: str) -> None:
    logits = torch.randn(3, 70)
    logits[1, 60] = float("nan")
    logprobs, entropy = selective_logprobs(logits, torch.tensor([0, 1, 2]), impl=impl)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


@impls
def test_blocks_of_nothing_but_minus_infinity(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_blocks(monkeypatch, 16)
    logits = torch.full((2, 80), -float("inf"))
    logits[0, 40:45] = torch.randn(5)
    logits[1, :3] = torch.randn(3)
    logits.requires_grad_()
    targets = torch.tensor([42, 1])
    ours = selective_logprobs(logits, targets, impl=impl)
    expected = reference.selective_logprobs(logits.detach(), targets)
    torch.testing.assert_close(ours, expected)
    (gradient,) = torch.autograd.grad(ours[0].sum() + ours[1].sum(), logits)
    assert gradient.isfinite().all()


def _use_blocks(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    for name, group in (("LAUNCHES", 4), ("UNALIGNED_LAUNCHES", 1)):
        monkeypatch.setattr(triton_rows, name, {4: triton_rows.RowLaunch(columns, group, 4)})


@pytest.mark.parametrize("width", [101, 160])
@pytest.mark.parametrize("columns", [16, 32, 128])
def test_block_size_changes_rounding_only(
    columns: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(5, width, requires_grad=True)
    targets = torch.tensor([0, width - 1, 15, 16, -100])

    def run() -> list[Tensor]:
        outputs = selective_logprobs(logits, targets, temperature=0.7, impl="triton")
        return [*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), logits)]

    expected = run()
    _use_blocks(monkeypatch, columns)
    torch.testing.assert_close(run(), expected)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0])
def test_softcap_is_as_exact_as_torch(cap: float) -> None:
    hidden = torch.linspace(-60, 60, 301)[:, None] / 8
    weight = torch.tensor([[1.0], [-0.3], [8.0], [0.01]])
    targets = torch.arange(301) % 4
    errors = []
    truth = reference.linear_logprobs(hidden.double(), weight.double(), targets, softcap=cap)
    for impl in ("reference", "triton"):
        got = linear_logprobs(hidden, weight, targets, logit_softcap=cap, impl=impl)
        errors.append([distance(g, t) for g, t in zip(got, truth, strict=True)])
    for eager, ours in zip(*errors, strict=True):
        assert ours <= 1.5 * eager + 1e-8


@impls
def test_strided_logits_are_read_in_place(impl: str) -> None:
    whole = torch.randn(7, 90)
    targets = torch.randint(0, 40, (7,))
    for view in (
        whole[:, 11:51],
        whole[:, ::2][:, :40],
        whole[:, :40].flip(0),
        whole[0].expand(7, 90)[:, :40],
    ):
        expected = reference.selective_logprobs(view, targets)
        torch.testing.assert_close(selective_logprobs(view, targets, impl=impl), expected)


def test_row_offsets_pass_two_to_the_31() -> None:
    launches: list[Launch] = []
    logits = torch.empty(3, device="meta").as_strided((1 << 20, 4096), (4096, 1))
    targets = torch.zeros(1 << 20, dtype=torch.int64, device="meta")
    statistics = torch.empty(1 << 20, device="meta")
    with recording(launches.append):
        triton_rows.logprobs_rows(logits, targets, statistics, statistics, temperature=1.0)
    (launch,) = launches
    assert launch.grid == (1 << 20,)  # x alone: y and z end at 65,535
    source = inspect.getsource(launch.kernel.fn)
    assert "tl.program_id(0).to(tl.int64)" in source


def test_selective_leaves_the_logits_alone_and_agrees_with_the_oracle() -> None:
    logits = torch.randn(9, 50).requires_grad_()
    before = logits.detach().clone()
    targets = torch.randint(0, 50, (9,))
    targets[2] = -100
    mine = selective_logprobs(logits, targets, temperature=0.5)
    theirs = reference.selective_logprobs(logits, targets, 0.5)
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m, t)
        (g,) = torch.autograd.grad(m.sum(), logits, retain_graph=True)
        (e,) = torch.autograd.grad(t.sum(), logits, retain_graph=True)
        torch.testing.assert_close(g, e)
        assert torch.equal(g[2], torch.zeros(50))
    assert torch.equal(logits.detach(), before)


@impls
def test_ignored_targets_give_zero_and_no_gradient(impl: str) -> None:
    hidden, weight, _, targets = _operands(1, 12, 5, 20)
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    logprobs, entropy = linear_logprobs(hidden, weight, targets, impl=impl)
    ignored = targets == -100
    assert torch.equal(logprobs[ignored], torch.zeros(3))
    assert torch.equal(entropy[ignored], torch.zeros(3))
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(hidden.grad[ignored], torch.zeros(3, 5))
    assert hidden.grad[~ignored].abs().sum() > 0


@impls
def test_only_one_output_used(impl: str) -> None:
    hidden, weight, _, targets = _operands(2, 12, 5, 20)
    hidden, weight = hidden.float(), weight.float()
    for which in (0, 1):
        leaf = hidden.clone().requires_grad_()
        linear_logprobs(leaf, weight, targets, impl=impl)[which].sum().backward()
        expected = hidden.clone().requires_grad_()
        reference.linear_logprobs(expected, weight, targets)[which].sum().backward()
        torch.testing.assert_close(leaf.grad, expected.grad)


@impls
def test_strided_hidden(impl: str) -> None:
    hidden, weight, _, targets = _operands(3, 24, 6, 20)
    hidden, weight = hidden.float(), weight.float()
    padded = torch.full((24, 9), float("nan"))
    padded[:, 2:8] = hidden
    for strided, rows in ((padded[:, 2:8], targets), (padded[::2, 2:8], targets[::2])):
        leaf = strided.detach().requires_grad_()
        logprobs, _ = linear_logprobs(leaf, weight, rows, impl=impl)
        expected, _ = reference.linear_logprobs(strided, weight, rows)
        torch.testing.assert_close(logprobs, expected)
        logprobs.sum().backward()
        assert leaf.grad.isfinite().all()


def test_no_host_sync_and_double_backward_refused() -> None:
    hidden, weight, bias, targets = _operands(4, 12, 5, 20)
    hidden.requires_grad_()
    with ForbidHostSync():
        logprobs, entropy = linear_logprobs(hidden, weight, targets, bias=bias)
        (logprobs.sum() + entropy.sum()).backward()
    logprobs, _ = linear_logprobs(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="linear_logprobs has no double backward"):
        torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden: wanted shape \[N, H\], got \[2, 3, 4\]"),
        ({"hidden": torch.zeros(3, 4).int()}, "hidden: wanted dtype .*got int32"),
        ({"impl": "triton", "hidden": torch.zeros(3, 4).double()}, "the operands are float64"),
        ({"weight": torch.zeros(9, 5)}, r"weight: wanted shape \[V, H=4\], got \[9, 5\]"),
        ({"weight": torch.zeros(0, 4)}, "weight: wanted at least one vocabulary row"),
        ({"targets": torch.zeros(3).int()}, "targets: wanted dtype int64, got int32"),
        ({"targets": [1, 2, 3]}, "targets: wanted a tensor of shape .*got list"),
        ({"bias": torch.zeros(4)}, r"bias: wanted shape \[V=9\], got \[4\]"),
        ({"weight": torch.zeros(9, 4, device="meta")}, "weight: wanted device cpu .*got meta"),
        ({"temperature": 0.0}, "temperature: wanted a number > 0, got 0.0"),
        ({"logit_softcap": -1.0}, "logit_softcap: wanted None or a number > 0, got -1.0"),
        ({"impl": "cuda"}, "impl: wanted one of .*got 'cuda'"),
    ],
)
def test_refuses_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(9, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**(arguments | change))
