"""The thirds that CI runs: together they are all tests, and each has all that are no variants."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tests.conftest import _leave_variants, _thin

MARKERS = {
    "plain": None,
    "a": {},
    "page-1": {"group": "page"},
    "b": {},
    "page-2": {"group": "page"},
}


@dataclass(frozen=True, eq=False)
class Item:
    nodeid: str
    kwargs: dict[str, str] | None

    def get_closest_marker(self, _: str) -> Any:
        return None if self.kwargs is None else self


def run(variants: str) -> tuple[list[str], list[str]]:
    """The ids of the tests that are left, and of those that are not."""
    deselected: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    config: Any = SimpleNamespace(getoption=lambda _: variants, hook=hook)
    items: list[Any] = [Item(*each) for each in MARKERS.items()]
    _leave_variants(config, items)
    return [item.nodeid for item in items], [item.nodeid for item in deselected]


def test_every_variant_has_its_turn() -> None:
    kept = [run(f"{turn}/3")[0] for turn in range(3)]
    assert kept == [["plain", "a"], ["plain", "page-1", "page-2"], ["plain", "b"]]
    assert run("4/3") == run("1/3")
    assert run("1/3")[1] == ["a", "b"]


def test_all_are_run_unless_told_otherwise() -> None:
    assert run("0/1") == (list(MARKERS), [])


def test_of_a_thinned_test_every_third_case_stays() -> None:
    class Case:
        def __init__(self, nodeid: str, every: int | None) -> None:
            self.nodeid, self.args, self.marks = nodeid, (every,), list[str]()

        def get_closest_marker(self, _: str) -> Any:
            return None if self.args == (None,) else self

        def add_marker(self, mark: str) -> None:
            self.marks.append(mark)

    items: list[Any] = [Case(f"thin[{i}]", 3) for i in range(5)] + [Case("thick", None)]
    _thin(items)
    quick = [item.nodeid for item in items if not item.marks]
    assert quick == ["thin[0]", "thin[3]", "thick"]
    assert all(item.marks in ([], ["slow", "variant"]) for item in items)
