"""Operands of the loss benchmarks, the truth that results are checked against, and the shapes.

The step that every implementation runs: on-policy clipped GRPO with one objective and no KL, mean
over tokens, forward and backward. Shapes: B sequences of T tokens (N = B * T), H hidden, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_ROWS = 1024
"""Rows of float64 logits that exist at a time while the truth is computed."""


@dataclass(frozen=True)
class Shape:
    """One size of problem."""

    sequences: int  # B
    length: int  # T
    hidden: int  # H
    vocab: int  # V
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def gemm_flops(self) -> float:
        """Of logits, hidden's gradient and weight's gradient: 3 * 2 N H V."""
        return 6.0 * self.tokens * self.hidden * self.vocab

    def __str__(self) -> str:
        return f"N={self.tokens} H={self.hidden} V={self.vocab} {self.dtype}"


SHAPES: dict[str, tuple[Shape, ...]] = {
    "small": (Shape(16, 16, 64, 4096),),
    "cpu": (Shape(16, 128, 576, 49152), Shape(16, 128, 576, 49152, "float32")),
    "gpu": tuple(
        Shape(tokens // 512, 512, hidden, 151936)
        for tokens in (32768, 8192, 131072)
        for hidden in (2048, 3584)
    ),
}
"""By the word given to --shapes. Of "gpu" the shapes of the budgets come first."""


@dataclass(frozen=True)
class Inputs:
    """Operands of one step. Gradients are left in `.grad` of hidden and weight."""

    hidden: Tensor  # [B, T, H], requires grad
    weight: Tensor  # [V, H], requires grad
    targets: Tensor  # [B, T] int64
    advantages: Tensor  # [B] float32

    @classmethod
    def random(cls, shape: Shape, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Logits of unit variance. The same numbers in every process."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, shape.dtype)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        hidden = normal(shape.sequences, shape.length, shape.hidden)
        weight = normal(shape.vocab, shape.hidden) / shape.hidden**0.5
        return cls(
            hidden=hidden.to(dtype).requires_grad_(),
            weight=weight.to(dtype).requires_grad_(),
            targets=torch.randint(
                shape.vocab, hidden.shape[:2], generator=generator, device=device
            ),
            advantages=normal(shape.sequences),
        )

    def with_unit_advantages(self) -> Inputs:
        """The same operands for a loss that is a plain cross entropy."""
        return replace(self, advantages=torch.ones_like(self.advantages))

    def clear(self) -> None:
        """Drops the gradients."""
        self.hidden.grad = self.weight.grad = None


@dataclass(frozen=True)
class Truth:
    """What exact arithmetic gives, computed in float64 from the rounded operands.

    Stored in float32, whose rounding is far below that of bfloat16 results, or in float64 for
    float32 operands.
    """

    logprobs: Tensor  # [B, T]
    d_hidden: Tensor  # [B, T, H]
    d_weight: Tensor  # [V, H]


@torch.no_grad()
def compute_truth(inputs: Inputs) -> Truth:
    """Log-probs and gradients by their formulas: d logits = -A / N (onehot - p)."""
    hidden, targets = inputs.hidden.flatten(0, 1), inputs.targets.flatten()
    weight = inputs.weight.double()
    n = len(targets)
    scale = -inputs.advantages.double().repeat_interleave(inputs.targets.shape[1]) / n
    kept = torch.float64 if inputs.hidden.dtype == torch.float32 else torch.float32
    logprobs = torch.empty(n, dtype=kept, device=hidden.device)
    d_hidden = torch.empty(hidden.shape, dtype=kept, device=hidden.device)
    d_weight = torch.zeros_like(weight)
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        states = hidden[rows].double()
        logp = torch.log_softmax(states @ weight.t(), -1)
        picked = targets[rows, None]
        logprobs[rows] = logp.gather(1, picked)[:, 0]
        d_logits = logp.exp_().neg_()
        d_logits.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))
        d_logits *= scale[rows, None]
        d_hidden[rows] = (d_logits @ weight).to(kept)
        d_weight.addmm_(d_logits.t(), states)
    return Truth(
        logprobs.view_as(inputs.targets), d_hidden.view_as(inputs.hidden), d_weight.to(kept)
    )


@torch.no_grad()
def relative_error(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||, NaN where `got` has one."""
    difference = torch.linalg.vector_norm(got.to(truth.dtype) - truth, dtype=torch.float64)
    return float(difference / torch.linalg.vector_norm(truth, dtype=torch.float64))


def errors(inputs: Inputs, logprobs: Tensor | None, truth: Truth) -> dict[str, float]:
    """Errors of a step that has just run, by name."""
    assert inputs.hidden.grad is not None
    assert inputs.weight.grad is not None
    found = {
        "error_hidden": relative_error(inputs.hidden.grad, truth.d_hidden),
        "error_weight": relative_error(inputs.weight.grad, truth.d_weight),
    }
    if logprobs is not None:
        found["error_logprobs"] = relative_error(logprobs, truth.logprobs)
    return found
