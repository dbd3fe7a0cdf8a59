"""How a server of ours is started: its environment, key and GPUs."""

from __future__ import annotations

import re

import pytest
import torch

from recap_fast.rollout import server_command
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_command import (
    KEY_VARIABLE,
    check_gpus,
    check_installed,
    server_environment,
    server_key,
)


@pytest.mark.parametrize(
    ("seen", "names"),
    [(None, "1,2"), ("4,5,6,7", "5,6"), ("GPU-a,GPU-b,GPU-c", "GPU-b,GPU-c"), ("4", "")],
)
def test_servers_have_those_of_the_gpus_that_the_run_sees(
    seen: str | None, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is of a process on another node, which starts none."""
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert server_environment("key", range(1, 3))["CUDA_VISIBLE_DEVICES"] == names


def test_the_cache_of_a_server_is_the_configuration_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's variable goes before its option."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    assert "VLLM_CPU_KVCACHE_SPACE" not in server_environment("key", None)


def test_a_server_unpickles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "VLLM_ALLOW_INSECURE_SERIALIZATION"
    monkeypatch.setenv(variable, "1")
    assert variable not in server_environment("key", None)


def test_gpus_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_gpus(range(2, 4))
    wanted = "need 4 GPUs behind the 2 that train, and of 4 that are seen here 2 are left"
    with pytest.raises(EngineError, match=f"{wanted}: lower rollout.server.count"):
        check_gpus(range(2, 6))


@pytest.mark.parametrize("release", ["0.25.1", "0.31.2.dev3+gabc"])
def test_an_installed_vllm_that_is_too_old_is_named(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server would start, or end with a flag that it does not know."""
    pytest.importorskip("vllm")
    check_installed(takes_images=False)
    monkeypatch.setattr(server_command, "version", lambda name: release)
    with pytest.raises(EngineError, match=rf"vllm {re.escape(release)} is .* wanted 0.32 or newer"):
        check_installed(takes_images=False)


@pytest.mark.parametrize(
    ("given", "key"), [(None, None), ("", None), (" \n", None), ("secret\n", "secret")]
)
def test_a_key_is_read_without_what_surrounds_it(
    given: str | None, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's last line ends in a line's end, which no header may have."""
    if given is None:
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(KEY_VARIABLE, given)
    assert server_key() == key


@pytest.mark.parametrize("key", ["sécret", "two\nlines"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(EngineError, match=f"{KEY_VARIABLE} has characters") as caught:
        server_key()
    assert key not in str(caught.value)
