"""Runs a script in several processes with gloo, as torchrun would start it on a cluster."""

from __future__ import annotations

import atexit
import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class _Nursery:
    """The process that is forked into ranks (tests/nursery.py), once it is asked for."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._process: subprocess.Popen[str] | None = None

    def run(self, task: dict[str, Any], timeout: float) -> list[list[int]] | None:
        """[[rank, status]] of the ranks that failed; None where they took too long."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "nursery.py"), *self._modules],
                env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            atexit.register(self._process.kill)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if ready and (line := self._process.stdout.readline()):
            found: list[list[int]] = json.loads(line)["failed"]
            return found
        for process in psutil.Process(self._process.pid).children(recursive=True):
            process.kill()
        self._process.kill()
        self._process = None
        return None


_nursery = _Nursery()
_with_vllm = _Nursery("vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker")


def run_ranks(
    script: Path,
    processes: int,
    folder: Path,
    *arguments: str,
    timeout: float = 180,
    vllm: bool = False,
) -> list[dict[str, Any]]:
    """What each rank of `script` reported with `report`, by rank.

    Ranks find the variables that torchrun sets, but are forks of a process that has imported what
    they need. `launched` is torchrun itself.

    Args:
        folder: an empty one, such as tmp_path, for the reports.
        timeout: seconds, after which all are killed and the test fails with their output.
        vllm: whether they need that.
    """
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    task = {
        "script": str(script),
        "arguments": arguments,
        "processes": processes,
        "port": port,
        "output": str(output),
        "environment": ENVIRONMENT | {"REPORT_FOLDER": str(folder)},
    }
    failed = (_with_vllm if vllm else _nursery).run(task, timeout)
    if failed is None:
        pytest.fail(f"{script.name}: {processes} ranks took over {timeout} s\n{output.read_text()}")
    assert not failed, f"ranks and their status: {failed}\n{output.read_text()}"
    return [
        json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
        for rank in range(processes)
    ]


def launched(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """What came of a script, or of "-m" and a module, under torchrun."""
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", str(processes), *command]  # fmt: skip
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def report(**values: Any) -> None:
    """Called once by each rank of a script: numbers, lists and strings by name."""
    path = Path(os.environ["REPORT_FOLDER"]) / f"rank-{os.environ['RANK']}.json"
    path.write_text(json.dumps(values), encoding="utf-8")
