"""A sharded model's weights, whole: with gloo, in 2 and 4 processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_ranks


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gathered_weights_are_those_of_the_whole_model(tmp_path: Path, processes: int) -> None:
    """To the bit, tied or not, with adapters or not, sharded or sharded and copied, whatever the
    bucket; while each process takes them at a pace of its own."""
    ranks = run_ranks(Path(__file__).with_name("gathering_ranks.py"), processes, tmp_path)
    for rank in ranks:
        assert rank["problems"] == []
        assert rank["collectives"] == 1, "a small model fits one bucket"
        assert rank["tensors"] == 21
        assert rank["dtypes"] == "{torch.bfloat16}"


@pytest.mark.slow
def test_gathers_and_a_transfer_beside_them_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """More than two processes that gather hang elsewhere where transfers come between."""
    ranks = run_ranks(Path(__file__).with_name("streaming_ranks.py"), 4, tmp_path)
    assert [rank["received"] for rank in ranks] == [0, 0, 0, 3 * ranks[0]["weights"]]
    assert ranks[3]["equal"] == ranks[3]["received"] > 0
