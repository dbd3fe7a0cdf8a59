"""What vLLM changes in the process that it runs in, and how that is put back."""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

logger = logging.getLogger(__name__)


def set_environment() -> None:
    """What vLLM reads while it is imported or started. The user's own settings win."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # In this process, or weights could not be handed over without a copy. Not the user's choice.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@contextmanager
def random_state_kept() -> Iterator[None]:
    """vLLM seeds and draws from the global generators; the trainer's dropout and data use them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Puts back what vLLM changes in the process while it starts."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    preload = os.environ.get("LD_PRELOAD")
    legacy_cache_size = os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override ours
    try:
        with random_state_kept():
            yield
    finally:
        # The CPU worker replaces the function by one that does nothing.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        if affinity is not None:
            os.sched_setaffinity(0, affinity)
        # vLLM adds torch's OpenMP library for worker processes of its own; ours need none.
        _restore_variable("LD_PRELOAD", preload)
        _restore_variable("VLLM_CPU_KVCACHE_SPACE", legacy_cache_size)
        _restore_allocator()


def _restore_allocator() -> None:
    """Gives torch's CUDA allocator the user's options again. Some releases of vLLM set one of them
    while they load weights, which resets all others, expandable_segments among them."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch looks them up in this order
    options = next((os.environ[name] for name in names if os.environ.get(name)), None)
    set_options = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if options and set_options is not None and torch.cuda.is_initialized():
        set_options(options)


def _restore_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def deadline(seconds: float | None, what: str) -> Iterator[None]:
    """Ends the process, with a message and status 1, where its body takes longer.

    For waits that nothing else can end: a collective on a GPU of whose processes one has stopped
    answering holds the others inside the driver.
    """
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, _give_up, (seconds, what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(seconds: float, what: str) -> None:
    logger.error(
        "rank %s: %s took over %g s: another process of the engine has died or does not answer",
        os.environ.get("RANK", "0"), what, seconds,
    )  # fmt: skip
    logging.shutdown()
    os._exit(1)
