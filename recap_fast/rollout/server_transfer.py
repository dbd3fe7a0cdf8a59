"""vLLM's side of every weight transfer. Only vLLM imports this file."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from recap_fast.rollout import nccl_group
from recap_fast.rollout.sent_weights import (
    BroadcastWeights,
    DeviceWeights,
    Group,
    GroupInfo,
    SharedWeights,
    in_thread,
    shared_tensors,
    views,
)
from recap_fast.rollout.weight_patch import HostCopy

_KINDS: Mapping[str, type[SharedWeights | DeviceWeights | BroadcastWeights]] = {
    "shared_memory": SharedWeights,
    "ipc": DeviceWeights,
    "nccl": BroadcastWeights,
}


class TransferEngine(WeightTransferEngine):
    """Takes a version of the weights over, in whichever way the trainer sends it.

    All parts of a model are loaded in one call, and a parameter that got nothing is an error:
    vLLM would keep its old values with a warning.
    """

    init_info_cls = GroupInfo
    update_info_cls = SharedWeights  # or another of `_KINDS`
    _group: Group | None = None
    _timeout = 0.0
    _copy: HostCopy | None = None

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Joins a group, for transfers that need one."""
        self.shutdown()
        init_info.check()
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        work = partial(
            nccl_group.join,
            base64.b64decode(init_info.unique_id, validate=True),
            rank=init_info.rank + rank,
            world_size=init_info.world_size,
            device=self.device,
        )
        self._timeout = init_info.timeout
        try:
            self._group = in_thread(work, "joining the trainer's group").result(self._timeout)
        except TimeoutError:
            raise RuntimeError(
                f"the trainer's group was not complete within {self._timeout:g} s"
            ) from None

    def start_weight_update(self) -> None:
        # Of layers that a failed transfer, or a trainer that died, has left half loaded: vLLM would
        # count that as loaded, and complete them before they are whole.
        finalize_layerwise_reload(self.model, self.model_config)
        initialize_layerwise_reload(self.model)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        """Raises `ValueError` for what is no update of ours."""
        given = dict(update_dict)
        kind = _KINDS.get(given.pop("transfer", ""))
        if kind is None:
            raise ValueError(f"wanted a transfer of {sorted(_KINDS)}, got {update_dict!r:.200}")
        try:
            return kind(**given)
        except TypeError as error:
            raise ValueError(f"{kind.__name__}: {error}") from error

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        # Not the base's, which ends in a synchronisation that a CPU has not.
        self.receive_weights(self.parse_update_info(dict(update_info)))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Any) -> None:
        if isinstance(update_info, BroadcastWeights):
            self._receive_broadcast(update_info)
            return
        if isinstance(update_info, DeviceWeights):
            with update_info.opened(self.device) as memory:
                # Copies: a layer that vLLM completes at the end still has them then.
                self._load(
                    (name, tensor.to(self.device, copy=True))
                    for name, tensor in views(update_info.index, memory)
                )
            return
        self._load((name, t.to(self.device)) for name, t in shared_tensors(update_info))

    def _receive_broadcast(self, weights: BroadcastWeights) -> None:
        if self._group is None:
            raise RuntimeError("the server is in no group of the trainer's")
        group, self._group = self._group, None  # of no use after a failure
        self._copy = self._copy or HostCopy()
        late = threading.Event()

        def give_up() -> None:
            late.set()
            group.abort()

        timer = threading.Timer(self._timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._load(self._copy.receive(weights, group, self.device))
        except BaseException as error:
            group.abort()
            if late.is_set():  # what an abort does to a broadcast says nothing of the reason
                raise self._too_late() from error
            raise
        finally:
            timer.cancel()
        if late.is_set():
            raise self._too_late()
        self._group = group

    def _too_late(self) -> RuntimeError:
        return RuntimeError(f"the trainer did not send its weights within {self._timeout:g} s")

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        wanted = {name for name, _ in self.model.named_parameters()}
        loaded = self.model.load_weights(tensors)
        if loaded is not None and (missing := wanted - loaded):
            shown = ", ".join(sorted(missing)[:5])
            raise RuntimeError(f"{len(missing)} of {len(wanted)} parameters got no weight: {shown}")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None
