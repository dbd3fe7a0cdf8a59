"""Prints the CPU seconds of each test file, which a busy machine does not change, unlike wall time:

    python -m pytest -p tests.cpu_seconds

Counts this process and the processes that tests started and waited for.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

_SECONDS: dict[str, float] = defaultdict(float)
_START = sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    start = sum(os.times()[:4])
    result = yield
    _SECONDS[item.nodeid.partition("::")[0]] += sum(os.times()[:4]) - start
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("CPU seconds")
    for path, seconds in sorted(_SECONDS.items(), key=lambda pair: -pair[1]):
        terminalreporter.line(f"{seconds:8.1f}  {path}")
    terminalreporter.line(f"{sum(os.times()[:4]) - _START:8.1f}  in all, imports included")
