"""`FusedLinearGRPOLoss` held against the installed `LigerFusedLinearGRPOLoss`."""

from __future__ import annotations

import inspect
import itertools
import math
import runpy
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("liger_kernel", reason="held against Liger, which is not installed")

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

from recap_fast.integrations import peers
from recap_fast.integrations.liger import AGGREGATIONS, FusedLinearGRPOLoss
from tests.no_sync import ForbidHostSync
from tests.processes import run_ranks

B, T, H, V = 3, 5, 8, 17
LEVELS = [(loss_type, "token") for loss_type in AGGREGATIONS] + [
    (loss_type, "sequence") for loss_type in AGGREGATIONS if loss_type != "cispo"
]
REFERENCES = ("none", "none without beta", "logps", "logps without beta", "input")
MASKS = {
    "int64": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]),
    "bool, a row of zeros": torch.tensor([[1, 1, 1, 1, 0], [0] * 5, [1, 1, 0, 0, 0]]).bool(),
    "float, all zeros": torch.zeros(B, T),
    "float, all ones": torch.ones(B, T),
}


def operands(b: int = B, t: int = T, h: int = H, v: int = V) -> dict[str, Tensor]:
    """What forward may get. Old, policy and reference differ enough for every clip to act."""
    hidden, weight, bias = torch.randn(b, t, h) / 2, torch.randn(v, h), torch.randn(v)
    token_ids = torch.randint(v, (b, t))
    logps = torch.log_softmax(hidden @ weight.T, -1).gather(2, token_ids.unsqueeze(2)).squeeze(2)
    advantages = torch.randn(b)
    advantages[:2] = torch.tensor([1.5, -0.7])[:b]
    return {
        "_input": hidden,
        "lin_weight": weight,
        "bias": bias,
        "selected_token_ids": token_ids,
        "attention_mask": torch.ones(b, t),
        "advantages": advantages,
        "old_per_token_logps": logps + torch.randn(b, t) / 2,
        "ref_per_token_logps": logps + torch.randn(b, t) / 2,
        "ref_input": hidden + torch.randn(b, t, h) / 4,
        "ref_weight": weight + torch.randn(v, h) / 4,
        "ref_bias": bias + torch.randn(v) / 4,
        "vllm_is_ratio": torch.rand(b, t) * 2,
    }


def chosen(given: dict[str, Tensor], reference: str, leave_out: set[str]) -> dict[str, Tensor]:
    """Those that a call with such a reference has."""
    kinds = {"logps": {"ref_per_token_logps"}, "input": {"ref_input", "ref_weight", "ref_bias"}}
    wanted = kinds.get(reference.removesuffix(" without beta"), set())
    names = {name for name in given if not name.startswith("ref_")} | wanted
    if "bias" in leave_out:
        leave_out = leave_out | {"ref_bias"}
    return {name: given[name] for name in names - leave_out}


def settings_of(loss_type: str, level: str, reference: str) -> dict[str, Any]:
    """Arguments of both constructors."""
    return {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "epsilon_low": 0.15,
        "epsilon_high": 1.2 if loss_type == "cispo" else 0.25,
        "max_completion_length": 7 if loss_type == "dr_grpo" else None,
        "beta": 0.0 if reference.endswith("without beta") else 0.1,
        "use_ref_model": not reference.startswith("none"),
        "compiled": False,
    }


def results(
    module: torch.nn.Module, call: dict[str, Any], factor: float = 1.0
) -> dict[str, Tensor]:
    """The loss, its metrics and its gradients by name."""
    leaves = {
        name: call[name].clone().requires_grad_()
        for name in ("_input", "lin_weight", "bias")
        if name in call
    }
    loss, metrics = module(**call | leaves)
    assert not any(metric.requires_grad for metric in metrics)
    gradients = torch.autograd.grad(loss * factor, list(leaves.values()))
    return (
        {"loss": loss.detach()}
        | {f"metric {i} of {len(metrics)}": metric for i, metric in enumerate(metrics)}
        | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    )


def assert_equal(
    options: dict[str, Any], call: dict[str, Any], what: object, tolerance: float = 2e-5
) -> dict[str, Tensor]:
    """Both agree, each tensor relative to its largest element; returns ours."""
    theirs = results(LigerFusedLinearGRPOLoss(**options), call, factor=3.0)
    ours = results(FusedLinearGRPOLoss(**options), call, factor=3.0)
    assert ours.keys() == theirs.keys(), what
    for name, value in theirs.items():
        bound = tolerance * (value.abs().max().item() + 1e-2)
        assert ours[name].shape == value.shape, (what, name)
        assert ours[name].dtype == value.dtype, (what, name)
        distance = (ours[name].float() - value.float()).abs().max().item()
        assert distance <= bound, (what, name, distance, bound)
    return ours


