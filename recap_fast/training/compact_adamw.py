"""The optimizer of a run: torch's fused AdamW, or ours with moments that take less memory.

State of a parameter, by `optimizer.state`:
    float32   step [], exp_avg and exp_avg_sq of the parameter's shape
    bfloat16  the same, the moments in bfloat16 (rounded stochastically)
    8bit      step [], exp_avg and exp_avg_sq as uint8 codes, exp_avg_scale and exp_avg_sq_scale
              [rows, ceil(columns / 256)] float32; float32 moments of vectors and of what is small
Each in shards where the parameter is.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from recap_fast.config import OptimizerConfig
from recap_fast.ops.adamw import BLOCK, adamw_8bit, adamw_bfloat16, rounding_key
from recap_fast.ops.adamw_step import AdamWStep

SMALLEST_QUANTISED = 4096
"""Values of a parameter that is kept in 8 bits, at least; as bitsandbytes and torchao have it."""


def make_optimizer(
    parameters: Iterable[Tensor], settings: OptimizerConfig, seed: int
) -> torch.optim.Optimizer:
    """AdamW with the state that the settings want. Its attributes `grad_scale` and `found_inf`, []
    float32, are set before each step: gradients are divided by the one, and where the other is 1
    the step changes nothing.

    Args:
        parameters: float32, in shards or not; their order is part of the rounding.
        seed: of stochastic rounding.
    """
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.betas[0], settings.betas[1]),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.state == "float32":
        return torch.optim.AdamW(parameters, fused=True, **common)
    return CompactAdamW(parameters, state=settings.state, seed=seed, **common)


def is_quantised(shape: torch.Size) -> bool:
    """Whether 8 bits are used for a parameter of that, whole, shape. A vector has no rows for
    blocks to lie in."""
    return len(shape) > 1 and prod(shape) >= SMALLEST_QUANTISED


def new_state(parameter: Tensor, state: str) -> dict[str, Tensor]:
    """A parameter's state before the first step.

    Args:
        state: as `optimizer.state`.
    """
    found = {"step": torch.zeros((), dtype=torch.float32, device=_local(parameter).device)}
    if state == "8bit" and is_quantised(parameter.shape):
        blocks = -(-prod(parameter.shape[1:]) // BLOCK)
        for name in ("exp_avg", "exp_avg_sq"):
            found[name] = _zeros(parameter, parameter.shape, torch.uint8)
            scale = torch.Size([parameter.shape[0], blocks])
            found[f"{name}_scale"] = _zeros(parameter, scale, torch.float32)
        return found
    dtype = torch.bfloat16 if state == "bfloat16" else torch.float32
    return found | {
        name: _zeros(parameter, parameter.shape, dtype) for name in ("exp_avg", "exp_avg_sq")
    }


class CompactAdamW(torch.optim.Optimizer):
    """AdamW with moments in bfloat16 or 8 bits beside float32 parameters. Nothing waits for the
    device.

    Args:
        state: "bfloat16" or "8bit".
        seed: of stochastic rounding.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, state: str, seed: int, **settings: Any
    ) -> None:
        super().__init__(parameters, settings)
        self._kind = state
        everything = [p for group in self.param_groups for p in group["params"]]
        self._keys = {p: rounding_key(seed, i) for i, p in enumerate(everything)}
        self._firsts: dict[Tensor, int] = {}
        device = _local(everything[0]).device
        self.grad_scale = torch.ones((), device=device)
        self.found_inf = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Of all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            for parameter in active:
                if not self.state[parameter]:
                    self.state[parameter] = new_state(parameter, self._kind)
            if active:
                steps = [self.state[parameter]["step"] for parameter in active]
                torch._foreach_add_(steps, [1 - self.found_inf] * len(steps))
            beta1, beta2 = group["betas"]
            told = AdamWStep(
                group["lr"], beta1, beta2, group["eps"], group["weight_decay"],
                self.grad_scale, self.found_inf,
            )  # fmt: skip
            for parameter in active:
                self._update(parameter, told)

    def _update(self, parameter: Tensor, told: AdamWStep) -> None:
        state = {name: _local(tensor) for name, tensor in self.state[parameter].items()}
        assert parameter.grad is not None
        value, gradient, number = _local(parameter), _local(parameter.grad), state.pop("step")
        if self._kind == "bfloat16":
            adamw_bfloat16(
                value, gradient, state["exp_avg"], state["exp_avg_sq"], number, told,
                key=self._keys[parameter], first=self._first(parameter),
            )  # fmt: skip
        elif is_quantised(parameter.shape):
            adamw_8bit(
                value, gradient, state["exp_avg"], state["exp_avg_scale"], state["exp_avg_sq"],
                state["exp_avg_sq_scale"], number, told,
            )  # fmt: skip
        else:
            _fused(value, gradient, state["exp_avg"], state["exp_avg_sq"], number, told)

    def _first(self, parameter: Tensor) -> int:
        """Of the values here, the first one's number in the whole parameter."""
        if not isinstance(parameter, DTensor):
            return 0
        if parameter not in self._firsts:
            (chunk,) = parameter.__create_chunk_list__()
            assert not any(chunk.offsets[1:]), "shards are of rows"
            self._firsts[parameter] = chunk.offsets[0] * prod(parameter.shape[1:])
        return self._firsts[parameter]


def _fused(
    value: Tensor, gradient: Tensor, m: Tensor, v: Tensor, number: Tensor, told: AdamWStep
) -> None:
    # torch counts the step for itself.
    adamw(
        [value], [gradient], [m], [v], [], [number - 1], fused=True,
        grad_scale=told.grad_scale, found_inf=told.found_inf, amsgrad=False, maximize=False,
        lr=told.lr, beta1=told.beta1, beta2=told.beta2, eps=told.eps,
        weight_decay=told.weight_decay,
    )  # fmt: skip


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _zeros(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Of a shape with the parameter's rows, in shards as those are, and where they are."""
    part = _local(parameter)
    zeros = torch.zeros(len(part), *shape[1:], dtype=dtype, device=part.device)
    if not isinstance(parameter, DTensor):
        return zeros
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    made = DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False,
        shape=shape, stride=stride,
    )  # fmt: skip
    return made.to(part.device)  # offloaded ones: `from_local` moves to the mesh's device
