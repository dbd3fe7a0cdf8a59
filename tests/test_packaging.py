"""How the package is laid out, imported and built."""

from __future__ import annotations

import ast
import dataclasses
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


TORCH_ALONE = """
import importlib.util, warnings
absent = "numpy triton pydantic packaging transformers trl vllm verl liger_kernel".split()
assert not [name for name in absent if importlib.util.find_spec(name)]
import recap_fast, torch
from recap_fast import (PolicyLossConfig, PolicyLossOutput, RecapReweighter,
    fused_linear_policy_loss, group_advantages, linear_logprobs, linear_token_statistics,
    make_reweighter, selective_logprobs)
warnings.simplefilter("error")
torch.manual_seed(0)
hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
targets, rewards = torch.randint(9, (6,)), torch.rand(4, 2)
reweighter = make_reweighter("recap", 2, window=1, signals="reward")
assert isinstance(reweighter, RecapReweighter)
for scale in (1, 2):
    weights = reweighter.update(rewards.mean(0) ** scale)
output = fused_linear_policy_loss(
    hidden, weight, targets, sequence_ids=torch.tensor([0, 0, 1, 2, 3, 3]),
    advantages=group_advantages(rewards, torch.tensor([0, 0, 1, 1])), objective_weights=weights,
    config=PolicyLossConfig(clip_high=0.3))
logprobs, entropy = linear_logprobs(hidden, weight, targets)
picked, _ = selective_logprobs(hidden @ weight.T, targets)
assert torch.allclose(output.logprobs, logprobs) and torch.allclose(logprobs, picked)
(output.loss + entropy.sum() - linear_token_statistics(hidden, weight, targets).logprobs.sum()
    ).backward()
assert weights.isfinite().all() and weights[0] != weights[1], weights
assert hidden.grad.isfinite().all() and weight.grad.abs().sum() > 0
print(recap_fast.__file__)
for name in ("TrainConfig", "load_config", "Trainer"):
    try:
        getattr(recap_fast, name)
    except ModuleNotFoundError as error:
        print(error)
for name in INTEGRATIONS:
    try:
        importlib.import_module(f"recap_fast.integrations.{name}")
    except ImportError as error:
        print(error)
"""


def _requirements_of(distribution: str) -> set[str]:
    """The distribution, and all that it needs here."""
    found, pending = set(), [distribution]
    while pending:
        if (name := pending.pop()) not in found:
            found.add(name)
            for wanted in map(Requirement, importlib.metadata.requires(name) or []):
                if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                    pending.append(wanted.name)
    return found


@pytest.fixture(scope="module")
def torch_alone(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that sees torch, what torch requires, and our wheel without what it
    requires. Links to the packages of this environment: torch takes a while to install."""
    folder = tmp_path_factory.mktemp("torch-alone")
    (folder / "packages").mkdir()
    for name in _requirements_of("torch"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = folder / "packages" / top
            if not link.exists():
                link.symlink_to(str(distribution.locate_file(top)))
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(str(folder / "packages"), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--python", str(venv), "install", "--quiet"]
    command += ["--no-deps", "--no-index", "--no-compile", str(wheel.filename)]
    subprocess.run(command, check=True, timeout=120)
    return venv / "bin"


def test_the_losses_need_torch_alone(torch_alone: Path, tmp_path: Path) -> None:
    """And what needs more says in one line what to install."""
    from recap_fast.integrations import peers

    names = sorted(name.partition("-")[0] for name in peers.TESTED)
    assert names == ["liger", "trl", "verl"]
    code = f"INTEGRATIONS = {names}\n{TORCH_ALONE}"
    done = subprocess.run(
        [torch_alone / "python", "-I", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, *messages = done.stdout.splitlines()
    assert Path(file).is_relative_to(torch_alone.parent)
    assert len(messages) == 3 + len(names)
    for name, message in zip(("TrainConfig", "load_config", "Trainer"), messages, strict=False):
        assert re.fullmatch(
            rf"recap_fast\.{name} needs '\w+', which.*`pip install recap-fast`.*", message
        )
    for name, message in zip(names, messages[3:], strict=True):
        assert re.fullmatch(
            rf"recap_fast\.integrations\.{name} needs .*: pip install '{name}.*", message
        )


def test_the_command_without_its_requirements(torch_alone: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [torch_alone / "recap-fast", "doctor"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"recap-fast needs 'typer', .*`pip install recap-fast`.*\n", done.stderr)


SHAPE = re.compile(r"\[([A-Z0-9](, [A-Z0-9])*)?\]")


def test_public_names_are_documented() -> None:
    """Functions and classes that take arguments list them, what they raise, and tensors' shapes."""
    import recap_fast

    for name in set(recap_fast.__all__) - {"__version__"}:
        public = getattr(recap_fast, name)
        text = public.__doc__ or ""
        assert len(text) > 100, f"{name}: {text!r}"
        sections = {"Args:", "Returns:", "Raises:"}
        if dataclasses.is_dataclass(public) or name == "TrainConfig":
            sections = set() if public.__module__ == "recap_fast.ops.output" else {"Raises:"}
        elif "ops" not in public.__module__:
            sections = {"Args:", "Raises:"}
        else:
            assert SHAPE.search(text), f"{name}: no shapes"
        assert {section for section in sections if section not in text} == set(), name


def test_fields_of_results_say_their_shapes() -> None:
    tree = ast.parse((ROOT / "recap_fast/ops/output.py").read_text(encoding="utf-8"))
    records = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert records
    for record in records:
        properties = [node for node in record.body if isinstance(node, ast.FunctionDef)]
        body = [node for node in record.body if node not in properties]
        fields, texts = body[1::2], [text.value.value for text in body[2::2]]
        assert all(isinstance(field, ast.AnnAssign) for field in fields)
        assert len(texts) == len(fields)
        texts += [ast.get_docstring(node) for node in properties]
        assert [text for text in texts if not SHAPE.match(text)] == []


def declared_requirements() -> dict[str, list[Requirement]]:
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
    requirements = declared_requirements()
    assert {"", "vllm", "vllm-cpu", "bench", "dev"} <= set(requirements)
    for extra in ("", "bench", "dev"):
        for wanted in requirements[extra]:
            pin = pins[re.sub("[-_.]+", "-", wanted.name).lower()].removesuffix(".*")
            assert wanted.specifier.contains(pin), f"{wanted} is pinned to {pin}"


def test_set_up_installs_a_vllm_that_the_extras_allow() -> None:
    script = (ROOT / "tools/setup_venv.sh").read_text(encoding="utf-8")
    (release,) = re.findall(r"^VLLM_VERSION=(\S+)$", script, re.M)
    (torch,) = re.findall(r"^TORCH=torch==(\S+)$", script, re.M)
    extras = declared_requirements()
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
    ours = next(
        w for w in declared_requirements()["vllm-cpu"] if w.name == "transformers"
    ).specifier
    releases = [f"5.{minor}.{patch}" for minor in range(40) for patch in range(4)]
    assert list(ours.filter(releases)) == list(theirs.filter(releases))
