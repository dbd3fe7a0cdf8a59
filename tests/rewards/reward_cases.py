"""Reward functions that misbehave, for tests/rewards/test_scorer.py. Workers import this module."""

from __future__ import annotations

import os
import signal
import time

import numpy as np


def misbehave(sample, how="ok"):
    """Does what the completion says, if it says something."""
    what = sample.completion or how
    if what == "raise":
        raise KeyError("gone")
    if what == "exit":
        raise SystemExit(3)
    if what == "hang":
        while True:
            pass
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "quit":
        os._exit(0)
    return {
        "text": "1.0",
        "nan": float("nan"),
        "inf": float("inf"),
        "huge": 1e300,
        "list": [1.0],
        "none": None,
        "true": True,
        "numpy": np.float32(0.5),
        "numpy_bool": np.bool_(True),
        "int": 3,
    }.get(what, 0.25)


def slow(sample):
    time.sleep(0.2)
    return 1.0


def process(sample):
    return os.getpid()


def scaled(sample, *, factor):
    return factor * len(sample.completion)


not_callable = 5
