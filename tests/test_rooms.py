"""The rules of the house: who may import whom. CONTRIBUTING.md says why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "recap_fast"

FLOORS = (
    {"kernels", "version", "lazy", "paths", "quiet", "releases"},
    {"types"},
    {"ops"},
    {"config"},
    {"rewards", "model", "reweighting"},
    {"data", "rollout", "report"},
    {"training"},
    {"trainer"},
    {"reproduce", "bench", "integrations", "simulate", "doctor", "serve"},
    {"cli"},
    {"__main__"},
)
"""A file imports its own room and rooms on floors below its own."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Device code stands behind a symlink, which rglob does not follow.
PATHS = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
FILES = {_module(path): path for path in PATHS}


def _imports(module: str) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the room"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in FILES:
                    yield inner
                elif node.module in FILES:
                    yield node.module


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


GRAPH = {module: sorted(set(_imports(module)) - {module}) for module in FILES}


def test_every_room_has_a_floor() -> None:
    assert {_room(module) for module in FILES} - {""} <= set(FLOOR)
    assert len(GRAPH) > 80
    assert "recap_fast.types" in GRAPH["recap_fast.trainer"]


@pytest.mark.parametrize("module", sorted(set(FILES) - {"recap_fast"}))
def test_imports_come_from_the_room_or_from_below(module: str) -> None:
    room = _room(module)
    for other in GRAPH[module]:
        if _room(other) != room:
            assert _room(other), f"{module} imports the package's top, which hands on from above"
            assert FLOOR[_room(other)] < FLOOR[room], f"{module} imports {other}"


def test_device_code_is_launched_by_ops_alone() -> None:
    users = {m for m, others in GRAPH.items() if any(_room(o) == "kernels" for o in others)}
    assert {_room(module) for module in users} == {"ops", "kernels"}


def test_no_file_imports_another_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda p: p.parent.name)
def test_rooms_say_what_happens_in_them(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text
    assert len(text) > 60


def test_names_that_rooms_hand_on_resolve() -> None:
    import importlib

    for path in PACKAGE.glob("*/__init__.py"):
        package = importlib.import_module(_module(path))
        for name in getattr(package, "__all__", ()):
            assert getattr(package, name) is not None
