"""A group of the trainer and its servers, in NCCL. Both sides import this file; it needs vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator


class NcclGroup:
    """See `Group`. The trainer is rank 0."""

    def __init__(self, communicator: PyNcclCommunicator) -> None:
        self._communicator = communicator

    def broadcast(self, tensor: Tensor) -> None:
        # vLLM's own default is a stream that it makes the thread's, behind which nothing waits.
        stream = torch.cuda.current_stream(tensor.device)
        self._communicator.broadcast(tensor, src=0, stream=stream)

    def abort(self) -> None:
        self._communicator.destroy()


def new_unique_id() -> bytes:
    """That a group is known by. It travels to the servers with the key's protection; vLLM's other
    way to meet, through a store at a port of the trainer's, has servers unpickle what lies there.
    """
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return bytes(NCCLLibrary().ncclGetUniqueId().internal)


def join(unique_id: bytes, *, rank: int, world_size: int, device: torch.device) -> NcclGroup:
    """Waits for all others of the group, without a bound.

    Raises:
        RuntimeError: NCCL cannot be loaded, or vLLM is told not to use it.
    """
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    torch.accelerator.set_device_index(device.index or 0)  # of this thread
    communicator = uid_init_process_group(unique_id, rank, world_size, device)
    if communicator.disabled:
        raise RuntimeError("vLLM is told not to use NCCL (VLLM_DISABLE_PYNCCL)")
    return NcclGroup(communicator)
