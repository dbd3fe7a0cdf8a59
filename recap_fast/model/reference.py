"""The frozen model that the KL term keeps a policy of adapters near: its own base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recap_fast.model.lora import without_adapters
from recap_fast.model.policy import Head, Policy

if TYPE_CHECKING:
    from recap_fast.model.batch import PackedBatch


@dataclass(frozen=True, slots=True)
class BasePolicy:
    """What a policy is without its adapters: a reference that takes no memory of its own. For
    passes without gradients."""

    policy: Policy

    @property
    def head(self) -> Head:
        return self.policy.head

    def score(self, batch: PackedBatch, function: Callable[[Tensor], Any]) -> Any:
        """As `Policy.score`."""
        with without_adapters(self.policy.model):
            return self.policy.score(batch, function)
