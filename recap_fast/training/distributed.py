"""The processes of a run: who is there, and the little that they tell each other beside gradients.

torchrun starts one process a device. Each draws the same rows, samples and scores its own prompts,
and hears of all the others' in one exchange on the host; what follows from the whole step
(advantages, denominators, weights, who trains what) each computes alike. On the device there are
FSDP's own collectives and one sum of figures an update.

What is exchanged on the host is safetensors and JSON in one buffer: nothing is unpickled.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from recap_fast.config import ConfigError, MissingGpuError, RolloutConfig, TrainConfig
from recap_fast.model.policy import pick_device
from recap_fast.rollout.server_command import is_loopback
from recap_fast.types import (
    LostProcessError,
    OutOfMemoryError,
    StageError,
    UserError,
    WeightSyncError,
)

logger = logging.getLogger(__name__)

_NOTE = "__note__"
_PR_SET_PDEATHSIG = 1
_PARTING = 10.0
"""Seconds that rank 0 waits for the others before it leaves. They wait for it, or its death."""
_Result = TypeVar("_Result")


class RankError(UserError):
    """Another process of the run has failed, and this one with it.

    Attributes:
        kind: name of the class of what was raised there.
    """

    is_shared = True

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(slots=True, eq=False)
class World:
    """The processes that train together.

    Attributes:
        rank, size: this process among them.
        device: where this process trains.
        mesh: what FSDP shards over, (shard) or (replicate, shard); None for a process alone on a
            CPU, which needs no FSDP.
        timeout: seconds that a collective may take.
        limit: what they are called in messages.
        stage: what this process is doing, for messages.
        failed: whether it has failed at that.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    timeout: float = 600.0
    limit: str = "distributed.timeout"
    stage: str = "starting"
    failed: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, tensors: Mapping[str, Tensor], note: Any) -> list[tuple[Any, Any]]:
        """Every process's tensors (on the CPU) and JSON-able note, by rank."""
        if self.size == 1:
            return [(dict(tensors), note)]
        encoded = torch.frombuffer(bytearray(json.dumps(note), "utf-8"), dtype=torch.uint8)
        buffer = bytearray(save({**tensors, _NOTE: encoded}))
        own = torch.frombuffer(buffer, dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        received = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(received, padded)
        return [_decoded(one[: int(n)]) for one, n in zip(received, sizes, strict=True)]

    def exchange(
        self, work: Callable[[], tuple[Mapping[str, Tensor], Any]]
    ) -> list[tuple[Any, Any]]:
        """`gather` of what `work` returns. Where it fails in one process, it fails in all.

        Raises:
            UserError: what `work` raised here.
            RankError: what it raised elsewhere, and where; also where that is what it raised here.
                Both are marked as shared.
        """
        if self.size == 1:
            return self.gather(*work())
        error: UserError | None = None
        tensors: Mapping[str, Tensor] = {}
        note = None
        try:
            tensors, note = work()
        except UserError as problem:
            error = problem
        said = None if error is None else [str(error), type(error).__name__]
        found = self.gather(tensors, [said, note])
        for rank, (_, (other, _)) in enumerate(found):
            # Of several with the same error the first one says it.
            if other is not None and (error is None or (other == said and rank < self.rank)):
                raise RankError(f"rank {rank}: {other[0]}", kind=other[1]) from error
        if error is not None:
            error.is_shared = True
            raise error
        return [(tensors, note) for tensors, (_, note) in found]

    def together(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns here, which must not talk to other processes. Where it fails in one,
        it fails in all: raises what `exchange` does."""
        done: list[_Result] = []

        def run() -> tuple[dict[str, Tensor], None]:
            done.append(work())
            return {}, None

        self.exchange(run)
        return done[0]

    def one_by_host(self, work: Callable[[], _Result]) -> _Result:
        """`together`, but the first process of each host before the others, which then find what
        it has fetched."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            self.together(lambda: None)
            return self.together(work)
        result = self.together(work)
        self.together(lambda: None)
        return result

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work`, run by rank 0 alone, returns (JSON-able), in every process; or its error."""
        found = self.exchange(lambda: ({}, work() if self.is_main else None))
        return found[0][1]

    @contextmanager
    def failures_named(self) -> Iterator[None]:
        """Logs who failed at what, at once: torchrun may end this process on its way out.

        Raises:
            LostProcessError: in the place of the process group's own error.
            OutOfMemoryError: in the place of the allocators' errors.
        """
        try:
            yield
        except (UserError, WeightSyncError, StageError):
            self.failed = True
            raise  # their texts are the message
        except Exception as error:
            self.failed = True
            cause = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            if self.size > 1 and _is_of_a_collective(error):
                text = (
                    f"lost another process while {self.stage}: it has died, or did not answer for "
                    f"{self.limit} = {self.timeout:g} s; torchrun's table says which "
                    f"({cause})"
                )
                raise LostProcessError(self._logged(text)) from error
            if _is_of_memory(error):
                text = (
                    f"out of memory while {self.stage}: {cause}; `recap-fast train CONFIG "
                    f"--dry-run` says what takes how much, and which settings need less"
                )
                raise OutOfMemoryError(self._logged(text)) from error
            self._logged(f"failed while {self.stage}: {type(error).__name__}: {cause}")
            raise

    def _logged(self, text: str) -> str:
        text = text if self.size == 1 else f"rank {self.rank}: {text}"
        logger.error("%s", text)
        return text

    def any(self, here: bool) -> bool:
        """Whether it is so in one of the processes."""
        if self.size == 1:
            return here
        flag = torch.tensor([int(here)])
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def sum_and_max(self, sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
        """Over all processes, of two vectors on the device, in one collective; nothing waits."""
        if self.size == 1:
            return sums, maxima
        own = torch.cat([sums, maxima])
        table = own.new_empty(self.size, len(own))
        dist.all_gather(list(table.unbind()), own)
        return table[:, : len(sums)].sum(0), table[:, len(sums) :].amax(0)

    def log_to(self, folder: Path) -> None:
        """Has a process of several write its log into `folder`/rank-N.log too, with times."""
        if self.size == 1:
            return
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / f"rank-{self.rank}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("recap_fast").addHandler(handler)

    def log_once(self, log: logging.Logger, level: int, text: str) -> None:
        """Logs what all processes log alike: rank 0 to the console too, others to their files."""
        log.log(level if self.is_main else min(level, logging.INFO), "%s", text)

    def console(self) -> Console | None:
        """Where progress is shown: rank 0's standard output."""
        return None if self.is_main else Console(quiet=True)

    def close(self) -> None:
        """Leaves the others, once all are about to; after a failure at once."""
        if self.mesh is None or not dist.is_initialized():
            return
        self.mesh = None
        if self.failed and self.device.type == "cuda":
            return  # NCCL would wait for collectives that never end
        if self.size > 1 and not self.failed:
            # Where one process is gone while gloo's threads of another still read from it, that
            # other one has been seen to abort on its way out.
            with suppress(RuntimeError):
                dist.monitored_barrier(timeout=timedelta(seconds=_PARTING))
        dist.destroy_process_group()


ALONE = World(0, 1, torch.device("cpu"), None)
"""One process without FSDP."""


def _is_of_a_collective(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "ProcessGroup")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _is_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # of a CPU


def _decoded(data: Tensor) -> tuple[dict[str, Tensor], Any]:
    tensors = load(data.numpy().tobytes())
    note = json.loads(tensors.pop(_NOTE).numpy().tobytes())
    return tensors, note


def is_launched_with_others() -> bool:
    """Whether torchrun has started more processes than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start_world(config: TrainConfig) -> World:
    """Joins the processes that torchrun has started, or makes a world of this one.

    Raises:
        ConfigError: `distributed.replicas` or `rollout.tensor_parallel_size` does not divide the
            number of processes, there are fewer GPUs than processes on this host, servers are not
            reached from all hosts, or a CPU is to be offloaded.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = pick_device(config.model.device)
    if config.model.offload and device.type == "cpu":
        raise ConfigError(
            "model.offload: the device is a CPU, in whose memory everything is already: leave it "
            "out, or use a GPU (model.device=cuda)"
        )
    replicas = config.distributed.replicas
    check_divisors(config, f"{size} process{'es' if size > 1 else ''}", size)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    check_servers(config.rollout, size, here)
    sharing = config.rollout.processes_per_engine
    if here % sharing:
        logger.warning(
            "rollout.tensor_parallel_size is %d, and this host has %s processes: those that share "
            "an engine talk in each layer, which between hosts is slow",
            sharing, here,
        )  # fmt: skip
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    if device.type == "cpu" and size == 1:
        return World(0, 1, device, None)  # autocast over whole weights is faster there
    if device.type == "cuda":
        device = _own_gpu()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        _join(backend, rank, size, config.distributed.timeout)
    mesh = _mesh(device.type, size, replicas)
    return World(rank, size, device, mesh, config.distributed.timeout)


def start_host_world(timeout: float, limit: str) -> World:
    """Joins the processes that torchrun has started, or makes a world of this one, for work on the
    hosts alone, which needs no configuration.

    Args:
        timeout: seconds that a collective may take.
        limit: what messages call them.

    Raises:
        ConfigError: the processes cannot meet.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    cpu = torch.device("cpu")
    if size == 1:
        return World(0, 1, cpu, None)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    _join("gloo", rank, size, timeout)
    return World(rank, size, cpu, _mesh("cpu", size, 1), timeout, limit)


def _join(backend: str, rank: int, size: int, timeout: float) -> None:
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (dist.DistError, ValueError) as error:
        place = ":".join(os.environ.get(f"MASTER_{part}", "?") for part in ("ADDR", "PORT"))
        cause = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"process {rank} of {size} cannot join the others at {place}: {cause}; start all with "
            f"torchrun or examples/cluster/train.sh, on a port that is free on the first node and "
            f"that the others reach"
        ) from None


def check_divisors(config: TrainConfig, processes: str, size: int) -> None:
    """Raises `ConfigError` for settings that must divide the number of processes and do not.

    Args:
        processes: the number in words.
    """
    for name, value in (
        ("distributed.replicas", config.distributed.replicas),
        ("rollout.tensor_parallel_size", config.rollout.processes_per_engine),
    ):
        if size % value:
            raise ConfigError(f"{name} is {value}, which does not divide the {processes}")


def check_servers(config: RolloutConfig, size: int, here: int) -> None:
    """Raises `ConfigError` for servers that processes on other hosts would look for in vain.

    Args:
        size: processes of the run.
        here: those on this host.
    """
    if config.engine != "vllm_server" or here >= size:
        return
    near = [url for url in config.server.urls if is_loopback(url)]
    if config.server.urls and not near:
        return
    listens = f"{near[0]} is" if near else "servers that a run starts listen at"
    raise ConfigError(
        f"rollout.engine is vllm_server, and {here} of the {size} processes are on this host: "
        f"{listens} an address of loopback, which the other hosts do not reach; start servers with "
        f"`recap-fast serve CONFIG --host ADDRESS`, and name them in rollout.server.urls"
    )


def _end_with_launcher() -> None:
    """A torchrun that is killed would leave its processes behind, which train on and hold the GPUs:
    they get SIGTERM instead, save and stop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _own_gpu() -> torch.device:
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise MissingGpuError(
            f"this host has {there} GPUs, and torchrun has started process {local + 1} on it: "
            f"wanted --nproc-per-node {there} at most",
            is_first=local == max(there, 1),
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def _mesh(kind: str, size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    shape = (replicas, size // replicas)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
