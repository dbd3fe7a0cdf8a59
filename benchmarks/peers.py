"""The loss through recap-fast and through its peers, each in the fastest way it documents.

An `Implementation` builds a step for given operands. The step runs forward and backward, leaves
gradients in `.grad`, and returns the per-token log-probs [B, T] where the implementation gives any.
Where a package, a device or a capability is missing, `why_absent` says so; nothing is run in a
weaker form instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.inputs import Inputs
from benchmarks.liger import Step, liger_chunked, liger_cute, liger_triton

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [B, T, H], weight [V, H], targets [B, T]) -> log-probs [B, T], differentiable."""


@dataclass(frozen=True)
class Implementation:
    """One way of computing the loss."""

    name: str
    build: Callable[[Inputs], Step]
    kind: Literal["floor", "ours", "peer"] = "peer"
    package: str | None = None  # module that must be importable
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("bfloat16", "float32")  # of the operands
    capability: tuple[int, int] | None = None  # the only one of CUDA devices that will do
    floor: str = "3 GEMMs"
    """Name of the floor in the dtypes of this implementation's logits."""
    is_cross_entropy: bool = False
    """The loss is a mean of negative log-probs: advantages of 1."""

    def __str__(self) -> str:
        return self.name

    def why_absent(self, device: torch.device, dtype: str) -> str | None:
        """The reason why it cannot run here; None where it can."""
        if self.package is not None and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if device.type not in self.devices:
            return f"needs {' or '.join(self.devices)}, this is {device.type}"
        if dtype not in self.dtypes:
            return f"needs {' or '.join(self.dtypes)} operands, these are {dtype}"
        if self.capability is not None:
            have = torch.cuda.get_device_capability(device)
            if have != self.capability:
                return f"needs compute capability {self.capability}, this has {have}"
        return None


def clipped_mean(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The loss from log-probs [B, T], as a trainer writes it."""
    ratio = torch.exp(logprobs - logprobs.detach())
    advantages = advantages.unsqueeze(1)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def from_logprobs(logprobs: Logprobs, inputs: Inputs) -> Step:
    """The step of an implementation that gives per-token log-probs."""

    def step() -> Tensor:
        picked = logprobs(inputs.hidden, inputs.weight, inputs.targets)
        clipped_mean(picked.float(), inputs.advantages).backward()
        return picked.detach()

    return step


# The floor: nothing but the GEMMs.


_FLOOR_ROWS = 32768
"""Rows of logits at a time: large enough for full speed, small enough to fit."""


def three_gemms(inputs: Inputs, logits_dtype: torch.dtype | None = None) -> Step:
    """Logits, hidden's gradient, weight's gradient, and nothing else.

    With logits of another dtype than the operands (CUDA only) the gradients' GEMMs still read a
    matrix in the operands' dtype, as every implementation would have it; it is made beforehand.
    """
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    rows = min(_FLOOR_ROWS, len(hidden))
    widen = {} if logits_dtype is None else {"out_dtype": logits_dtype}
    gradient = None if logits_dtype is None else hidden[:rows] @ weight.t()
    inputs.hidden.grad = torch.empty_like(inputs.hidden)
    inputs.weight.grad = torch.empty_like(weight)
    d_hidden, d_weight = inputs.hidden.grad.view_as(hidden), inputs.weight.grad

    def chunk(start: int) -> None:
        states = hidden[start : start + rows]
        logits = torch.mm(states, weight.t(), **widen)
        d_logits = logits if gradient is None else gradient[: len(logits)]
        torch.mm(d_logits, weight, out=d_hidden[start : start + rows])
        if start == 0:
            torch.mm(d_logits.t(), states, out=d_weight)
        else:
            d_weight.addmm_(d_logits.t(), states)

    def step() -> None:
        for start in range(0, len(hidden), rows):
            chunk(start)

    return step


# Ours.


def fused_policy_loss(inputs: Inputs, impl: str, logits_dtype: str | None = None) -> Step:
    """fused_linear_policy_loss; logits in the operands' dtype, as peers have them, or another."""
    from recap_fast import PolicyLossConfig, fused_linear_policy_loss

    b, t, _ = inputs.hidden.shape
    own = str(inputs.hidden.dtype).removeprefix("torch.")
    config = PolicyLossConfig(logits_dtype=logits_dtype or own)  # type: ignore[arg-type]
    sequence_ids = torch.arange(b, device=inputs.hidden.device).repeat_interleave(t).int()

    def step() -> Tensor:
        output = fused_linear_policy_loss(
            inputs.hidden.flatten(0, 1),
            inputs.weight,
            inputs.targets.flatten(),
            sequence_ids=sequence_ids,
            advantages=inputs.advantages.unsqueeze(1),
            config=config,
            impl=impl,
        )
        output.loss.backward()
        return output.logprobs.view(b, t)

    return step


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, impl: str) -> Tensor:
    """recap_fast.linear_logprobs."""
    from recap_fast import linear_logprobs as ours

    logprobs, _ = ours(hidden.flatten(0, 1), weight, targets.flatten(), impl=impl)
    return logprobs.view_as(targets)


