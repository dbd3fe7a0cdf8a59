"""Reward functions that misbehave, for tests/rewards/test_scorer.py. Workers import this module."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

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
        "array": np.array(0.5),
        "truth": np.array(True),
        "generator": (0.5 for _ in "x"),
    }.get(what, 0.25)


def slow(sample):
    time.sleep(0.2)
    return 1.0


def meet(sample, *, folder, count, seconds):
    """Whether so many calls were in the workers' hands at once: each waits there for the others."""
    (Path(folder) / str(time.monotonic_ns())).touch()
    deadline = time.monotonic() + seconds
    while len(os.listdir(folder)) < count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def process(sample):
    return os.getpid()


def scaled(sample, *, factor):
    return factor * len(sample.completion)


not_callable = 5


async def judge(sample):
    return 1.0


async def judge_twice(sample):
    yield 1.0


def judge_step_by_step(sample):
    yield 1.0


class Judge:
    async def __call__(self, sample):
        return 1.0

    async def judge(self, sample, factor):
        return 1.0


judge_object = Judge()
judge_method = judge_object.judge
judge_partly = functools.partial(judge_object.judge, factor=1)
judge_partly_object = functools.partial(judge_object)
