"""A GPU's memory between two processes. There is no GPU here: a library in C stands in for CUDA's
runtime (cuda_stand_in.c), called as that one is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from recap_fast.rollout import cuda_memory
from recap_fast.rollout.cuda_memory import ExportedMemory, opened
from recap_fast.rollout.shared_weights import DeviceMemoryWeights
from recap_fast.types import WeightSyncError
from tests.rollout import cuda_stand_in
from tests.rollout.test_shared_weights import some_weights

CPU = torch.device("cpu")
READER = """
import json, sys
import torch
from tests.rollout import cuda_stand_in
from recap_fast.rollout.sent_weights import DeviceWeights, views
cuda_stand_in.use(sys.argv[1])
info = json.loads(sys.argv[2])
info.pop("transfer")
weights = DeviceWeights(**info)
for _ in range(20):  # as often as a run has steps, and more than are open at a time
    with weights.opened(torch.device("cpu")) as memory:
        found = [
            [name, str(tensor.dtype), list(tensor.shape), tensor.double().sum().item()]
            for name, tensor in views(weights.index, memory)
        ]
print(json.dumps(found))
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = cuda_stand_in.build(tmp_path)
    if found is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("CUDA_STAND_IN", str(tmp_path))
    cuda_stand_in.use(found, monkeypatch.setattr)
    return found


def test_a_process_reads_each_version_where_it_lies(library: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in some_weights().items()}
    allocate = partial(ExportedMemory, device=CPU)
    sender = DeviceMemoryWeights(torch.bfloat16, shapes, allocate)
    for version, scale in enumerate((1.0, 2.0)):
        weights = some_weights(scale)
        written = sender.write(reversed(weights.items()), version)
        done = subprocess.run(
            [sys.executable, "-c", READER, str(library), json.dumps(written.update_info)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout) == [
            [n, "torch.bfloat16", list(t.shape), t.bfloat16().double().sum().item()]
            for n, t in weights.items()
        ]
        assert written.digests.keys() == shapes.keys()
    sender.close()


def test_a_weight_that_nobody_spoke_of_is_refused(library: Path) -> None:
    allocate = partial(ExportedMemory, device=CPU)
    sender = DeviceMemoryWeights(torch.float32, {"a": (2,)}, allocate)
    with pytest.raises(WeightSyncError, match=r"a: wanted \[2\], got \[3\]"):
        sender.write([("a", torch.ones(3))], 1)
    with pytest.raises(WeightSyncError, match="b: wanted no such weight"):
        sender.write([("b", torch.ones(2))], 1)
    sender.close()


def test_memory_that_is_not_there_or_not_to_be_reached(library: Path) -> None:
    with pytest.raises(RuntimeError, match=r"sharing 0\.00 GiB of cpu: out of memory \(cudaMalloc"):
        ExportedMemory(2**20 + 1, CPU)
    with (
        pytest.raises(RuntimeError, match=r"transfer=shared_memory.*invalid device context"),
        opened(b"elsewhere".ljust(64, b"\0"), 8, CPU),
    ):
        pass


def test_handles_are_of_cudas_size() -> None:
    with pytest.raises(RuntimeError, match="64 bytes, got 5"), opened(b"short", 8, CPU):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="the runtime is there")
def test_without_cuda_the_reason_is_given() -> None:
    assert "CUDA_STAND_IN" not in os.environ
    with pytest.raises(RuntimeError, match="no CUDA runtime"):
        cuda_memory._runtime()