def token_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, impl: str) -> Tensor:
    """recap_fast.linear_token_statistics."""
    from recap_fast import linear_token_statistics as ours

    return ours(hidden.flatten(0, 1), weight, targets.flatten(), impl=impl).logprobs.view_as(
        targets
    )


# Baselines without a package.


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Plain torch: logits, float32 log_softmax, gather."""
    logprobs = torch.log_softmax(F.linear(hidden, weight).float(), -1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def compiled(inputs: Inputs) -> Step:
    """torch.compile of eager torch and the loss."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Any:
        picked = eager(hidden, weight, targets)
        return clipped_mean(picked, advantages), picked.detach()

    # Past a limit of recompilations of the same code torch.compile would run it eagerly.
    torch._dynamo.reset()
    compiled_loss = torch.compile(loss, dynamic=False)

    def step() -> Tensor:
        value, picked = compiled_loss(
            inputs.hidden, inputs.weight, inputs.targets, inputs.advantages
        )
        value.backward()
        return picked

    return step


class _ChunkedLogprobs(torch.autograd.Function):
    """512 rows of logits at a time, made again in backward: the scheme of verl's torch path."""

    rows = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprobs = torch.empty(len(targets), device=hidden.device)
        for start in range(0, len(targets), _ChunkedLogprobs.rows):
            chunk = slice(start, start + _ChunkedLogprobs.rows)
            logits = (hidden[chunk] @ weight.t()).float()
            picked = logits.gather(1, targets[chunk, None])[:, 0]
            logprobs[chunk] = picked - torch.logsumexp(logits, -1)
        ctx.save_for_backward(hidden, weight, targets)
        return logprobs

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(targets), _ChunkedLogprobs.rows):
            chunk = slice(start, start + _ChunkedLogprobs.rows)
            scale = by_logprob[chunk, None]
            d_logits = torch.softmax((hidden[chunk] @ weight.t()).float(), -1).mul_(-scale)
            d_logits.scatter_add_(1, targets[chunk, None], scale)
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[chunk] = d_logits @ weight
            d_weight.addmm_(d_logits.t(), hidden[chunk])
        return d_hidden, d_weight, None


def chunked_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Chunked torch with recomputed logits."""
    picked = _ChunkedLogprobs.apply(hidden.flatten(0, 1), weight, targets.flatten())
    return picked.view_as(targets)


# Peers.


def trl_selective(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's selective_log_softmax over whole logits; on CUDA its own Triton kernel."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(F.linear(hidden, weight), targets)


def trl_chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, more: tuple[str, ...] = ()
) -> Tensor:
    """TRL's `kernels.chunked_logprob`, as its GRPOTrainer calls it: with entropy, and `more`."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    outputs = ("log_probs", "entropy", *more)
    flat = hidden.flatten(0, 1)
    results = ChunkedLogProbFunction.apply(
        flat, weight, None, targets.flatten(), 1.0, columns, None, 1.0, outputs
    )
    return results[0].view_as(targets)


