"""How the reward workers are started: forked from a server process, without the user's script.

`multiprocessing` has each worker import the script that it was started from, for functions that
live there. Rewards never do: they are named "module:function". A script that trains imports torch
and transformers, ten seconds of a core for each worker and for each one that replaces it, and
without `if __name__ == "__main__":` it would start to train in all of them.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing import forkserver, popen_forkserver, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess, set_spawning_popen
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

TO_GROUPS = (signal.SIGTERM, signal.SIGHUP) if os.name == "posix" else ()
"""What schedulers, torchrun and terminals send to all processes of a group to end the run."""


class _Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: BaseProcess) -> None:
        """As the parent's, but for the script."""
        prepared = spawn.get_preparation_data(process_obj.name)
        prepared.pop("init_main_from_path", None)
        prepared.pop("init_main_from_name", None)
        message = io.BytesIO()
        set_spawning_popen(self)
        try:
            for part in (prepared, process_obj):
                ForkingPickler(message).dump(part)
        finally:
            set_spawning_popen(None)
        self.sentinel, write = forkserver.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        # The worker sees by this end's death that its trainer has died.
        kept = os.dup(write)
        close = util.close_fds  # type: ignore[attr-defined]
        self.finalizer = util.Finalize(self, close, (kept, self.sentinel))
        with open(write, "wb") as pipe:
            pipe.write(message.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Process


def worker_context(modules: Sequence[str]) -> Any:
    """Of workers that are forked from a small server process that has `modules` loaded: replacing a
    killed worker then takes milliseconds. Forking this process would not be safe, it has threads of
    torch and vLLM."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = _Context()
    context.set_forkserver_preload(list(modules))
    # The server inherits what is blocked here, and so outlives what ends the group.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_GROUPS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
