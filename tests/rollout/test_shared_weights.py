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
from recap_fast.rollout.server_client import ServerTrouble
from recap_fast.rollout.server_worker import digest
from recap_fast.rollout.shared_weights import (
    DIGEST_COLUMNS,
    Comparison,
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_digests_know_one_zero(dtype: torch.dtype) -> None:
    """A product with a one-hot vector has no sign of it, and none of what is subnormal."""
    zero = torch.tensor([1.0, 0.0], dtype=dtype)
    smallest = torch.finfo(dtype).tiny
    for value in (-0.0, smallest / 2, -smallest / 2):
        assert digest(zero) == digest(torch.tensor([1.0, value], dtype=dtype))
    for value in (smallest, -smallest):
        assert digest(zero) != digest(torch.tensor([1.0, value], dtype=dtype))


@pytest.mark.parametrize(
    ("shown", "is_enough"),
    [
        ({"layers.0.q", "layers.1.q", "head"}, True),  # no row has images
        ({"layers.0.q", "layers.1.q"}, True),
        ({"layers.0.q"}, False),
        ({"visual.0.q", "visual.1.q", "visual.2.q", "mlp.experts.0.up", "head"}, False),
        (set(), False),
    ],
)
def test_most_of_the_weights_must_be_comparable(shown: set[str], is_enough: bool) -> None:
    names = [
        "layers.0.q", "layers.1.q", "head",
        "visual.0.q", "visual.1.q", "visual.2.q", "visual.3.q", "mlp.experts.0.up",
    ]  # fmt: skip
    wanted = dict.fromkeys(names, "aa")
    found = {name: wanted[name] for name in shown}
    if is_enough:
        assert Comparison().differing("http://there", found, wanted) == []
    else:
        with pytest.raises(ServerTrouble, match=f"shows {len(shown)} of 8 weights, too few"):
            Comparison().differing("http://there", found, wanted)


def test_what_was_compared_once_is_compared_always() -> None:
    comparison, wanted = Comparison(), {"a": "aa", "b": "bb", "c": "cc"}
    assert comparison.differing("http://there", {"a": "aa", "b": "bb"}, wanted) == []
    assert comparison.differing("http://there", {**wanted, "c": "dd"}, wanted) == ["c"]
    with pytest.raises(ServerTrouble, match="b cannot be read back"):
        comparison.differing("http://there", {"a": "aa", "c": "cc"}, wanted)