@cache
def _unsloth_fused_linear() -> Any:
    """unsloth_zoo's fused_losses/fused_linear.py by itself.

    To import the package is to patch torch and transformers, for every peer, and needs unsloth.
    This one file needs torch alone (Triton on a GPU) and, kept from asking the rest how much memory
    is free, lets up to 2 GiB of logits exist at a time, which is its limit anyhow.
    """
    sys.modules["unsloth_zoo.tiled_mlp"] = None  # type: ignore[assignment]
    folder = next(iter(find_spec("unsloth_zoo").submodule_search_locations))  # type: ignore
    path = Path(folder) / "fused_losses" / "fused_linear.py"
    spec = spec_from_file_location("unsloth_fused_linear", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unsloth(hidden: Tensor, weight: Tensor, targets: Tensor, more: bool = False) -> Tensor:
    """unsloth_zoo's fused_linear_logprobs: logits made again in backward, as the head is trained.

    `more`: with all the statistics that it knows, which are those of TRL's chunked_logprob.
    """
    results = _unsloth_fused_linear().fused_linear_logprobs(
        hidden,
        weight,
        targets,
        return_entropy=True,
        return_mean_logits=more,
        return_log_sum_sq_probs=more,
        return_is_top1=more,
    )
    return results[0]


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, impl: str) -> Tensor:
    """Apple's CCE. "cce", its default, leaves out gradients below bfloat16's resolution."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)


def quack(inputs: Inputs) -> Step:
    """quack's chunked cross entropy with tuned kernels: a scalar, no log-probs.

    On sm_90 it chooses its scaled-exp pipeline by itself.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def step() -> None:
        flat = inputs.hidden.flatten(0, 1)
        chunked_linear_cross_entropy(flat, inputs.weight, inputs.targets.flatten()).backward()

    return step


def quack_whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """quack's cross entropy of whole logits, whose gradient replaces them: log-probs."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return -linear_cross_entropy_func(
        hidden, weight, None, targets, reduction="none", inplace_backward=True
    )


def verl_fused(hidden: Tensor, weight: Tensor, targets: Tensor, ours: bool = False) -> Tensor:
    """verl's FusedLinearForPPO with its torch backend, or ours in its place."""
    if ours:
        from recap_fast.integrations.verl import FusedLinearForPPO

        head = FusedLinearForPPO()
    else:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO as TheirHead

        head = TheirHead(impl_backend="torch")
    logprobs, _ = head(hidden, weight, targets)
    return logprobs


