"""The tables of docs/scaling.md are what their command prints."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"


def test_the_page_has_the_tables_that_the_command_prints() -> None:
    printed = runpy.run_path(str(ROOT / "tools" / "memory_tables.py"))
    page = PAGE.read_text(encoding="utf-8")
    assert printed["tables"]() in page
    assert printed["savings"]() in page
