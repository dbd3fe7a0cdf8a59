"""verl's head and ours in its place, in verl's own environment: it wants other releases than ours.

    PYTHON -m benchmarks.verl_heads SHAPE ROUNDS

SHAPE is a `Shape` as JSON. The last line of the output holds what was measured as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.inputs import Shape
from benchmarks.integrations import Measured, measure_implementations
from benchmarks.measuring import pick_device
from benchmarks.peers import VERL_HEADS

ROOT = Path(__file__).resolve().parent.parent


def find_python() -> str | None:
    """The interpreter that has verl: this one, or that of tools/verl_env.sh; None: neither."""
    if find_spec("verl") is not None:
        return sys.executable
    theirs = Path(sys.prefix) / "verl" / "bin" / "python"
    return str(theirs) if theirs.exists() else None


def measure_in_its_environment(
    python: str, shape: Shape, rounds: int
) -> tuple[dict[str, Measured], dict[str, str]]:
    """What `main` of another interpreter prints, and the releases that it has.

    Raises:
        RuntimeError: it failed; the text ends with the last line of its output.
    """
    environment = dict(os.environ)
    if python != sys.executable:  # this interpreter's libraries would hide the other's
        for name in ("LD_PRELOAD", "PYTHONPATH"):
            environment.pop(name, None)
    folders = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    done = subprocess.run(
        [python, "-m", "benchmarks.verl_heads", json.dumps(asdict(shape)), str(rounds)],
        env=environment | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"{python} ended with {done.returncode}: {lines[-1] if lines else ''}")
    record = json.loads(done.stdout.splitlines()[-1])
    return {name: Measured(**found) for name, found in record["heads"].items()}, record["versions"]


def main() -> None:
    from importlib.metadata import version

    shape, rounds = Shape(**json.loads(sys.argv[1])), int(sys.argv[2])
    measured = measure_implementations("verl_head", VERL_HEADS, shape, pick_device(), rounds)
    record: dict[str, Any] = {
        "heads": {name: asdict(found) for name, found in measured.items()},
        "versions": {name: version(name) for name in ("verl", "torch", "transformers")},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
