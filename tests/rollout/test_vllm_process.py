"""A deadline for what nothing else ends."""

from __future__ import annotations

import subprocess
import sys
import time

from recap_fast.rollout.vllm_process import deadline

WAITS = """
import time
from recap_fast.rollout.vllm_process import deadline
with deadline(0.2, "a step of sampling"):
    time.sleep(60)
"""


def test_a_wait_past_its_deadline_ends_the_process_and_says_why() -> None:
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "rank 0: a step of sampling took over 0.2 s: another process" in done.stderr


def test_a_wait_in_time_does_not() -> None:
    with deadline(0.05, "a step"):
        pass
    with deadline(None, "a step"):
        time.sleep(0.1)
    time.sleep(0.1)
