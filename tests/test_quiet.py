"""What a command lets through of other packages' talk, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recap_fast.quiet import quieten

ROOT = Path(__file__).resolve().parent.parent
REMARK = 'x = 1\nif x is "{name}":\n    pass\n'  # a SyntaxWarning when it is compiled
SCRIPT = """
from recap_fast.quiet import quieten
quieten()
import warnings, subprocess, sys, logging
logging.basicConfig()
import theirs, mine
warnings.warn("soon gone", FutureWarning)
warnings.warn("look here")
logging.getLogger("vllm.inner").warning("a remark of vllm")
logging.getLogger("vllm.inner").error("a failure of vllm")
logging.getLogger("recap_fast.inner").warning("a warning of ours")
subprocess.run([sys.executable, "-B", "-c", "import theirs_too"], check=True)
"""


@pytest.fixture
def run_script(tmp_path: Path):
    """Runs SCRIPT beside an installed package and a module of the user's; returns its stderr."""
    installed = tmp_path / "lib" / "site-packages"
    installed.mkdir(parents=True)
    for folder, name in ((installed, "theirs"), (installed, "theirs_too"), (tmp_path, "mine")):
        (folder / f"{name}.py").write_text(REMARK.format(name=name))

    def run(**variables: str) -> str:
        own = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "LD_PRELOAD")}
        own = {k: v for k, v in own.items() if not k.startswith("VLLM_")}
        paths = os.pathsep.join([str(ROOT), str(installed), str(tmp_path)])
        done = subprocess.run(
            [sys.executable, "-B", "-c", SCRIPT], capture_output=True, text=True, check=True,
            env=own | {"PYTHONPATH": paths} | variables,
        )  # fmt: skip
        return done.stderr

    return run


def test_only_what_concerns_the_user_is_seen(run_script):
    seen = run_script()
    for line in ("theirs.py", "theirs_too.py", "soon gone", "a remark of vllm"):
        assert line not in seen
    for line in ("mine.py", "look here", "a failure of vllm", "a warning of ours"):
        assert line in seen


def test_what_the_user_asks_for_is_seen(run_script):
    seen = run_script(PYTHONWARNINGS="default", VLLM_LOGGING_LEVEL="info")
    for line in ("theirs.py", "theirs_too.py", "soon gone", "a remark of vllm"):
        assert line in seen


def test_twice_is_as_good_as_once(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error::UserWarning")
    quieten()
    once = os.environ["PYTHONWARNINGS"]
    quieten()
    assert once == os.environ["PYTHONWARNINGS"] == "ignore::SyntaxWarning,error::UserWarning"
