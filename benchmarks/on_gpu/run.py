"""Runs one part of on_gpu.sh and writes what it found to WORK/PART.json.

    python -m benchmarks.on_gpu.run PART --work FOLDER [--rehearse]

Exit status: 0 done, 77 skipped (the reason is in the JSON), anything else failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.part import Context, SkipPartError

SKIPPED = 77
FAIL_PART = "RECAP_FAST_FAIL_PART"
"""Environment variable naming a part that is made to fail, to rehearse that as well."""


def main() -> int:
    """Runs a part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("part")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    started = time.monotonic()
    record: dict[str, Any] = {"part": options.part, "status": "ok"}
    try:
        if os.environ.get(FAIL_PART) == options.part:
            raise RuntimeError(f"made to fail by {FAIL_PART}")
        module = import_module(f"benchmarks.on_gpu.{options.part}")
        record["results"] = module.run(Context(options.work, options.rehearse))
    except SkipPartError as reason:
        record |= {"status": "skipped", "reason": str(reason)}
    record["seconds"] = round(time.monotonic() - started, 1)
    (options.work / f"{options.part}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return SKIPPED if record["status"] == "skipped" else 0


if __name__ == "__main__":
    sys.exit(main())
