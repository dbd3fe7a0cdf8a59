"""Processes that do not fit together are told so, in the same words."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recap_fast.config import DataConfig, load_config
from recap_fast.training.distributed import ALONE, RankError, start_world
from recap_fast.training.environment import (
    PACKAGES,
    SHARED_FILE,
    EnvironmentMismatchError,
    check_environments,
    compare_environments,
    describe_environment,
    place_token,
    sees_token,
)
from recap_fast.types import UserError
from tests.processes import report, run_ranks
from tests.tiny import tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path, Path("any/model"))


@pytest.fixture
def four(config) -> list[dict[str, Any]]:
    """Ranks 0 and 1 on one node, 2 and 3 on another, all alike."""
    one = describe_environment(config, 0, CPU, sees_run_folder=True)
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 80}
    return [
        copy.deepcopy(one)
        | {"rank": rank, "host": f"node-{'ab'[rank // 2]}", "gpu": gpu | {"uuid": f"GPU-{rank}"}}
        for rank in range(4)
    ]


def test_a_process_describes_itself(config):
    own = describe_environment(config, 3, CPU, sees_run_folder=True)
    assert json.loads(json.dumps(own)) == own
    assert own["rank"] == 3
    assert own["packages"]["torch"] == torch.__version__
    assert set(own["packages"]) == set(PACKAGES)
    assert own["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert own["gpu"] is None
    assert own["configuration"]["optimizer.learning_rate"] == "0.001"
    assert own["configuration"]["data.sources.1.kind"] == '"sft"'


def test_the_hash_is_of_every_setting(config, tmp_path):
    def hash_of(*overrides: str) -> str:
        other = load_config(tmp_path / "tiny.yaml", overrides)
        return describe_environment(other, 0, CPU, sees_run_folder=True)["configuration_hash"]

    assert (
        hash_of()
        == describe_environment(config, 5, CPU, sees_run_folder=False)["configuration_hash"]
    )
    assert hash_of("data.sources.1.parameters.max_word_len=6") != hash_of()
    assert hash_of("rewards.timeout=11") != hash_of()


def test_only_variables_of_nccl_are_told(config, monkeypatch):
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    own = describe_environment(config, 0, CPU, sees_run_folder=True)
    assert own["nccl"]["NCCL_CUMEM_ENABLE"] == "0"
    assert "a secret" not in json.dumps(own)


def test_processes_that_are_alike_fit(four):
    assert compare_environments(four) == []
    assert compare_environments(four[:1]) == []


def changed(environment: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for part in parents:
        environment = environment[part]
    environment[last] = value


@pytest.mark.parametrize(
    ("path", "there", "here", "line"),
    [
        (
            "packages/torch", "2.13.0", "2.11.0",
            "torch: 2.13.0 on ranks 0-1, 3 (node-a, node-b), 2.11.0 on rank 2 (node-b): "
            "pip install 'torch==2.13.0' there",
        ),
        (
            "packages/peft", None, "0.21.2",
            "peft: none on ranks 0-1, 3 (node-a, node-b), 0.21.2 on rank 2 (node-b): "
            "pip uninstall peft there",
        ),
        (
            "python", "3.11", "3.12",
            "python: 3.11 on ranks 0-1, 3 (node-a, node-b), 3.12 on rank 2 (node-b): use one "
            "release on all nodes, e.g. one container image",
        ),
        (
            "recap_fast", "0.1.0", "0.2.0",
            "recap-fast: 0.1.0 on ranks 0-1, 3 (node-a, node-b), 0.2.0 on rank 2 (node-b): "
            "install one release on all nodes",
        ),
        (
            "code", "aaaa", "bbbb",
            "recap-fast's files: aaaa on ranks 0-1, 3 (node-a, node-b), bbbb on rank 2 (node-b): "
            "check out or install one commit on all nodes",
        ),
        (
            "cuda", "13.0", None,
            "torch's CUDA: 13.0 on ranks 0-1, 3 (node-a, node-b), none on rank 2 (node-b): "
            "install the same build of torch on all nodes",
        ),
        (
            "nccl/NCCL_CUMEM_ENABLE", "0", "1",
            "NCCL_CUMEM_ENABLE: 0 on ranks 0-1, 3 (node-a, node-b), 1 on rank 2 (node-b): "
            "export NCCL_CUMEM_ENABLE=0 there",
        ),
        (
            "gpu/memory_gib", 80, 40,
            "GPU: NVIDIA H100 80GB HBM3, 80 GiB on ranks 0-1, 3 (node-a, node-b), NVIDIA H100 "
            "80GB HBM3, 40 GiB on rank 2 (node-b): ask the scheduler for one kind of GPU, and set "
            "model.device: cuda",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else "",
)  # fmt: skip
def test_a_line_names_ranks_values_and_remedy(four, path, there, here, line):
    for environment in four:
        environment["gpu"] = dict(environment["gpu"])
        changed(environment, path, here if environment["rank"] == 2 else there)
    assert compare_environments(four) == [line]


def test_the_majority_is_right_and_rank_0_among_equals(four):
    for rank in (0, 1):
        four[rank]["packages"]["torch"] = "2.11.0"
    (line,) = compare_environments(four)
    assert line.endswith("pip install 'torch==2.11.0' there")
    four[1]["packages"]["torch"] = four[2]["packages"]["torch"]
    (line,) = compare_environments(four)
    assert "2.11.0 on rank 0 (node-a)" in line
    assert not line.endswith("pip install 'torch==2.11.0' there")


def test_each_of_several_values_has_its_line(four):
    for rank, release in enumerate(["1", "1", "2", "3"]):
        four[rank]["packages"]["torch"] = release
    lines = compare_environments(four)
    assert ["2 on rank 2" in line for line in lines] == [True, False]
    assert ["3 on rank 3" in line for line in lines] == [False, True]


def test_a_variable_that_one_node_sets(four):
    four[3]["nccl"] = {"NCCL_ALGO": "Ring"}
    (line,) = compare_environments(four)
    assert line.startswith("NCCL_ALGO: none on ranks 0-2 (node-a, node-b), Ring on rank 3")
    assert line.endswith("unset NCCL_ALGO there")


def test_names_of_interfaces_may_differ(four):
    for rank, name in enumerate(["eth0", "eth0", "ens5", "ens5"]):
        four[rank]["nccl"] = {"NCCL_SOCKET_IFNAME": name, "NCCL_DEBUG_FILE": f"/tmp/{rank}"}  # noqa: S108
    assert compare_environments(four) == []


def test_settings_are_named_by_key(four, tmp_path, config):
    other = load_config(
        tmp_path / "tiny.yaml",
        ["optimizer.learning_rate=1e-5", "data.sources.0.parameters.min_terms=1"],
    )
    found = describe_environment(other, 1, CPU, sees_run_folder=True)
    four[1] |= {key: found[key] for key in ("configuration", "configuration_hash")}
    assert compare_environments(four) == [
        f"configuration, {key} on ranks 0, 2-3 (node-a, node-b), {value} on rank 1 (node-a): "
        "start every node with the same file and the same --set"
        for key, value in (
            ("data.sources.0.parameters.min_terms: 2", "1"),
            ("optimizer.learning_rate: 0.001", "1e-05"),
        )
    ]


def test_data_is_told_by_names_and_sizes(tmp_path, config):
    def data_of(content: str, path: str) -> str:
        (tmp_path / "rows.jsonl").write_text(content)
        source = {"name": "own", "kind": "sft", "path": str(tmp_path / path)}
        data = DataConfig.model_validate({"sources": [source]})
        changed = config.model_copy(update={"data": data})
        own = describe_environment(changed, 0, CPU, sees_run_folder=True)
        return own["data"]["own"]

    first = data_of("{}", "rows.jsonl")
    assert first.startswith("1 file, 2 bytes (")
    assert data_of("{}", "*.jsonl") == first
    assert data_of("{} ", "rows.jsonl") != first
    assert "other.jsonl" in data_of("{}", "other.jsonl")


def test_other_data_on_one_node(four):
    for environment in four:
        environment["data"] = {"own": "1 file, 2 bytes (aa)"}
    four[3]["data"] = {"own": "not there (x: no such file)"}
    assert compare_environments(four) == [
        "data.sources, own: 1 file, 2 bytes (aa) on ranks 0-2 (node-a, node-b), not there (x: no "
        "such file) on rank 3 (node-b): put the same files on all nodes, or name a disk that all "
        "mount"
    ]


def test_a_gpu_for_two_processes(four):
    four[1]["gpu"] = four[0]["gpu"]
    (line,) = compare_environments(four)
    assert line.startswith(
        "GPU GPU-0: used by ranks 0-1 (node-a) at once, wanted one process a GPU"
    )
    four[2]["gpu"], four[1]["gpu"] = four[0]["gpu"], four[3]["gpu"]  # as virtual machines number
    assert compare_environments(four) == []


def test_a_folder_that_is_not_shared(four):
    for rank in (2, 3):
        four[rank]["sees_run_folder"] = False
    (line,) = compare_environments(four)
    run = four[0]["run"]
    assert line == (
        f"run folder: {run} of rank 0 (node-a) is not what ranks 2-3 (node-b) see under {run}: "
        f"--set run=FOLDER with a folder on a disk that all nodes mount"
    )


def test_many_hosts_are_counted(four):
    many = [copy.deepcopy(four[0]) | {"rank": r, "host": f"n{r}", "gpu": None} for r in range(64)]
    many[9]["python"] = "3.14"
    (line,) = compare_environments(many)
    assert "on ranks 0-8, 10-63 (n0, n1, n2 and 60 more), 3.14 on rank 9 (n9)" in line


def test_a_token_is_seen_where_it_was_placed(tmp_path):
    token = place_token(tmp_path / "new" / "run")
    assert sees_token(tmp_path / "new" / "run", token, 0)
    assert not sees_token(tmp_path, token, 0)
    assert place_token(tmp_path) != token


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written: Not a directory"):
        place_token(tmp_path / "file" / "run")


def test_a_process_alone_fits_itself(config):
    (own,) = check_environments(config, ALONE)
    assert own["rank"] == 0
    assert own["sees_run_folder"]
    assert list(Path(config.run).glob(SHARED_FILE.format("*"))) == []


@pytest.mark.slow
def test_two_processes_end_with_the_same_words(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        tiny_config(folder, Path("any/model"))
        # The same name, as on two nodes; each process changes into its own folder.
        text = (folder / "tiny.yaml").read_text().replace(str(folder / "run"), "run")
        (folder / "tiny.yaml").write_text(text.replace("steps: 4", f"steps: {4 + rank}"))
    first, second = run_ranks(Path(__file__), 2, tmp_path, *map(str, folders))
    assert second["mismatch"] == f"rank 0: {first['mismatch']}", "which the first alone prints"
    title, *lines = first["mismatch"].splitlines()
    assert title == "the 2 processes do not fit together"
    assert [line.split(" on ")[0].strip() for line in lines[:2]] == [
        "configuration, training.steps: 4",
        "NCCL_ALGO: Ring",
    ]
    assert "run folder: " in lines[2]
    assert str(folders[1] / "run") in lines[2]
    assert len(lines) == 3
    assert [first["same"], second["same"]] == [[0, 1], [0, 1]]
    assert first["left"] == []


def _rank() -> None:
    """One of two processes: in folders of their own, and then in the first's."""
    folder = Path(sys.argv[1 + int(os.environ["RANK"])])
    os.chdir(folder)
    config = load_config("tiny.yaml")
    world = start_world(config)
    os.environ["NCCL_ALGO"] = ["Ring", "Tree"][world.rank]
    with pytest.raises(RankError if world.rank else EnvironmentMismatchError) as mismatch:
        check_environments(config, world, patience=0.3)
    os.environ["NCCL_ALGO"] = "Ring"
    os.chdir(sys.argv[1])
    same = check_environments(load_config("tiny.yaml"), world)
    left = [path.name for path in Path("run").glob(SHARED_FILE.format("*")) if world.is_main]
    report(mismatch=str(mismatch.value), same=[one["rank"] for one in same], left=left)
    world.close()


if __name__ == "__main__":
    _rank()
