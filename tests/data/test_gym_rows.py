"""reasoning-gym's rows: one seed, one set of rows, whatever process asks for them."""

from __future__ import annotations

import io
import pickle  # noqa: TID251 (what the process is asked with)
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from recap_fast.config import SourceConfig
from recap_fast.data import gym_process, gym_rows
from recap_fast.data.gym_process import Reply, Request
from recap_fast.data.gym_rows import GymRows
from recap_fast.data.row_columns import DataError

# Of sets of texts, of Python's global random state, of code that asks both.
FICKLE = [
    "ransom_note",
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "word_ladder",
]
ROWS = [0, 3, 21]


@pytest.fixture(scope="module")
def processes() -> Iterator[list[Any]]:
    """Two processes that generate rows, started by ones with other hash seeds."""
    with pytest.MonkeyPatch.context() as patch:
        made = []
        for seed in ("1", "2"):
            patch.setenv("PYTHONHASHSEED", seed)
            made.append(gym_rows._Generator())
    yield made
    for process in made:
        process.close()


def rows_of(process: Any, name: str, order: list[int], **parameters: Any) -> dict[int, Any]:
    config = SourceConfig(
        name="s", kind="rl", reasoning_gym=name, size=50, parameters=parameters,
        rewards={"score": "reasoning_gym"},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym_rows, "_generator", cache(lambda: process))
        rows = GymRows(config, 5)
        assert len(rows) == 50
        return {row: rows[row] for row in order}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", FICKLE)
def test_rows_depend_on_no_process_and_no_order(processes: list[Any], name: str) -> None:
    first = rows_of(processes[0], name, ROWS)
    assert first == rows_of(processes[1], name, ROWS[::-1])
    assert len({entry["question"] for entry in first.values()}) > 1
    assert all(entry["metadata"]["source_dataset"] == name for entry in first.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rows_of_every_dataset_depend_on_no_process(processes: list[Any]) -> None:
    names = processes[0].ask(Request()).value
    assert len(names) > 100
    fickle = [
        name
        for name in sorted(names)
        if name != "composite"  # made of others
        and repr(sorted(rows_of(processes[0], name, ROWS).items()))
        != repr(sorted(rows_of(processes[1], name, ROWS[::-1]).items()))
    ]
    assert fickle == []


def test_other_seeds_and_parameters_make_other_rows(processes: list[Any]) -> None:
    first = rows_of(processes[0], "chain_sum", [0, 1])
    assert first != rows_of(processes[0], "chain_sum", [0, 1], seed=6)
    assert first == rows_of(processes[0], "chain_sum", [0, 1], seed=5)
    assert first != rows_of(processes[0], "chain_sum", [0, 1], max_terms=2)


def test_the_trainers_random_state_is_left_alone(processes: list[Any]) -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    rows_of(processes[0], "pool_matrix", [0, 1])  # seeds NumPy's global state
    assert (random.random(), np.random.random()) == expected


class Broken:
    """Stands for the process where it raises, or is gone."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def ask(self, request: Request) -> Reply:
        if not request.dataset:
            return Reply({"chain_sum": ["seed"]})
        if request.row is None:
            return Reply(50)
        if isinstance(self._answer, Exception):
            raise self._answer
        return Reply(None, self._answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("ValueError: no such sum", "row 0 cannot be generated: ValueError: no such sum"),
        (EOFError(), "the process that generates reasoning-gym's rows died .*row 0"),
        (BrokenPipeError(), "the process that generates reasoning-gym's rows died"),
    ],
)
def test_what_generators_raise(monkeypatch: pytest.MonkeyPatch, answer: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(Broken(answer), "chain_sum", [0])


def test_process_that_dies() -> None:
    process = gym_rows._Generator()
    process.close()
    with pytest.raises(DataError, match="rows died"):
        rows_of(process, "chain_sum", [0])


def test_the_process_ends_in_silence_where_nobody_waits_for_its_answer() -> None:
    class Closed(io.BytesIO):
        def write(self, *given: object) -> int:
            raise BrokenPipeError

    requests = io.BytesIO(pickle.dumps(Request("chain_sum", b"")))
    gym_process.serve(requests, Closed())
    assert not requests.read()
