"""What a server leaves behind when it, its keeper or the trainer ends: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recap_fast.rollout import server_process
from recap_fast.rollout.server_process import _LOOKS_EVERY, ServerProcess, free_port, new_key

SHARED = Path("/dev/shm")  # noqa: S108 (looked at only)

# A server that starts a worker, which starts another: all write their numbers.
TREE = """
import os, subprocess, sys, time
depth = int(sys.argv[1])
with open(sys.argv[2], "a") as file:
    print(os.getpid(), file=file, flush=True)
if depth:
    subprocess.Popen([sys.executable, __file__, str(depth - 1), sys.argv[2]])
time.sleep(600)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[tuple[list[str], Path]]:
    program, numbers = tmp_path / "tree.py", tmp_path / "numbers"
    program.write_text(TREE)
    yield [sys.executable, str(program), "2", str(numbers)], numbers
    for number in _numbers(numbers):  # where a test failed
        if _lives(number):
            os.kill(number, signal.SIGKILL)


def _numbers(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def _lives(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait(condition: object, seconds: float = 20.0) -> bool:
    assert callable(condition)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _start(command: list[str], numbers: Path, log: Path) -> ServerProcess:
    process = ServerProcess(command, dict(os.environ), log)
    assert _wait(lambda: len(_numbers(numbers)) == 3)
    return process


def test_stop_ends_the_server_and_all_that_it_has_started(
    tree: tuple[list[str], Path], tmp_path: Path
) -> None:
    command, numbers = tree
    process = _start(command, numbers, tmp_path / "logs" / "server.log")
    assert process.exit_status is None
    process.stop()
    assert process.exit_status is not None
    assert not any(map(_lives, _numbers(numbers)))
    process.stop()  # again, for whoever closes twice


def test_the_workers_of_a_server_that_is_killed_end_with_it(
    tree: tuple[list[str], Path], tmp_path: Path
) -> None:
    command, numbers = tree
    process = _start(command, numbers, tmp_path / "server.log")
    os.kill(_numbers(numbers)[0], signal.SIGKILL)
    assert _wait(lambda: process.exit_status is not None)
    assert process.exit_status == -signal.SIGKILL % 256
    assert not any(map(_lives, _numbers(numbers)))
    process.stop()


LEAKING = """
import os, signal, sys, time
from multiprocessing import Process, shared_memory
def work():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    held = shared_memory.SharedMemory(create=True, size=1 << 16)
    with open(sys.argv[1], "a") as file:
        print(held.name, file=file, flush=True)
    time.sleep(600)
if __name__ == "__main__":
    shared_memory.SharedMemory(create=True, size=1).unlink()  # starts the tracker
    Process(target=work).start()
    time.sleep(600)
"""


@pytest.mark.parametrize(
    "victim", ["server", pytest.param("nobody", marks=[pytest.mark.slow, pytest.mark.variant])]
)
def test_no_shared_memory_is_left_of_a_worker_that_has_to_be_killed(
    victim: str, tmp_path: Path
) -> None:
    program, name = tmp_path / "leaking.py", tmp_path / "name"
    program.write_text(LEAKING)
    command = [sys.executable, str(program), str(name)]
    process = ServerProcess(command, dict(os.environ), tmp_path / "server.log")
    assert _wait(lambda: name.exists() and name.read_text().endswith("\n"))
    segment = SHARED / name.read_text().strip()
    assert segment.exists()
    if victim == "server":
        keeper = process._keeper.pid
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert _wait(lambda: process.exit_status is not None, 60)
    process.stop()
    assert not segment.exists()


# As Intel's OpenMP does it, in a server and in a worker of its.
REGISTERING = """
import os, subprocess, sys, time
file = f"/dev/shm/__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}"
with open(file, "w") as made, open(sys.argv[1], "a") as names:
    print(file, file=names, flush=True)
if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1], "worker"])
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["worker", "server", "nobody"])
def test_what_openmp_registers_is_removed_with_its_process(victim: str, tmp_path: Path) -> None:
    program, names = tmp_path / "registering.py", tmp_path / "names"
    program.write_text(REGISTERING)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    foreign = SHARED / f"__KMP_REGISTERED_LIB_{other.pid}_{os.getuid()}"
    foreign.write_text("")
    command = [sys.executable, str(program), str(names)]
    process = ServerProcess(command, dict(os.environ), tmp_path / "server.log")
    try:
        assert _wait(lambda: names.exists() and names.read_text().count("\n") == 2)
        files = [Path(name) for name in names.read_text().split()]
        assert all(file.exists() for file in files)
        if victim != "nobody":
            # By then the keeper has looked once: what is gone before that nobody knows to be its.
            time.sleep(3 * _LOOKS_EVERY)
            os.kill(int(files[victim == "worker"].name.split("_")[-2]), signal.SIGKILL)
        process.stop()
        assert not any(file.exists() for file in files)
        assert foreign.exists()
    finally:
        process.stop()
        other.kill()
        other.wait()
        foreign.unlink(missing_ok=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_its_trainer(
    number: signal.Signals, tree: tuple[list[str], Path], tmp_path: Path
) -> None:
    command, numbers = tree
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time\n"
            "from pathlib import Path\n"
            "from recap_fast.rollout.server_process import ServerProcess\n"
            "kept = ServerProcess(sys.argv[2:], dict(os.environ), Path(sys.argv[1]))\n"
            "time.sleep(600)\n",
            str(tmp_path / "server.log"),
            *command,
        ]
    )
    assert _wait(lambda: len(_numbers(numbers)) == 3, 60)
    trainer.send_signal(number)
    trainer.wait()
    assert _wait(lambda: not any(map(_lives, _numbers(numbers))))


def test_what_is_sent_to_the_trainers_group_spares_the_server(
    tree: tuple[list[str], Path], tmp_path: Path
) -> None:
    command, numbers = tree
    process = _start(command, numbers, tmp_path / "server.log")
    groups = {os.getpgid(number) for number in _numbers(numbers)}
    assert os.getpgid(0) not in groups
    process.stop()


def test_a_server_ends_with_its_keeper(tree: tuple[list[str], Path], tmp_path: Path) -> None:
    command, numbers = tree
    process = _start(command, numbers, tmp_path / "server.log")
    server = _numbers(numbers)[0]
    os.kill(process._keeper.pid, signal.SIGKILL)
    assert _wait(lambda: not _lives(server))
    assert process.exit_status == -signal.SIGKILL
    process.stop()


# All of TREE deaf to SIGTERM, as a server with a request that never ends. The last one looks for
# its keeper only after that is gone.
DEAF = """
import os, signal, sys, time
from pathlib import Path
from recap_fast.rollout import server_process
signal.signal(signal.SIGTERM, signal.SIG_IGN)
server_process._TERMINATION = 0.3
if sys.argv[1] == "0":
    keeper = os.environ[server_process._KEEPER].split()[0]
    Path(sys.argv[2]).with_name("keeper").write_text(keeper)
    while Path(f"/proc/{keeper}").exists():
        time.sleep(0.05)
server_process.end_with_keeper()
if sys.argv[1] == "2" and not os.fork():
    Path(sys.argv[2]).with_name("forked").write_text(str(os.getpid()))
""".strip()


def test_a_server_that_does_not_end_with_its_keeper_is_killed(
    tree: tuple[list[str], Path], tmp_path: Path
) -> None:
    command, numbers = tree
    Path(command[1]).write_text(TREE.replace("time.sleep(600)", f"{DEAF}\ntime.sleep(600)"))
    process = _start(command, numbers, tmp_path / "server.log")
    assert _wait((tmp_path / "keeper").exists)
    assert _wait(lambda: len(_numbers(tmp_path / "forked")) == 1)
    members = _numbers(numbers) + _numbers(tmp_path / "forked")
    time.sleep(0.6)
    assert all(map(_lives, members)), "as long as the keeper lives"
    process._keeper.kill()
    process._keeper.wait()
    assert _wait(lambda: not any(map(_lives, members)))


def test_nobody_ends_without_a_keeper_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(server_process._KEEPER, raising=False)
    threads = threading.active_count()
    assert not server_process.end_with_keeper()
    assert threading.active_count() == threads


def test_the_log_says_why_it_ended(tmp_path: Path) -> None:
    script = "print('starting'); raise SystemExit('ValueError: no such model')"
    log = tmp_path / "logs" / "server.log"
    process = ServerProcess([sys.executable, "-c", script], dict(os.environ), log)
    assert _wait(lambda: process.exit_status is not None)
    assert process.exit_status == 1
    assert process.said() == "ValueError: no such model"
    process.stop()


def test_keys_and_ports_are_new_each_time() -> None:
    assert len({new_key() for _ in range(8)}) == 8
    assert all(len(new_key()) >= 32 for _ in range(8))
    ports = [free_port() for _ in range(8)]
    assert len(set(ports)) > 1
    # None that the system gives to whoever asks for any.
    assert all(15_000 <= port < 32_000 for port in ports)
