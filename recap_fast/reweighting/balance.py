"""Weights that act on objectives of equal strength.

A weight between a half and two decides nothing between objectives whose gradients differ by ten.
Here each objective's weight is divided by how strongly its gradient has pulled of late.

Like a reweighter this works on buffers of fixed size on the device and never reads one back.
Shapes: K objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recap_fast.reweighting.base import checked_int

DECAY = 0.9
"""Of the running mean of norms: the norm of one step's gradient is noisy, most of all a reward's,
whose tokens pull in opposite directions."""
TIE = 0.05
"""How far apart the factors of objectives are that have no norm yet. At equal weights two rewards
that a rollout earns one of cancel each other in it, and neither's gradient can be told."""
MOST = 10.0
"""Factors lie within 1 / MOST and MOST before they are scaled to mean 1: an objective with hardly a
gradient left must not be blown up without end."""


class GradientBalance:
    """Divides weights by the running mean of each objective's gradient norm.

    Attributes (static buffers; clone to keep):
        means: [K] float64, running mean of the norms; 0 before the first.
        weights: [K] float32: what `weigh` returned last.
        factors: [K] float32: what it multiplied by.

    Args:
        num_objectives: K.
        device: where the buffers live; None: torch's default device.

    Raises:
        ValueError: num_objectives is no integer >= 1.
    """

    def __init__(self, num_objectives: int, device: torch.device | str | None = None) -> None:
        k = checked_int("num_objectives", num_objectives)
        self.means = torch.zeros(k, dtype=torch.float64, device=device)
        self.weights = torch.ones(k, dtype=torch.float32, device=device)
        self.factors = torch.ones(k, dtype=torch.float32, device=device)
        self._unknown = torch.linspace(1 - TIE, 1 + TIE, k, device=device)
        self._counts = torch.zeros(k, dtype=torch.int64, device=device)

    @torch.no_grad()
    def observe(self, norms: Tensor) -> None:
        """Take in the norms of a step, [K] floating, such as `PolicyLossOutput.gradient_norms`.

        One that is 0, NaN or infinite leaves the objective's mean as it was: where all rewards of
        a step are equal there is nothing to balance, and the mean is that of the steps with one.
        """
        if norms.shape != self.means.shape or not norms.is_floating_point():
            wanted = list(self.means.shape)
            raise ValueError(
                f"norms must be {wanted} floating, got {list(norms.shape)} {norms.dtype}"
            )
        norms = norms.detach().double()
        seen = norms.isfinite() & (norms > 0)
        self._counts.add_(seen)
        # The plain mean until there are as many as the decay remembers.
        share = (1 / self._counts.clamp(min=1).double()).clamp(min=1 - DECAY)
        moved = torch.lerp(self.means, norms.where(seen, 0.0), share)
        self.means.copy_(moved.where(seen, self.means))

    @torch.no_grad()
    def weigh(self, weights: Tensor) -> Tensor:
        """[K] float32 of `weights` [K], the same mean: divided by the means of the norms observed.

        An objective without a norm yet counts as one of about middling strength (`TIE`).
        """
        ready = self._counts > 0
        logs = self.means.where(ready, 1.0).log()
        middle = logs.where(ready, 0.0).sum() / ready.sum().clamp(min=1)
        factors = (middle - logs).exp().clamp(1 / MOST, MOST).where(ready, self._unknown.double())
        total = (weights * factors).sum()
        scale = torch.where(total > 0, weights.sum() / total, 1.0)  # all weights may be 0
        self.factors.copy_(factors * scale)
        self.weights.copy_(weights * self.factors)
        return self.weights.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later `weigh` depends on; copies."""
        return {"means": self.means.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state is of another K, of something else, or damaged.
        """
        for name, buffer in (("means", self.means), ("counts", self._counts)):
            given = state.get(name)
            if given is None or given.shape != buffer.shape or given.dtype != buffer.dtype:
                got = "none" if given is None else f"{list(given.shape)} {given.dtype}"
                wanted = f"{list(buffer.shape)} {buffer.dtype}"
                raise ValueError(f"balance: wanted {name} {wanted}, got {got}")
            if not (given.isfinite() & (given >= 0)).all():
                raise ValueError(f"balance: {name} below 0 or not finite: {given.tolist()}")
        self.means.copy_(state["means"])
        self._counts.copy_(state["counts"])
