"""The tests marked `gpu`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

from benchmarks.on_gpu.part import Context, SkipPartError

REHEARSED = ("tests/ops", "tests/training/test_optimization.py", "tests/reweighting/test_recap.py")
"""Files that a rehearsal looks into; collecting the others takes long. A run takes all."""


def run(context: Context) -> dict[str, Any]:
    """Counts of outcomes.

    Raises:
        SkipPartError: tests were found, and every one of them was skipped.
        RuntimeError: a test failed, a file could not be collected, or there are no such tests.
    """
    report = context.work / "gpu_tests.xml"
    status = subprocess.call(
        [
            sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}",
            "-p", "no:cacheprovider", "--continue-on-collection-errors",
            *(REHEARSED if context.rehearse else ()),
        ]
    )  # fmt: skip
    if not report.exists():
        raise RuntimeError(f"pytest wrote no report; exit status {status}")
    suite = ElementTree.parse(report).getroot().find("testsuite")  # noqa: S314  # our own file
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    reasons = sorted({skip.get("message", "") for skip in suite.iter("skipped")})
    if status != 0 or counts["tests"] == 0:
        raise RuntimeError(f"pytest -m gpu ended with status {status}: {counts}")
    if counts["skipped"] == counts["tests"]:
        raise SkipPartError(f"{counts['tests']} tests found, all skipped: {'; '.join(reasons)}")
    return {**counts, "skip_reasons": reasons}
