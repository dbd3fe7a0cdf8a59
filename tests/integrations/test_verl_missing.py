"""Without verl, its module says what to type; nothing of verl is imported before."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from recap_fast.integrations import peers


def test_the_module_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(peers, "version", version)
    monkeypatch.delitem(sys.modules, "recap_fast.integrations.verl", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'verl==0\.9\.1'"):
        importlib.import_module("recap_fast.integrations.verl")
