"""A stand-in for NCCL, which needs GPUs: the same group through gloo, for real, between processes.

A real vLLM server on a CPU uses it where it is started with `WeightProbe` of this file as its
extension: that import comes before the server's engine for weights. Where the environment names a
library for it, CUDA's runtime is replaced too.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore, ProcessGroupGloo

from recap_fast.rollout import nccl_group
from recap_fast.rollout.server_worker import WeightProbe as WeightProbe
from tests.rollout import cuda_stand_in

EXTENSION = f"{__name__}.WeightProbe"


class GlooGroup:
    def __init__(self, group: Any) -> None:
        self._group = group

    def broadcast(self, tensor: torch.Tensor) -> None:
        self._group.broadcast(tensor, 0).wait()

    def abort(self) -> None:
        pass  # a broadcast ends with its own bound, below


def new_unique_id() -> bytes:
    handle, path = tempfile.mkstemp(prefix="gloo-")
    os.close(handle)
    Path(path).unlink()
    atexit.register(Path(path).unlink, missing_ok=True)
    return path.encode()


def join(unique_id: bytes, *, rank: int, world_size: int, device: torch.device) -> GlooGroup:
    assert device.type == "cpu"
    store = FileStore(unique_id.decode(), world_size)
    return GlooGroup(ProcessGroupGloo(store, rank, world_size, timedelta(seconds=60)))


nccl_group.join = join  # type: ignore[assignment]
if library := os.environ.get("CUDA_STAND_IN"):
    cuda_stand_in.use(Path(library) / cuda_stand_in.LIBRARY)
