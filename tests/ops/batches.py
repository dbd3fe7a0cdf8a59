"""Random batches for the policy loss, and how its tests compare two implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from recap_fast.ops import PolicyLossConfig, PolicyLossOutput, fused_linear_policy_loss

DIFFERENTIABLE = ("hidden", "weight", "bias")


@dataclass
class Batch:
    """Arguments of the loss in float64; `run` converts them."""

    tensors: dict[str, Tensor]
    config: PolicyLossConfig

    def run(
        self, impl: str, dtype: torch.dtype, rounded: torch.dtype | None = None, **override: Any
    ) -> dict[str, Tensor]:
        """Outputs and gradients by name. Operands are rounded to `rounded` first, then cast.

        Rounding lets a float64 run see exactly the numbers that a bfloat16 run sees.
        """
        arguments: dict[str, Any] = dict(self.tensors)
        full = torch.float64 if dtype == torch.float64 else torch.float32
        for name, value in arguments.items():
            if not value.is_floating_point():
                continue
            if name in DIFFERENTIABLE:
                value = value.to(rounded or dtype).to(dtype).requires_grad_()
            else:
                value = value.float().to(full)
            arguments[name] = value
        arguments |= override
        output = fused_linear_policy_loss(**arguments, config=self.config, impl=impl)
        leaves = {
            name: arguments[name]
            for name in DIFFERENTIABLE
            if arguments.get(name) is not None and arguments[name].requires_grad
        }
        gradients = torch.autograd.grad(output.loss, list(leaves.values()))
        return outputs(output) | {f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}


def outputs(output: PolicyLossOutput) -> dict[str, Tensor]:
    """The tensors of an output by name."""
    names = PolicyLossOutput.__dataclass_fields__
    found = {name: getattr(output, name) for name in names}
    return {name: value.detach() for name, value in found.items() if value is not None}


def random_batch(
    seed: int = 0,
    n: int = 40,
    h: int = 8,
    v: int = 37,
    s: int = 5,
    k: int = 3,
    *,
    rewards: bool = False,
    supervised: bool = True,
    old: bool = False,
    ref: bool = False,
    rollout: bool = False,
    importance: bool = False,
    bias: bool = False,
    spread: float = 0.3,
    **config: Any,
) -> Batch:
    """A ragged batch with ignored targets, absent objectives and supervised tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    hidden, weight = normal(n, h) / h**0.5, normal(v, h)
    targets = integers(0, v, n)
    logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    targets[integers(0, 5, n) == 0] = -100
    table = integers(0, 2, s, k).double() if rewards else normal(s, k)
    table[integers(0, 4, s, k) == 0] = float("nan")
    tensors = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "sequence_ids": integers(0, s, n).sort().values.int(),
        "rewards" if rewards else "advantages": table,
        "objective_weights": torch.rand(k, generator=generator, dtype=torch.float64) * 2,
    }
    tensors["sequence_ids"][targets == -100] = -1
    if rewards:
        tensors["group_ids"] = integers(0, max(1, s // 3), s) * 10 - 3
    if supervised:
        tensors["token_objectives"] = integers(-1, k, n).where(integers(0, 2, n) == 0, -1)
    if old:
        tensors["old_logprobs"] = logprobs + spread * normal(n)
    if ref:
        tensors["ref_logprobs"] = logprobs + spread * normal(n)
    if rollout:
        tensors["rollout_logprobs"] = logprobs + spread * normal(n)
        config.setdefault("rollout_is_cap", 1.1)
    if importance:
        tensors["importance_weights"] = 2 * torch.rand(n, generator=generator, dtype=torch.float64)
        tensors["importance_weights"][integers(0, 4, n) == 0] = 0.0
    if bias:
        tensors["bias"] = normal(v)
    return Batch(tensors, PolicyLossConfig(max_completion_length=16, **config))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Batches over every argument and option."""
    ref = draw(st.booleans())
    weighed = draw(st.sampled_from([None, "rollout", "importance"]))
    rollout = weighed == "rollout"
    return random_batch(
        seed=draw(st.integers(0, 10_000)),
        n=draw(st.integers(0, 40)),
        h=draw(st.sampled_from([1, 8, 17])),
        v=draw(st.sampled_from([1, 2, 37, 129])),
        s=draw(st.integers(1, 7)),
        k=draw(st.sampled_from([1, 2, 3, 5, 8, 31, 32])),
        rewards=draw(st.booleans()),
        supervised=draw(st.booleans()),
        old=draw(st.booleans()),
        ref=ref,
        rollout=rollout,
        importance=weighed == "importance",
        bias=draw(st.booleans()),
        spread=draw(st.sampled_from([0.1, 1.0])),
        rollout_is_mode=draw(st.sampled_from(["truncate", "mask"])) if rollout else "truncate",
        rollout_is_min=draw(st.sampled_from([None, 0.9])) if rollout else None,
        loss_type=draw(st.sampled_from(["clip", "cispo"])),
        ratio_level=draw(st.sampled_from(["token", "sequence"])),
        aggregation=draw(st.sampled_from(["token", "sequence", "constant"])),
        clip_delta=draw(st.sampled_from([None, 1.5])),
        kl_coef=draw(st.sampled_from([0.0, 0.1])) if ref else 0.0,
        kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        entropy_coef=draw(st.sampled_from([0.0, 0.05])),
        temperature=draw(st.sampled_from([1.0, 0.7])),
        logit_softcap=draw(st.sampled_from([None, 5.0])),
        logits_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


def distance(got: Tensor, truth: Tensor) -> float:
    """Root mean square error, 0 for empty tensors."""
    if truth.numel() == 0:
        return 0.0
    return float((got.double() - truth.double()).square().mean().sqrt())
