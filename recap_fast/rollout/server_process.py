"""Starts a vLLM server in processes of its own, and sees to it that they end.

Between the trainer and vLLM stands a keeper: this file, run as a program. It reads its standard
input, which ends with the trainer however that ends, and then stops vLLM and whatever vLLM has
started; where vLLM ends by itself, or is killed, it takes the rest of its processes with it. Both
live in a session of their own: what a scheduler sends to the trainer's group, so that it saves and
stops, must leave the server to finish the step. Where the keeper itself is killed, vLLM is told to
end, and each of its processes ends itself if that does not come about.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

_TERMINATION = 10.0
"""Seconds between SIGTERM and SIGKILL."""
_TRACKING = 10.0
_KEEPER = "RECAP_FAST_SERVER_KEEPER"
"""Environment variable of a server's processes: the keeper's process id and when that started."""
_PR_SET_PDEATHSIG = 1
_LOOKS_EVERY = 0.2
"""Seconds between looks at whose files lie in shared memory."""
_SHARED = Path("/dev/shm")  # noqa: S108 (where Intel's OpenMP makes them)
_OPENMP_FILES = "__KMP_REGISTERED_LIB_{}_*"
"""By process id. Intel's OpenMP makes one in every process, and removes it where that ends in
order."""


def free_port() -> int:
    """One of loopback's that nobody listened on a moment ago.

    The system hands out ports from 32768 on to whoever asks for any, and a server takes half a
    minute until it listens: only who names a port takes one below.
    """
    for port in random.SystemRandom().sample(range(15_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(errno.EADDRINUSE, "100 ports of 127.0.0.1 between 15000 and 32000 are taken")


def is_free(port: int) -> bool:
    """Whether a server could listen at a port of loopback's."""
    with socket.socket() as probe:
        # As servers do, whom what is left of an earlier one's connections does not keep from it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def new_key() -> str:
    """An API key that nobody guesses."""
    return secrets.token_urlsafe(32)


class ServerProcess:
    """A running server, or one that has ended.

    Args:
        command: vLLM's, without the keeper.
        environment: all of it.
        log: file that everything it prints is appended to; None: where this process prints.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path | None
    ) -> None:
        self.log = log
        with ExitStack() as files:
            output = None
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = files.enter_context(log.open("ab"))
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", __file__, *command],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._keeper.poll()

    def said(self, lines: int = 5) -> str:
        """The last error in its log, for messages, or the end of it."""
        if self.log is None:
            return ""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        found = [line for line in text.splitlines() if line.strip()]
        starts = [i for i, line in enumerate(found) if re.search(r"\w(Error|Exception)\b: ", line)]
        return "\n".join(found[starts[-1] :][:lines] if starts else found[-lines:])

    def wait(self) -> int:
        """Until it ends by itself. Returns its exit status."""
        return self._keeper.wait()

    def stop(self) -> None:
        """Ends it, and waits for that: seconds, at most."""
        stdin = self._keeper.stdin
        assert stdin is not None
        if not stdin.closed:
            stdin.close()
        try:
            self._keeper.wait(_TERMINATION + _TRACKING + 10)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()


def _keep(command: Sequence[str], lifeline: IO[bytes]) -> int:
    """Runs `command` until it ends or the lifeline does. Returns its exit status."""
    child = subprocess.Popen(
        command,
        env=os.environ | {_KEEPER: f"{os.getpid()} {_started(os.getpid())}"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_keeper,
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _interrupt)
    ended = os.pidfd_open(child.pid)
    files: set[Path] = set()
    with suppress(InterruptedError):
        while not select.select([lifeline.fileno(), ended], [], [], _LOOKS_EVERY)[0]:
            files |= _openmp_files(child.pid)
    status = _end(child, files)
    for file in files:
        with suppress(OSError):
            file.unlink()  # which ended here: of all in the session none is left
    return status


def _openmp_files(session: int) -> set[Path]:
    """Those of the session's processes. Once a process is gone, nothing says whose it was."""
    found = set()
    for file in _SHARED.glob(_OPENMP_FILES.format("*")):
        number = file.name.removeprefix(_OPENMP_FILES.partition("{")[0]).partition("_")[0]
        with suppress(OSError, ValueError):
            if os.getsid(int(number)) == session:
                found.add(file)
    return found


def _interrupt(*_: object) -> None:
    raise InterruptedError


def _end(child: subprocess.Popen[bytes], files: set[Path]) -> int:
    """Ends all of a child's session, whether the child itself still runs or not, and adds to
    `files` what OpenMP has made for those that have to be killed."""
    for number, patience in ((signal.SIGTERM, _TERMINATION), (signal.SIGKILL, 5.0)):
        files |= _openmp_files(child.pid)
        _signal(child, number, _members(child.pid, trackers=False))
        _wait_for_none(child, patience, trackers=False)
    # Python's trackers remove the shared memory of those that could not, and end by themselves.
    _wait_for_none(child, _TRACKING, trackers=True)
    _signal(child, signal.SIGKILL, _members(child.pid, trackers=True))
    return child.wait()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals, members: Sequence[int]) -> None:
    for pid in members:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    child.poll()


def _wait_for_none(child: subprocess.Popen[bytes], seconds: float, *, trackers: bool) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and _members(child.pid, trackers=trackers):
        child.poll()  # or it stays as a zombie
        time.sleep(0.05)


def _members(session: int, *, trackers: bool) -> list[int]:
    """Living processes of a session; with or without those that track resources for others."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, _, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            line = (folder / "cmdline").read_bytes()
        except OSError:  # gone in the meantime
            continue
        if int(own) == session and state != "Z" and (trackers or b"resource_tracker" not in line):
            found.append(int(folder.name))
    return found


def end_with_keeper() -> bool:
    """Ends this process of a server, if it is one, by force once its keeper has been gone for
    longer than a server may take to end. Returns whether it is one.

    At a signal vLLM's HTTP process ends its engine, and then waits for requests that it has under
    way, some of which never end without an engine.
    """
    if _KEEPER not in os.environ:
        return False
    _watch_keeper()
    os.register_at_fork(after_in_child=_watch_keeper)
    return True


def _watch_keeper() -> None:
    pid, started = map(int, os.environ[_KEEPER].split())
    threading.Thread(target=_end_after, args=(pid, started), name="keeper", daemon=True).start()


def _end_after(pid: int, started: int) -> None:
    with suppress(ProcessLookupError):
        ended = os.pidfd_open(pid)
        if _started(pid) == started:  # or its number has gone to another
            select.select([ended], [], [])
    time.sleep(_TERMINATION)
    os.kill(os.getpid(), signal.SIGKILL)


def _started(pid: int) -> int | None:
    """When a process has, in ticks since the machine did; None where there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def _die_with_keeper() -> None:
    """For a keeper that is killed itself."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(_keep(sys.argv[1:], sys.stdin.buffer))
