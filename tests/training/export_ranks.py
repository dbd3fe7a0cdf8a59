"""A rank's part of tests/training/test_export.py. Started by `run_ranks`, or by torchrun, with the
name of a function below, and its arguments."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recap_fast import cli
from recap_fast.training import export, safetensors_writer
from tests.processes import report


def write(folder: str, jobs: str, file_bytes: str, piece_bytes: str) -> None:
    """Exports into several small files, in small pieces; says what this rank has written of each.

    Args:
        folder: where they go, under the names of the kinds.
        jobs: [run, kind, dtype or None] of each, as JSON.
    """
    safetensors_writer.FILE_BYTES, export._PIECE_BYTES = int(file_bytes), int(piece_bytes)
    write_at, sizes = export.write_at, {}
    world = export.start_host_world(60, "the test's limit")  # once: torchrun's store serves one
    for run, kind, dtype in json.loads(jobs):
        written: list[int] = []

        def counting(*given: Any, written: list[int] = written) -> int:
            written.append(write_at(*given))
            return written[-1]

        export.write_at = counting
        export._export(Path(run), Path(folder) / kind, dtype, world)
        sizes[kind] = written
    world.close()
    report(**sizes)


def limited(rank: str, command: Sequence[str]) -> None:
    """The command line, where one rank's files must not grow beyond some bytes: the system itself
    refuses what it writes, as on a full disk."""
    if os.environ["RANK"] == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    sys.argv = ["recap-fast", *command]
    cli.main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "limited":
        limited(sys.argv[2], sys.argv[3:])
    else:
        write(*sys.argv[2:])