def combinations() -> Iterator[tuple[str, dict[str, Any], set[str], str | None]]:
    """Every choice beside loss type, level and reference, with masks in turn."""
    masks = itertools.cycle(MASKS)
    choices = itertools.product(
        (True, False), (None, 1.4), (None, "BT", "B1", "B"), (1.0, 0.7), (True, False)
    )
    for old, delta, ratio, temperature, bias in choices:
        leave_out = {"old_per_token_logps"} if not old else set()
        leave_out |= {"bias"} if not bias else set()
        # Masks go on by one more after each cycle, so that each choice meets each of them.
        mask = next(masks)
        if not bias:
            mask = next(masks)
        yield mask, {"delta": delta, "temperature": temperature}, leave_out, ratio


def shaped_ratio(ratio: Tensor, kind: str | None) -> Tensor | None:
    return {None: None, "BT": ratio, "B1": ratio[:, :1], "B": ratio[:, 0]}[kind]


@pytest.mark.thinned(7)
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_equals_theirs_in_all_combinations(loss_type: str, level: str, reference: str) -> None:
    clipped, kinds = 0.0, set()
    given = operands()
    for mask, options, leave_out, kind in combinations():
        given["attention_mask"] = MASKS[mask]
        call = chosen(given, reference, leave_out | {"vllm_is_ratio"})
        call["vllm_is_ratio"] = shaped_ratio(given["vllm_is_ratio"], kind)
        what = (mask, options, leave_out, kind)
        ours = assert_equal(settings_of(loss_type, level, reference) | options, call, what)
        clipped += list(ours.values())[1 if reference.endswith("without beta") else 2].item()
        kinds.add((mask, kind, options["delta"]))
    assert clipped > 0
    assert len(kinds) == 4 * 4 * 2


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*(st.integers(1, 6) for _ in "btv")),
    st.sampled_from(LEVELS),
    st.sampled_from(REFERENCES),
    st.integers(0, 2**31),
)
def test_equals_theirs_in_random_shapes(
    shape: tuple[int, int, int], kind: tuple[str, str], reference: str, seed: int
) -> None:
    torch.manual_seed(seed)
    b, t, v = shape
    given = operands(b, t, H, v + 1)
    given["attention_mask"] = torch.rand(b, t) < 0.7
    call = chosen(given, reference, set())
    assert_equal(settings_of(*kind, reference) | {"delta": 1.3}, call, shape, tolerance=1e-4)


@pytest.mark.parametrize("reference", ["logps", "input"])
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_bfloat16_is_as_near_the_truth_as_theirs(
    loss_type: str, level: str, reference: str
) -> None:
    given = chosen(operands(b=4, t=16, h=32, v=64), reference, set())
    floats = {name: value for name, value in given.items() if value.is_floating_point()}
    low = given | {name: value.bfloat16() for name, value in floats.items()}
    exact = given | {name: value.bfloat16().double() for name, value in floats.items()}
    options = settings_of(loss_type, level, reference)
    truth = results(FusedLinearGRPOLoss(**options), exact)
    ours = results(FusedLinearGRPOLoss(**options), low)
    theirs = results(LigerFusedLinearGRPOLoss(**options), low)
    for name, value in truth.items():
        # Both round their logits once, to values of their own: a few units of the last place.
        bound = 1.5 * (theirs[name] - value).norm() + 5 * 2**-8 * value.norm()
        assert (ours[name] - value).norm() <= bound or value.isnan().all(), name
        assert ours[name].dtype == theirs[name].dtype, name


