"""Patches: what is found and sent, and that a copy with it is the new version to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from recap_fast.rollout import weight_patch
from recap_fast.rollout.sent_weights import BroadcastWeights, SharedWeights
from recap_fast.rollout.shared_weights import MemoryFile, SharedMemoryWeights
from recap_fast.rollout.weight_patch import Changes, HostCopy, differing

CPU = torch.device("cpu")
Weights = Mapping[str, Tensor]


class Pieces:
    """A group of one, which receives what lies in a trainer's memory."""

    def __init__(self, memory: Tensor) -> None:
        self.left = memory

    def broadcast(self, tensor: Tensor) -> None:
        tensor.copy_(self.left[: len(tensor)])
        self.left = self.left[len(tensor) :]

    def abort(self) -> None:
        raise AssertionError


class Link:
    """A trainer's and a server's copies of the weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.store, self.file = SharedMemoryWeights(dtype), MemoryFile()
        self.copy = HostCopy()
        self.before: SharedWeights | None = None
        self.index: list[list[Any]] = []
        self.nbytes = 0

    def write(self, weights: Weights, version: int) -> SharedWeights | None:
        """The patch."""
        changes = Changes(self.before, self.file) if self.before is not None else None
        written = self.store.write(weights.items(), version, changes.see if changes else None)
        self.before = SharedWeights(
            **{k: v for k, v in written.update_info.items() if k != "transfer"}
        )
        return changes.patch() if changes else None

    def send(self, memory: SharedWeights, version: str, against: str | None) -> dict[str, Tensor]:
        self.index, self.nbytes = memory.index, len(memory.bytes())
        told = BroadcastWeights(self.nbytes, 100, memory.index, version, against)
        pieces = Pieces(memory.bytes())
        try:
            return {name: t.clone() for name, t in self.copy.receive(told, pieces, CPU)}
        finally:
            assert not len(pieces.left), "somebody else waits for the rest"

    def first(self, weights: Weights) -> None:
        assert self.write(weights, 1) is None
        assert self.before is not None
        assert same(self.send(self.before, "1", None), stored(weights, self.dtype))

    def next(self, weights: Weights, version: int = 2) -> None:
        patch = self.write(weights, version)
        assert patch is not None
        found = self.send(patch, str(version), str(version - 1))
        assert same(found, stored(weights, self.dtype))

    def close(self) -> None:
        self.store.close()
        self.file.close()


@pytest.fixture(params=[torch.bfloat16, torch.float32])
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    found = Link(request.param)
    yield found
    found.close()


def stored(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


def same(found: Weights, wanted: Weights) -> bool:
    def raw(tensor: Tensor) -> bytes:
        return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    assert list(found) == list(wanted)
    return all(
        (found[n].dtype, found[n].shape, raw(found[n])) == (t.dtype, t.shape, raw(t))
        for n, t in wanted.items()
    )


def some_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (30, 50), "b": (70,), "scalar": (), "empty": (0, 4), "d": (4, 5, 6)}
    return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def changed(weights: Weights, share: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    picks = {n: torch.rand(t.shape, generator=generator) < share for n, t in weights.items()}
    return {n: torch.where(picks[n], t + 1, t) for n, t in weights.items()}


def test_random_changes_arrive_version_by_version(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_patch, "_CHUNK", 64)  # most weights have several
    weights = some_weights()
    link.first(weights)
    for version in range(2, 6):
        weights = changed(weights, 0.05, version)
        link.next(weights, version)
        assert "positions in a" in [name for name, *_ in link.index]
        assert "empty" not in [name for name, *_ in link.index]


def test_nothing_is_sent_where_nothing_changed(link: Link) -> None:
    link.first(some_weights())
    link.next(some_weights(), 2)
    assert (link.nbytes, link.index) == (0, [])
    link.next(changed(some_weights(), 0.1, 0), 3)
    assert link.nbytes > 0


def test_where_all_changed_all_is_sent_as_it_is(link: Link) -> None:
    link.first(some_weights())
    link.next({name: tensor + 1 for name, tensor in some_weights().items()})
    assert [name for name, *_ in link.index] == ["a", "b", "scalar", "d"]


def test_bits_are_compared_not_numbers(link: Link) -> None:
    weights = some_weights()
    weights["a"][0, :4] = torch.tensor([0.0, float("nan"), 1.0, float("inf")])
    link.first(weights)
    link.next(weights)
    assert link.nbytes == 0, "a NaN that stays is no change"
    after = {**weights, "a": weights["a"].clone()}
    after["a"][0, 0] = -0.0
    after["a"][0, 2] = float("nan")
    link.next(after, 3)
    assert [entry[:3] for entry in link.index] == [
        ["positions in a", "int32", [2]],
        ["a", str(link.dtype).removeprefix("torch."), [2]],
    ]


def test_weights_may_lie_anyhow_and_be_one(link: Link) -> None:
    def weights(table: Tensor) -> dict[str, Tensor]:
        return {"embedding": table, "turned": table.T, "every other": table[:, ::2], "head": table}

    table = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    link.first(weights(table.clone()))
    table[3, 4] += 1
    link.next(weights(table))
    assert [shape for _, _, shape, _ in link.index] == [[1]] * 8


@pytest.mark.parametrize("limit", [599, 600])
def test_positions_are_of_the_smallest_kind_that_holds_them(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_patch, "_INT32_VALUES", limit)
    old = torch.zeros(20, 30)
    new = old.clone()
    new[19, 29] = 1
    positions = differing(old, new)
    assert positions is not None
    assert positions.dtype == (torch.int64 if limit < 600 else torch.int32)
    assert positions.tolist() == [599]


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 20), (torch.float32, 30)])
def test_a_weight_is_whole_where_its_patch_would_be_larger(dtype: torch.dtype, most: int) -> None:
    old = torch.zeros(60, dtype=dtype)
    for count, wanted in ((most, list(range(most))), (most + 1, None)):
        new = old.clone()
        new[:count] = 1
        positions = differing(old, new)
        assert (None if positions is None else positions.tolist()) == wanted


@pytest.mark.parametrize("change", ["less", "more", "shape", "order"])
def test_other_weights_than_before_make_no_patch(link: Link, change: str) -> None:
    weights = some_weights()
    link.first(weights)
    other = {
        "less": {n: t for n, t in weights.items() if n != "d"},
        "more": {**weights, "e": torch.ones(3)},
        "shape": {**weights, "a": weights["a"].T},
        "order": dict(reversed(weights.items())),
    }[change]
    assert link.write(other, 2) is None


def test_a_patch_of_another_version_is_refused_and_taken_to_its_end(link: Link) -> None:
    link.first(some_weights())
    patch = link.write(changed(some_weights(), 0.1, 1), 2)
    assert patch is not None
    with pytest.raises(RuntimeError, match="since version 0, and the server holds 1"):
        link.send(patch, "2", "0")
    assert same(link.send(patch, "2", "1"), stored(changed(some_weights(), 0.1, 1), link.dtype))


def test_a_patch_that_breaks_off_leaves_no_version(link: Link) -> None:
    link.first(some_weights())
    patch = link.write(changed(some_weights(), 0.1, 1), 2)
    assert patch is not None
    told = BroadcastWeights(len(patch.bytes()), 100, patch.index, "2", "1")

    class Breaking(Pieces):
        def broadcast(self, tensor: Tensor) -> None:
            if len(self.left) < told.nbytes - 200:
                raise RuntimeError("the trainer is gone")
            super().broadcast(tensor)

    with pytest.raises(RuntimeError, match="is gone"):
        list(link.copy.receive(told, Breaking(patch.bytes()), CPU))
    with pytest.raises(RuntimeError, match="the server holds none"):
        link.send(patch, "2", "1")
    assert link.before is not None
    wanted = stored(changed(some_weights(), 0.1, 1), link.dtype)
    assert same(link.send(link.before, "2", None), wanted)


def test_a_server_that_is_to_keep_nothing_keeps_nothing(link: Link) -> None:
    link.first(some_weights())
    memory = link.before
    assert memory is not None
    told = BroadcastWeights(len(memory.bytes()), 100, memory.index)
    found = dict(link.copy.receive(told, Pieces(memory.bytes()), CPU))
    assert same(found, stored(some_weights(), link.dtype))
    assert not link.copy._tensors
    with pytest.raises(RuntimeError, match="the server holds none"):
        link.send(memory, "2", "1")


def test_what_an_engine_does_to_its_weights_does_not_reach_the_copy(link: Link) -> None:
    link.first(some_weights())
    memory = link.before
    assert memory is not None
    for told in (
        BroadcastWeights(len(memory.bytes()), 100, memory.index, "2"),
        BroadcastWeights(0, 100, [], "3", "2"),
    ):
        for _, tensor in link.copy.receive(told, Pieces(memory.bytes()), CPU):
            tensor.fill_(7)
    assert same(link.copy._tensors, stored(some_weights(), link.dtype))
