"""Settings that hold for every test."""

from __future__ import annotations

import os
from collections import Counter

import pytest

# Before any test imports a library that reads them. No test may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Lets Triton kernels run in its interpreter, on CPU tensors, unless a GPU is to be tested.

    The choice must be made before the first import, and holds for the whole process. At
    `pytest_configure` it is too late: the conftests of inner folders may have imported Triton.
    """
    parser.addoption(
        "--variants", metavar="I/N", default="0/1",
        help="of the tests marked `variant` every Nth alone, from the one of number I on",
    )  # fmt: skip
    options = pluginmanager.get_plugin("pytestconfig").known_args_namespace
    if options.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


_LONGEST = (
    "test_documented_commands.py", "test_server_training.py", "test_on_gpu.py", "test_launch.py",
    "test_server.py", "test_soak.py", "test_compact_adamw.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _thin(items)
    _leave_variants(config, items)
    items.sort(key=_place)
    _skip_without_gpu(items)


def _place(item: pytest.Item) -> int:
    """Files that take longest come first, or one of two processes ends with them alone."""
    return _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST)


def _thin(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked `thinned(n)` every nth is left as it is; the others become slow
    variants."""
    cases: Counter[str] = Counter()
    for item in items:
        if marker := item.get_closest_marker("thinned"):
            name = item.nodeid.partition("[")[0]
            if cases[name] % marker.args[0]:
                item.add_marker("slow")
                item.add_marker("variant")
            cases[name] += 1


def _leave_variants(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the variants that another `--variants` runs. Those of one `group` stay together."""
    turn, turns = map(int, config.getoption("variants").split("/"))
    groups: dict[str, int] = {}
    left = []
    for item in items:
        if marker := item.get_closest_marker("variant"):
            group = groups.setdefault(marker.kwargs.get("group", item.nodeid), len(groups))
            if group % turns != turn % turns:
                left.append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def _skip_without_gpu(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu`, with the reason, where they cannot run."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        reason = "needs a CUDA device; torch.cuda.is_available() is False"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "GPU tests run by themselves (-m gpu): this run interprets Triton kernels"
    else:
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """Starts every test from the same random state, whatever ran before it."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    np.random.seed(0)