def test_float64_inputs_stay_float64() -> None:
    call = {
        name: value.double() if value.is_floating_point() else value
        for name, value in chosen(operands(), "input", set()).items()
    }
    options = settings_of("grpo", "sequence", "input")
    ours = results(FusedLinearGRPOLoss(**options), call)
    theirs = results(LigerFusedLinearGRPOLoss(**options), call)
    assert {value.dtype for value in ours.values()} == {torch.float64}
    assert ours["loss"].item() == pytest.approx(theirs["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["bnpo", "cispo"])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_clip_fraction_at_each_sign_of_the_advantage(loss_type: str, advantage: float) -> None:
    call = chosen(operands(), "none without beta", {"vllm_is_ratio"})
    call["advantages"] = torch.full((B,), advantage)
    options = settings_of(loss_type, "token", "none without beta")
    # A delta below the upper bound decides in its place, and counts as clipped all the same.
    for delta in (None, 1.05):
        ours = assert_equal(options | {"delta": delta}, call, delta)
        expects_some = advantage > 0 or (advantage < 0 and loss_type != "cispo")
        assert (ours["metric 0 of 1"] > 0) == expects_some
    call["old_per_token_logps"] = None  # on-policy: the ratio is 1
    ours = assert_equal(options | {"epsilon_high": 0.5}, call, "on-policy")
    assert ours["metric 0 of 1"] == (loss_type == "cispo" and advantage > 0)


@pytest.mark.parametrize(
    "frozen", [("lin_weight",), ("bias",), ("lin_weight", "bias"), ("_input",)]
)
def test_frozen_operands_get_no_gradient(frozen: tuple[str, ...]) -> None:
    call = chosen(operands(), "logps", set())
    expected = results(FusedLinearGRPOLoss(), call)
    for name in {"_input", "lin_weight", "bias"} - set(frozen):
        call[name].requires_grad_()
    loss, _ = FusedLinearGRPOLoss()(**call)
    loss.backward()
    for name in ("_input", "lin_weight", "bias"):
        if name in frozen:
            assert call[name].grad is None
        else:
            assert torch.equal(call[name].grad, expected[f"d{name}"])


@pytest.mark.parametrize("loss_type", list(AGGREGATIONS))
@pytest.mark.parametrize("items", [0, 0.5, 29, torch.tensor(29), torch.tensor(31.5)])
def test_num_items_in_batch(loss_type: str, items: Tensor | float) -> None:
    call = chosen(operands(), "logps", set()) | {"num_items_in_batch": items}
    assert_equal(settings_of(loss_type, "token", "logps"), call, items)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_at_masked_places_may_be_padding(dtype: torch.dtype) -> None:
    call = chosen(operands(), "logps", set())
    call["attention_mask"] = MASKS["int64"]
    call["selected_token_ids"] = (
        call["selected_token_ids"].where(MASKS["int64"] == 1, -100).to(dtype)
    )
    assert_equal(settings_of("dapo", "token", "logps"), call, dtype)


def test_masked_tokens_may_hold_nan() -> None:
    given = operands()
    given["attention_mask"] = MASKS["int64"]
    options = settings_of("grpo", "sequence", "logps")
    clean = results(FusedLinearGRPOLoss(**options), chosen(given, "logps", set()))
    for name in ("old_per_token_logps", "ref_per_token_logps", "vllm_is_ratio"):
        given[name] = given[name].where(MASKS["int64"] == 1, torch.nan)
    dirty = results(FusedLinearGRPOLoss(**options), chosen(given, "logps", set()))
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name


@pytest.mark.slow
def test_two_processes_share_the_normalizer(tmp_path: Path) -> None:
    reports = run_ranks(Path(__file__).with_name("liger_ranks.py"), 2, tmp_path)
    for values in reports:
        assert values["ours"] == pytest.approx(values["theirs"], rel=1e-5)
        assert values["ours"][0] != pytest.approx(values["alone"], rel=1e-2)


@pytest.mark.thinned(7)
@pytest.mark.parametrize("reference", ["none", "logps", "input"])
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_compiles_in_one_graph(loss_type: str, level: str, reference: str) -> None:
    call = chosen(operands(), reference, set())
    call["attention_mask"] = MASKS["int64"]
    module = FusedLinearGRPOLoss(**settings_of(loss_type, level, reference))
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = results(module, call)
    for name, value in results(compiled, call).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("reference", ["none without beta", "logps", "input"])
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_waits_for_no_device(
    loss_type: str, level: str, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = chosen(operands(), reference, set())
    module = FusedLinearGRPOLoss(**settings_of(loss_type, level, reference))
    call["_input"].requires_grad_()
    # The mask's values are looked at on a CPU only, and not while compiling.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with ForbidHostSync():
        loss, _ = module(**call, num_items_in_batch=20)
        loss.backward()
        call["attention_mask"] = call["attention_mask"] / 2
        is_nan = module(**call)[0].isnan()
    assert is_nan


@pytest.mark.gpu
@pytest.mark.parametrize("reference", ["none without beta", "logps", "input"])
@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
def test_equals_theirs_on_gpu(loss_type: str, level: str, reference: str) -> None:
    given = {name: value.cuda() for name, value in operands(4, 16, 64, 1000).items()}
    call = chosen(given, reference, set())
    options = settings_of(loss_type, level, reference)
    assert_equal(options, call, reference, tolerance=1e-3)
    with ForbidHostSync("cuda"):
        loss, _ = FusedLinearGRPOLoss(**options)(**call)
    call["attention_mask"] = call["attention_mask"] / 2
    assert FusedLinearGRPOLoss(**options)(**call)[0].isnan()
    assert not loss.isnan()


def test_signatures_are_theirs() -> None:
    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        listed = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in listed]

    for name in ("__init__", "forward"):
        ours, theirs = (
            parameters(getattr(module, name))
            for module in (FusedLinearGRPOLoss, LigerFusedLinearGRPOLoss)
        )
        assert ours == theirs


def test_attributes_are_theirs_and_are_read_by_each_call() -> None:
    ours, theirs = FusedLinearGRPOLoss(), LigerFusedLinearGRPOLoss()
    public = {name: value for name, value in vars(theirs).items() if not name.startswith("_")}
    assert {name: getattr(ours, name) for name in public} == public
    call = chosen(operands(), "logps", set())
    ours.beta, ours.loss_type, ours.epsilon_high = 0.3, "grpo", 0.1
    changed = FusedLinearGRPOLoss(beta=0.3, loss_type="grpo", epsilon_high=0.1)
    assert ours(**call)[0] == changed(**call)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sapo"}, "loss_type: .*'sapo'"),
        ({"loss_type": "luspo"}, "loss_type: .*'luspo'"),
        ({"loss_type": "vespo"}, "loss_type: .*'vespo'"),
        ({"loss_type": "grop"}, "loss_type: .*'grop'"),
        ({"use_bias_correction_kl": True}, "use_bias_correction_kl: "),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "Sequence-level .*cispo"),
        ({"importance_sampling_level": "turn"}, "importance_sampling_level: .*'turn'"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"delta": 0.0}, "delta: "),
        ({"epsilon_high": math.inf}, "epsilon_high: .*inf"),
        ({"epsilon_low": -0.1}, "epsilon_low: .*-0.1"),
        ({"loss_type": "cispo", "epsilon_high": -0.1}, "epsilon_high: .*-0.1"),
        ({"beta": -1.0}, "beta: .*-1"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_what_is_not_implemented_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        FusedLinearGRPOLoss(**options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_input": torch.ones(B * T, H)}, r"_input: wanted shape \[B, T, H\], got \[15, 8\]"),
        ({"selected_token_ids": torch.ones(B * T).long()}, "selected_token_ids: wanted shape"),
        ({"attention_mask": torch.ones(B, T + 1)}, r"attention_mask: wanted shape \[B=3, T=5\]"),
        ({"attention_mask": torch.full((B, T), 0.5)}, "attention_mask: wanted 0 or 1, got 0.5"),
        ({"attention_mask": torch.full((B, T), 2)}, "attention_mask: wanted 0 or 1, got 2"),
        ({"selected_token_ids": torch.full((B, T), -100)}, "selected_token_ids: .*-100"),
        ({"advantages": torch.ones(B, 1)}, r"advantages: wanted shape \[B=3\], got \[3, 1\]"),
        ({"old_per_token_logps": torch.ones(B)}, "old_per_token_logps: wanted shape"),
        ({"ref_per_token_logps": torch.ones(B)}, "ref_per_token_logps: wanted shape"),
        ({"vllm_is_ratio": torch.ones(T)}, r"vllm_is_ratio: .*\[B, 1\] or \[B\], got \[5\]"),
        ({"vllm_is_ratio": torch.ones(B, T, 1)}, "vllm_is_ratio: wanted shape"),
        ({"ref_per_token_logps": None}, "use_ref_model: .*got neither"),
        ({"ref_per_token_logps": None, "ref_input": torch.ones(B, T, H)}, "ref_weight: .*None"),
        ({"ref_per_token_logps": None, "ref_input": torch.ones(B, T)}, "ref_input: wanted shape"),
    ],
)
def test_bad_arguments_are_named_as_theirs(changes: dict[str, Any], message: str) -> None:
    call = chosen(operands(), "logps", set()) | changes
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss()(**call)