def verl_triton(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """verl's Triton linear_cross_entropy: log-probs and entropy."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    flat = hidden.flatten(0, 1)
    logprobs, _ = linear_cross_entropy(flat, weight, targets.flatten(), 1.0, "none")
    return logprobs.view_as(targets)


def _with_logprobs(name: str, logprobs: Logprobs, **settings: Any) -> Implementation:
    return Implementation(name, partial(from_logprobs, logprobs), **settings)


FLOOR, FLOOR_FP32 = "3 GEMMs", "3 GEMMs, fp32 logits"
EAGER = "eager torch"
_GPU: dict[str, Any] = {"devices": ("cuda",)}
_HALF: dict[str, Any] = {"devices": ("cuda",), "dtypes": ("bfloat16",)}
_FP32: dict[str, Any] = {**_HALF, "floor": FLOOR_FP32}  # out_dtype of a GEMM is CUDA's

FLOORS = (
    Implementation(FLOOR, three_gemms, "floor"),
    Implementation(FLOOR_FP32, partial(three_gemms, logits_dtype=torch.float32), "floor", **_FP32),
)
_FUSED = tuple(
    Implementation(name, partial(fused_policy_loss, **arguments), "ours", **settings)
    for name, arguments, settings in (
        ("recap-fast torch", {"impl": "torch"}, {}),
        ("recap-fast triton", {"impl": "triton"}, _GPU),
        ("recap-fast torch, fp32 logits", {"impl": "torch", "logits_dtype": "float32"}, _FP32),
        ("recap-fast triton, fp32 logits", {"impl": "triton", "logits_dtype": "float32"}, _FP32),
    )
)
_OUR_LOGPROBS = (
    _with_logprobs("recap-fast torch", partial(linear_logprobs, impl="torch"), kind="ours"),
    _with_logprobs(
        "recap-fast triton", partial(linear_logprobs, impl="triton"), kind="ours", **_GPU
    ),
)
_MORE = ("log_sum_sq_probs", "mean_logits", "is_top1")
_TOKEN_STATISTICS = tuple(
    _with_logprobs(f"{name}, all statistics", function, **settings)
    for name, function, settings in (
        ("recap-fast torch", partial(token_statistics, impl="torch"), {"kind": "ours"}),
        ("recap-fast triton", partial(token_statistics, impl="triton"), {"kind": "ours", **_GPU}),
        ("TRL chunked_logprob", partial(trl_chunked, more=_MORE), {"package": "trl"}),
        ("unsloth fused_linear", partial(unsloth, more=True), {"package": "unsloth_zoo"}),
    )
)
_LOGPROB_PEERS = (
    _with_logprobs(EAGER, eager),
    Implementation("torch.compile", compiled),
    _with_logprobs("chunked torch (as verl)", chunked_torch),
    _with_logprobs("TRL selective_log_softmax", trl_selective, package="trl"),
    _with_logprobs("TRL chunked_logprob", trl_chunked, package="trl"),
    _with_logprobs("unsloth fused_linear", unsloth, package="unsloth_zoo"),
    _with_logprobs("Liger CuTe", liger_cute, package="cutlass", capability=(9, 0), **_HALF),
    _with_logprobs("verl Triton", verl_triton, package="verl", **_HALF),
    _with_logprobs("quack, whole logits", quack_whole_logits, package="quack", **_HALF),
    _with_logprobs(
        "CCE", partial(cut_cross_entropy, impl="cce"), package="cut_cross_entropy", **_HALF
    ),
    _with_logprobs(
        "CCE exact",
        partial(cut_cross_entropy, impl="cce_exact"),
        package="cut_cross_entropy",
        **_HALF,
    ),
)
_LOSS_PEERS = (
    Implementation("Liger chunked", liger_chunked, package="liger_kernel"),
    Implementation("Liger Triton", liger_triton, package="liger_kernel", **_GPU),
    Implementation("quack", quack, package="quack", is_cross_entropy=True, **_HALF),
)

POLICY_LOSSES = (*FLOORS, *_FUSED, *_LOGPROB_PEERS, *_LOSS_PEERS)
"""Every way to the policy loss. Those of `LOGPROBS` compute it from their log-probs."""
LOGPROBS = (FLOORS[0], *_OUR_LOGPROBS, *_LOGPROB_PEERS, *_TOKEN_STATISTICS)
"""Every way to differentiable per-token log-probs; the last also tell all `TokenStatistics`."""
LIGER_LOSSES = (
    Implementation("Liger's loss", liger_chunked, package="liger_kernel"),
    Implementation(
        "recap-fast's loss", partial(liger_chunked, ours=True), "ours", package="liger_kernel"
    ),
)
"""Two classes with one call. The first is Liger's own."""
VERL_HEADS = (
    _with_logprobs("verl's head", verl_fused, package="verl"),
    _with_logprobs(
        "recap-fast's head", partial(verl_fused, ours=True), kind="ours", package="verl"
    ),
)
"""Two classes with one call. The first is verl's own."""
