"""vLLM's side of a transfer, on a layer alone and without a server."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from recap_fast.rollout import nccl_group
from recap_fast.rollout.sent_weights import BroadcastWeights, GroupInfo, in_thread, place
from recap_fast.rollout.server_transfer import TransferEngine

CPU = torch.device("cpu")


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


class SilentGroup:
    """Whose trainer sends nothing: a broadcast ends once the group is aborted, and no sooner.
    NCCL's then returns, with whatever the memory holds, or raises."""

    def __init__(self, *, raises: bool) -> None:
        self.aborted = threading.Event()
        self._raises = raises

    def broadcast(self, tensor: torch.Tensor) -> None:
        assert self.aborted.wait(60)
        if self._raises:
            raise RuntimeError("NCCL error: unhandled system error")

    def abort(self) -> None:
        self.aborted.set()


def receiver(timeout: float) -> Any:
    """vLLM's side of a broadcast of one weight."""
    engine: Any = TransferEngine.__new__(TransferEngine)
    engine.device, engine._timeout = CPU, timeout
    engine.parallel_config = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    engine.model = nn.Linear(3, 2, bias=False)
    engine.model.load_weights = lambda tensors: {name for name, _ in tensors}
    return engine


def one_weight() -> BroadcastWeights:
    index: list[list[Any]] = []
    return BroadcastWeights(place(index, "weight", torch.float32, (2, 3)), 16, index)


@pytest.mark.parametrize("raises", [False, True])
def test_a_trainer_that_sends_nothing_is_given_up(raises: bool) -> None:
    engine = receiver(0.2)
    engine._group = group = SilentGroup(raises=raises)
    receiving = in_thread(lambda: engine.receive_weights(one_weight()), "receiving")
    with pytest.raises(RuntimeError, match=r"did not send its weights within 0\.2 s"):
        receiving.result(30)
    assert group.aborted.is_set()
    with pytest.raises(RuntimeError, match="is in no group of the trainer's"):
        engine.receive_weights(one_weight())


def test_a_group_that_was_in_time_stays() -> None:
    engine = receiver(0.2)
    engine._group = group = SilentGroup(raises=False)
    group.broadcast = lambda tensor: None  # type: ignore[method-assign]
    engine.receive_weights(one_weight())
    assert not group.aborted.wait(0.5)
    assert engine._group is group


def test_a_group_that_does_not_come_about_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(nccl_group, "join", lambda *_, **__: never.wait(60))
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    engine = receiver(600.0)
    joining = in_thread(
        lambda: engine.init_transfer_engine(GroupInfo("", 1, 2, 0.2, cumem=None)), "joining"
    )
    with pytest.raises(RuntimeError, match=r"group was not complete within 0\.2 s"):
        joining.result(30)
    assert engine._group is None
    never.set()


def test_a_side_that_sets_nccl_differently_does_not_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_group, "join", lambda *_, **__: pytest.fail("it joins"))
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    with pytest.raises(RuntimeError, match="is unset in the server and 0 in the trainer"):
        receiver(1.0).init_transfer_engine(GroupInfo("", 1, 2, 1.0, cumem="0"))
