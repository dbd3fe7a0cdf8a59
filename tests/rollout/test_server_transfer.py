"""vLLM's side of a transfer, on a layer alone and without a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from recap_fast.rollout.server_transfer import TransferEngine


class Packing(QuantizeMethodBase):
    """What is computed with is not what is loaded: it has the other sign."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.data.neg_()


class Layer(nn.Module):
    """Two weights of one size, which vLLM takes over once it has counted the values of both."""

    quant_method = Packing()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))

    def load_weights(self, tensors: Any) -> set[str]:
        loaded = set()
        for name, tensor in tensors:
            parameter = getattr(self, name)
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            loaded.add(name)
        return loaded


@pytest.mark.parametrize("is_ended", [True, False])
def test_what_was_left_half_done_is_no_part_of_the_next_update(is_ended: bool) -> None:
    model = Layer()
    record_metadata_for_reloading(model)
    engine: Any = TransferEngine.__new__(TransferEngine)
    engine.model, engine.model_config = model, SimpleNamespace(dtype=torch.float32)
    engine.start_weight_update()
    with pytest.raises(RuntimeError, match="1 of 2 parameters got no weight: b"):
        engine._load([("a", torch.full((2, 3), 1.0))])
    if is_ended:  # as the next run asks for, where vLLM has an update open
        engine.finish_weight_update()
    engine.start_weight_update()
    engine._load([("a", torch.full((2, 3), 2.0)), ("b", torch.full((2, 3), 2.0))])
    engine.finish_weight_update()
    assert torch.equal(model.a, torch.full((2, 3), -2.0))
    assert torch.equal(model.b, torch.full((2, 3), -2.0))
