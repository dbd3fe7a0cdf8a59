"""What the static table compiles: the launches of the public operations, recorded as they come.

Nothing runs. Shapes that decide how a kernel is compiled (V, K, alignment, dtypes) are real ones;
those that do not (tokens, hidden) are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from recap_fast.bench.static_analysis import Case
from recap_fast.ops import (
    PolicyLossConfig,
    chunked,
    fused_linear_policy_loss,
    group_advantages,
    linear_logprobs,
    linear_token_statistics,
    selective_logprobs,
)
from recap_fast.ops.adamw import adamw_8bit, adamw_bfloat16
from recap_fast.ops.adamw_step import AdamWStep
from recap_fast.ops.launch import Launch, recording
from recap_fast.reweighting.recap import Deviation, RecapReweighter

TOKENS, HIDDEN, SEQUENCES = 4, 16, 64
ALIGNED, UNALIGNED = 151936, 50257  # the vocabularies of Qwen2.5 and GPT-2


def record() -> list[Case]:
    """Every case, in the order of the table."""
    cases: list[Case] = []
    with _like_cuda():
        for name, run, is_aligned in _operations():
            cases.extend(_record(name, run, is_aligned))
    return cases


def _record(name: str, run: Callable[[], Tensor | None], is_aligned: bool) -> Iterator[Case]:
    forward: list[Launch] = []
    backward: list[Launch] = []
    with recording(forward.append):
        result = run()
    if result is not None:
        with recording(backward.append):
            result.backward()
    for launches, suffix in ((forward, ""), (backward, ", backward")):
        for place, launch in enumerate(launches):
            is_last = place == len(launches) - 1
            helper = "" if is_last else f", {launch.kernel.__name__}"
            yield Case(name + suffix + helper, launch, is_aligned)


@contextmanager
def _like_cuda() -> Iterator[None]:
    """Leaves out the GEMMs, and gives logits the dtype that they have on CUDA.

    There float32 logits may come from bfloat16 operands, which torch's CPU GEMMs do not offer.
    """
    gemm_dtype = chunked.Head.gemm_dtype.fget  # type: ignore[attr-defined]

    def on_cuda(head: chunked.Head) -> torch.dtype:
        hidden = SimpleNamespace(dtype=head.hidden.dtype, is_cuda=True)
        return gemm_dtype(SimpleNamespace(hidden=hidden, bfloat16_logits=head.bfloat16_logits))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(chunked.Head, "gemm_dtype", property(on_cuda)))
        for name in ("_logits_gemm", "_add_gradients"):
            stack.enter_context(mock.patch.object(chunked, name))
        yield


def _operations() -> Iterator[tuple[str, Callable[[], Tensor | None], bool]]:
    for k in (4, 32):
        yield f"group_advantages, {k} objectives", _advantages(k), True
    yield "reweighter, 4 objectives, window 10", _reweight(4, "window"), True
    yield "reweighter, 32 objectives, window 10, current mean", _reweight(32, "current"), True
    yield "reweighter, 4 objectives, window 10, retention", _reweight(4, "window", 10.0), True
    half = torch.bfloat16
    in_bfloat16 = PolicyLossConfig(logits_dtype="bfloat16")
    everything: dict[str, Any] = {
        "kl_coef": 0.1, "kl_estimator": "k3", "entropy_coef": 0.01, "rollout_is_cap": 2.0,
        "clip_delta": 4.0,
    }  # fmt: skip
    yield "policy loss, float32 logits", _policy(half), True
    yield "policy loss, bfloat16 logits", _policy(half, in_bfloat16), True
    yield "policy loss, float16 operands", _policy(torch.float16), True
    yield (
        "policy loss, off-policy with KL, entropy and cap, float32 logits",
        _policy(half, PolicyLossConfig(**everything), off_policy=True),
        True,
    )
    yield (
        "policy loss, off-policy with KL, entropy and cap, bfloat16 logits",
        _policy(half, PolicyLossConfig(**everything, logits_dtype="bfloat16"), off_policy=True),
        True,
    )
    yield (
        "policy loss, masked rollout weights, bfloat16 logits",
        _policy(
            half,
            PolicyLossConfig(
                rollout_is_cap=2.0,
                rollout_is_min=0.5,
                rollout_is_mode="mask",
                logits_dtype="bfloat16",
            ),
            rollout_logprobs=torch.zeros(TOKENS),
        ),
        True,
    )
    yield (
        "policy loss, CISPO, softcap, bfloat16 logits",
        _policy(
            half,
            PolicyLossConfig(loss_type="cispo", logit_softcap=30.0, logits_dtype="bfloat16"),
            off_policy=True,
        ),
        True,
    )
    yield (
        "policy loss, importance weights and loss scale, float16 operands",
        _policy(torch.float16, importance_weights=torch.ones(TOKENS), loss_scale=torch.ones(())),
        True,
    )
    yield "policy loss, 32 objectives, bfloat16 logits", _policy(half, in_bfloat16, k=32), True
    yield (
        "policy loss, unaligned rows, bfloat16 logits",
        _policy(half, in_bfloat16, v=UNALIGNED),
        False,
    )
    yield "linear_logprobs", _linear(half), True
    yield "linear_logprobs, softcap", _linear(half, logit_softcap=30.0), True
    for softcap, name in ((None, ""), (30.0, ", softcap")):
        yield f"linear_token_statistics{name}", _token_statistics(half, softcap), True
    for dtype in (half, torch.float32):
        yield f"selective_logprobs, {str(dtype)[6:]}", _selective(dtype, ALIGNED), True
    yield "selective_logprobs, unaligned rows, bfloat16", _selective(half, UNALIGNED), False
    yield "AdamW, bfloat16 moments", _adamw_bfloat16, True
    yield "AdamW, moments of 8 bits", _adamw_8bit, True


def _policy(
    dtype: torch.dtype,
    config: PolicyLossConfig | None = None,
    *,
    v: int = ALIGNED,
    k: int = 4,
    off_policy: bool = False,
    **more: Tensor,
) -> Callable[[], None]:
    def run() -> None:
        hidden, weight = _head(dtype, v)
        options: dict[str, Any] = dict(more)
        if off_policy:
            names = ("old_logprobs", "ref_logprobs", "rollout_logprobs")
            options |= {name: torch.zeros(TOKENS) for name in names}
        fused_linear_policy_loss(
            hidden,
            weight,
            torch.zeros(TOKENS, dtype=torch.int64),
            sequence_ids=torch.zeros(TOKENS, dtype=torch.int32),
            rewards=torch.zeros(SEQUENCES, k),
            group_ids=torch.zeros(SEQUENCES, dtype=torch.int64),
            objective_weights=torch.ones(k),
            token_objectives=torch.zeros(TOKENS, dtype=torch.int32),
            config=config or PolicyLossConfig(),
            impl="triton",
            **options,
        )

    return run


def _linear(dtype: torch.dtype, **options: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        targets = torch.zeros(TOKENS, dtype=torch.int64)
        logprobs, entropy = linear_logprobs(
            *_head(dtype, ALIGNED), targets, impl="triton", **options
        )
        return (logprobs + entropy).sum()

    return run


def _token_statistics(dtype: torch.dtype, softcap: float | None) -> Callable[[], None]:
    def run() -> None:  # its backward kernel is that of `linear_logprobs`
        targets = torch.zeros(TOKENS, dtype=torch.int64)
        linear_token_statistics(
            *_head(dtype, ALIGNED), targets, logit_softcap=softcap, impl="triton"
        )

    return run


def _selective(dtype: torch.dtype, v: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        logits = torch.empty(TOKENS, v, dtype=dtype, requires_grad=True)
        targets = torch.zeros(TOKENS, dtype=torch.int64)
        logprobs, entropy = selective_logprobs(logits, targets, impl="triton")
        return (logprobs + entropy).sum()

    return run


def _advantages(k: int) -> Callable[[], None]:
    def run() -> None:
        rewards, groups = torch.zeros(SEQUENCES, k), torch.zeros(SEQUENCES, dtype=torch.int64)
        group_advantages(rewards, groups, impl="triton")

    return run


def _reweight(k: int, std: Deviation, retention: float = 0.0) -> Callable[[], None]:
    def run() -> None:
        reweighter = RecapReweighter(k, std=std, retention=retention)
        reweighter._in_one_launch = True  # as on CUDA
        reweighter.update(torch.zeros(k), torch.ones(k, dtype=torch.bool))

    return run


def _adamw_bfloat16() -> None:
    first, second = (torch.empty(SEQUENCES, dtype=torch.bfloat16) for _ in range(2))
    adamw_bfloat16(
        torch.empty(SEQUENCES), torch.empty(SEQUENCES), first, second,
        torch.ones(()), _adamw_step(), key=0, impl="triton",
    )  # fmt: skip


def _adamw_8bit() -> None:
    codes, scale = torch.empty(SEQUENCES, 256, dtype=torch.uint8), torch.empty(SEQUENCES, 1)
    adamw_8bit(
        torch.empty(SEQUENCES, 256), torch.empty(SEQUENCES, 256), codes, scale, codes, scale,
        torch.ones(()), _adamw_step(), impl="triton",
    )  # fmt: skip


def _adamw_step() -> AdamWStep:
    return AdamWStep(1e-6, 0.9, 0.999, 1e-8, 0.01, torch.ones(()), torch.zeros(()))


def _head(dtype: torch.dtype, v: int) -> tuple[Tensor, Tensor]:
    hidden = torch.empty(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, torch.empty(v, HIDDEN, dtype=dtype, requires_grad=True)
