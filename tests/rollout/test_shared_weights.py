"""Weights through memory that two processes share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recap_fast.rollout.sent_weights import SharedWeights, shared_tensors
from recap_fast.rollout.server_worker import digest
from recap_fast.rollout.shared_weights import (
    DIGEST_COLUMNS,
    SharedMemoryWeights,
    WrittenWeights,
    sample_columns,
)

SHARED = Path("/dev/shm")  # noqa: S108 (looked at only)
READER = """
import json, sys
import torch
from recap_fast.rollout.sent_weights import SharedWeights, shared_tensors
info = json.loads(sys.argv[1])
info.pop("transfer")
weights = SharedWeights(**info)
for name, tensor in shared_tensors(weights):
    print(name, str(tensor.dtype), list(tensor.shape), tensor.double().sum().item())
"""


def some_weights(scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (), "empty": (0, 4), "d": (2, 3, 4)}
    return {n: scale * torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def opened(weights: WrittenWeights) -> SharedWeights:
    info = json.loads(json.dumps(weights.update_info))
    assert info.pop("transfer") == "shared_memory"
    return SharedWeights(**info)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_reads_what_another_wrote(dtype: torch.dtype) -> None:
    sender = SharedMemoryWeights(dtype)
    written = sender.write(some_weights().items(), version=7)
    assert written.version == 7
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(written.update_info)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    wanted = [
        f"{name} {dtype} {list(t.shape)} {t.to(dtype).double().sum().item()}"
        for name, t in some_weights().items()
    ]
    assert done.stdout.splitlines() == wanted
    sender.close()


def test_the_next_version_takes_the_place_of_the_last() -> None:
    sender = SharedMemoryWeights(torch.float32)
    sender.write(some_weights().items(), version=1)
    size = os.fstat(sender._file._descriptor).st_size
    second = sender.write(some_weights(2.0).items(), version=2)
    assert os.fstat(sender._file._descriptor).st_size == size
    for name, tensor in shared_tensors(opened(second)):
        assert torch.equal(tensor, some_weights(2.0)[name])
    sender.close()


def test_nothing_is_left_in_any_file_system() -> None:
    before = set(SHARED.iterdir())
    sender = SharedMemoryWeights(torch.float32)
    written = sender.write(some_weights().items(), version=1)
    assert set(SHARED.iterdir()) <= before
    sender.close()
    with pytest.raises(RuntimeError, match="cannot be read"):
        next(shared_tensors(opened(written)))


def test_a_server_opens_nothing_but_weights(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not for whoever reaches the control routes")
    with secret.open("rb") as file:
        asked = SharedWeights(pid=os.getpid(), descriptor=file.fileno(), index=[])
        with pytest.raises(RuntimeError, match="it is another file"):
            asked.open()


def test_digests_tell_every_value_of_the_columns_apart() -> None:
    sender = SharedMemoryWeights(torch.bfloat16)
    weights = some_weights()
    first = sender.write(weights.items(), version=1)
    for name, tensor in weights.items():
        if tensor.numel():
            changed = {**weights, name: tensor + 0.5}
            second = sender.write(changed.items(), version=2)
            differing = {n for n in weights if first.digests[n] != second.digests[n]}
            assert differing == {name}
    sender.close()


def test_digests_are_of_what_the_engine_computes_in() -> None:
    weight = torch.randn(4, 6)
    columns = sample_columns(weight, DIGEST_COLUMNS)
    assert columns.shape == (4, DIGEST_COLUMNS)
    assert digest(columns.bfloat16()) == digest(columns.bfloat16().clone())
    assert digest(columns.bfloat16()) != digest(columns)