def test_an_advantage_of_nan_is_no_absent_one() -> None:
    call = chosen(operands(), "logps", set())
    call["advantages"][1] = torch.nan
    for module in (FusedLinearGRPOLoss(), LigerFusedLinearGRPOLoss(compiled=False)):
        assert module(**call)[0].isnan()


def test_of_two_references_the_log_probs_are_taken() -> None:
    given = operands()
    both = chosen(given, "logps", set()) | chosen(given, "input", set())
    with pytest.warns(UserWarning, match="both given"):
        loss, _ = FusedLinearGRPOLoss()(**both)
    assert loss == FusedLinearGRPOLoss()(**chosen(given, "logps", set()))[0]


def test_patched_into_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel import chunked_loss

    monkeypatch.setattr(chunked_loss, "LigerFusedLinearGRPOLoss", FusedLinearGRPOLoss)
    call = chosen(operands(), "logps", set())
    patched = chunked_loss.LigerFusedLinearGRPOLoss(beta=0.1)
    theirs = LigerFusedLinearGRPOLoss(beta=0.1, compiled=False)
    torch.testing.assert_close(patched(**call), theirs(**call))


def test_importing_without_liger_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(peers, "version", missing)
    with pytest.raises(ImportError, match="pip install 'liger-kernel==0.8.5'"):
        runpy.run_module("recap_fast.integrations.liger")
