"""Weights in memory that comes in pieces, between processes, and what is told of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from recap_fast.rollout.sent_weights import (
    BroadcastWeights,
    GroupInfo,
    in_thread,
    place,
    unpacked,
    views,
)
from tests.rollout.gloo_group import join, new_unique_id
from tests.rollout.test_shared_weights import some_weights

CPU = torch.device("cpu")


def laid_out() -> tuple[list[list[Any]], torch.Tensor]:
    """Weights of two dtypes, an empty one among them, and the memory that holds them."""
    index: list[list[Any]] = []
    end = 0
    tensors = {
        name: tensor.bfloat16() if name in "bd" else tensor
        for name, tensor in some_weights().items()
    }
    for name, tensor in tensors.items():
        end = place(index, name, tensor.dtype, tensor.shape)
    memory = torch.zeros(end, dtype=torch.uint8)
    for name, view in views(index, memory):
        view.copy_(tensors[name])
    return index, memory


def test_weights_lie_one_behind_the_other_where_any_dtype_may_begin() -> None:
    index, memory = laid_out()
    assert [start % 64 for *_, start in index] == [0] * 5
    assert [name for name, *_ in index] == ["a", "b", "c", "empty", "d"]
    assert len(memory) == 4 * 64  # the empty one takes nothing


@pytest.mark.parametrize("size", [1, 7, 60, 64, 100, 255, 256, 1000])
def test_pieces_of_any_size_make_the_same_tensors(size: int) -> None:
    index, memory = laid_out()
    buffer = torch.empty(size, dtype=torch.uint8)  # each piece overwrites the one before
    taken = []

    def pieces() -> Any:
        for start in range(0, len(memory), size):
            piece = buffer[: len(memory[start : start + size])]
            piece.copy_(memory[start : start + size])
            taken.append(start)
            yield piece

    found = list(unpacked(index, pieces(), CPU))
    for (name, tensor), (wanted_name, wanted) in zip(found, views(index, memory), strict=True):
        assert name == wanted_name
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)
    assert len(taken) == -(-len(memory) // size), "somebody waits to send the last one too"


def test_two_receive_what_a_third_sends() -> None:
    index, memory = laid_out()
    told = BroadcastWeights(nbytes=len(memory), piece=100, index=index)
    unique_id = new_unique_id()

    def receive(rank: int) -> list[tuple[str, torch.Tensor]]:
        return list(told.receive(join(unique_id, rank=rank, world_size=3, device=CPU), CPU))

    others = [in_thread(partial(receive, rank), "receiving") for rank in (1, 2)]
    group = join(unique_id, rank=0, world_size=3, device=CPU)
    assert list(told.send(memory, group, CPU)) == [100, 200, 256]
    for other in others:
        received = other.result(60)
        assert [name for name, _ in received] == ["a", "b", "c", "empty", "d"]
        for (_, tensor), (_, wanted) in zip(received, views(index, memory), strict=True):
            assert torch.equal(tensor, wanted)


def test_sides_that_set_nccl_differently_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    GroupInfo("", 1, 2, 1.0, cumem=None).check()
    with pytest.raises(RuntimeError, match="is unset in the server and 0 in the trainer"):
        GroupInfo("", 1, 2, 1.0, cumem="0").check()
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    with pytest.raises(RuntimeError, match="is 1 in the server and unset in the trainer"):
        GroupInfo("", 1, 2, 1.0, cumem=None).check()


def test_work_in_a_thread_gives_what_it_found() -> None:
    assert in_thread(lambda: 3, "counting").result(10) == 3
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 // 0, "dividing").result(10)
