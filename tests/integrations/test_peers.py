"""Peers that are missing, and peers of another release."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError

import pytest

from recap_fast.integrations import peers
from recap_fast.integrations.peers import require_peer


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    releases: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in releases:
            raise PackageNotFoundError(name)
        return releases[name]

    monkeypatch.setattr(peers, "version", version)
    return releases


@pytest.mark.parametrize(
    ("distribution", "command"),
    [
        ("trl", "pip install 'trl==1.16.*'"),
        ("liger-kernel", "pip install 'liger-kernel==0.8.5'"),
        ("verl", "pip install 'verl==0.9.1'"),
    ],
)
def test_a_missing_peer_says_what_to_install(
    installed: dict[str, str], distribution: str, command: str
) -> None:
    with pytest.raises(ImportError, match="is not installed") as raised:
        require_peer(distribution)
    assert command in str(raised.value)
    assert distribution.split("-")[0] in str(raised.value)


@pytest.mark.parametrize("release", ["1.16.0", "1.16.3", "1.16.0+local"])
def test_the_tested_release_is_taken_silently(installed: dict[str, str], release: str) -> None:
    installed["trl"] = release
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(require_peer("trl")) == release


@pytest.mark.parametrize(
    ("distribution", "release"),
    [("trl", "1.17.0"), ("trl", "2.16.0"), ("liger-kernel", "0.8.4"), ("verl", "0.9.2")],
)
def test_another_release_is_warned_of_by_both_names(
    installed: dict[str, str], distribution: str, release: str
) -> None:
    installed[distribution] = release
    with pytest.warns(UserWarning, match="is tested with") as caught:
        require_peer(distribution)
    message = str(caught[0].message)
    assert release in message
    assert peers.TESTED[distribution] in message
