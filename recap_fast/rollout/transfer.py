"""How weights come to servers: they take them out of memory, or the trainer sends them."""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from recap_fast.config import ServerConfig
from recap_fast.rollout import nccl_group
from recap_fast.rollout.cuda_memory import ExportedMemory
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.sent_weights import (
    PIECE,
    BroadcastWeights,
    Group,
    GroupInfo,
    SharedWeights,
    in_thread,
)
from recap_fast.rollout.server_client import ServerClient, ServerTrouble, each
from recap_fast.rollout.shared_weights import (
    DeviceMemoryWeights,
    MemoryFile,
    SharedMemoryWeights,
    WrittenWeights,
    written,
)
from recap_fast.rollout.weight_patch import Changes

Kind = Literal["shared_memory", "ipc", "nccl", "nccl_sparse"]


class Transfer(Protocol):
    """What a pool of servers gets its weights through.

    Attributes:
        is_joint: servers that are given weights at the same time take them in one step, all or
            none; otherwise each by itself.
        sent_bytes: that were broadcast so far. What servers read by themselves is not among them.
    """

    is_joint: bool
    sent_bytes: int

    def write(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> WrittenWeights:
        """Takes a stream of weights, to be sent until the next call. None is being sent now."""
        ...

    async def send(
        self, clients: Sequence[ServerClient], weights: WrittenWeights
    ) -> Mapping[ServerClient, Exception]:
        """Gives servers that have been readied what was written. Returns those that failed."""
        ...

    def forget(self, client: ServerClient) -> None:
        """A server has failed, and will come back as another, if at all."""
        ...

    def close(self) -> None: ...


class MemoryTransfer:
    """Each server reads the weights where they were written."""

    is_joint = False
    sent_bytes = 0

    def __init__(self, store: SharedMemoryWeights | DeviceMemoryWeights) -> None:
        self.write = store.write
        self.close = store.close

    async def send(
        self, clients: Sequence[ServerClient], weights: WrittenWeights
    ) -> Mapping[ServerClient, Exception]:
        return await each(clients, lambda x: x.receive(weights.update_info, weights.version))

    def forget(self, client: ServerClient) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Stored:
    """What can be broadcast: all weights, or a patch."""

    memory: SharedWeights
    told: BroadcastWeights


class NcclTransfer:
    """The trainer broadcasts to all servers, from a copy on its host.

    The copy is there for a server that comes back while the trainer trains: it forms a group of two
    with the trainer, and gets the weights alone. At the next version all form one again. Nothing
    is gathered from other processes while anything is sent.

    With `sparse`, servers keep a copy of their own, and are sent what a version changes in the one
    before where all of a round hold that one; everything, where one does not.

    Args:
        timeout: seconds in which a group must be there, and in which all must be sent.
        new_unique_id, join: NCCL's, but in tests.
        piece: bytes of each broadcast.
        sparse: see above.
    """

    is_joint = True

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        timeout: float,
        new_unique_id: Callable[[], bytes] = nccl_group.new_unique_id,
        join: Callable[..., Group] = nccl_group.join,
        piece: int = PIECE,
        sparse: bool = False,
    ) -> None:
        self._store = SharedMemoryWeights(dtype)
        self._device, self._timeout, self._piece = device, timeout, piece
        self._new_unique_id, self._join = new_unique_id, join
        self._group: tuple[tuple[ServerClient, ...], Group] | None = None
        self._lock = asyncio.Lock()
        self._whole: _Stored | None = None
        self._patch_file = MemoryFile() if sparse else None
        self._patch: _Stored | None = None
        self._held: dict[ServerClient, str | None] = {}
        """Versions that servers have a copy of."""
        self._sent = 0
        self.sent_bytes = 0

    def write(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> WrittenWeights:
        before, self._whole, self._patch = self._whole, None, None  # until all has been written
        changes, name = None, None
        if self._patch_file is not None:
            # A number may come twice with other weights: a step that is taken again.
            name = f"{version}-{secrets.token_hex(8)}"
            if before is not None:
                changes = Changes(before.memory, self._patch_file)
        on_host = self._store.write(named_tensors, version, changes.see if changes else None)
        info = dict(on_host.update_info)
        del info["transfer"]
        self._whole = self._described(SharedWeights(**info), name, None)
        if changes and before and (patch := changes.patch()):
            self._patch = self._described(patch, name, before.told.version)
        return written(version, "nccl", vars(self._whole.told), on_host.digests)

    def _described(
        self, memory: SharedWeights, version: str | None, against: str | None
    ) -> _Stored:
        nbytes = len(memory.bytes())
        told = BroadcastWeights(nbytes, self._piece, memory.index, version, against)
        return _Stored(memory, told)

    async def send(
        self, clients: Sequence[ServerClient], weights: WrittenWeights
    ) -> Mapping[ServerClient, Exception]:
        async with self._lock:  # one group at a time
            if self._group is not None and self._group[0] == tuple(clients):
                return await self._broadcast(clients, weights)
            self._drop()
            sizes: dict[ServerClient, int] = {}

            async def ask(client: ServerClient) -> None:
                sizes[client] = await client.world_size()

            absent = await each(clients, ask)
            present = [client for client in clients if client in sizes]
            if not present:
                return absent
            failed = await self._form({client: sizes[client] for client in present})
            return {**absent, **(failed or await self._broadcast(present, weights))}

    async def _form(self, sizes: Mapping[ServerClient, int]) -> Mapping[ServerClient, Exception]:
        """Args:
            sizes: processes of each server.

        Raises:
            EngineError: the trainer has no NCCL.
        """
        try:
            unique_id = await asyncio.wrap_future(in_thread(self._new_unique_id, "loading NCCL"))
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise EngineError(f"NCCL cannot be used here: {error}") from error
        self._sent = 0
        world_size = 1 + sum(sizes.values())
        infos, rank = {}, 1
        for client, size in sizes.items():
            infos[client] = GroupInfo(
                base64.b64encode(unique_id).decode(),
                rank,
                world_size,
                self._timeout,
                os.environ.get("NCCL_CUMEM_ENABLE"),
            )
            rank += size
        work = partial(self._join, unique_id, rank=0, world_size=world_size, device=self._device)
        joining = in_thread(work, "forming a group with the servers")
        try:
            failed = await self._together(
                f"forming a group with {len(sizes)} servers",
                asyncio.wrap_future(joining),
                {client: client.join(vars(info)) for client, info in infos.items()},
            )
            if not failed:
                self._group = tuple(sizes), joining.result()
        finally:
            if self._group is None:
                joining.add_done_callback(_leave)  # it may come about yet
        return failed

    async def _broadcast(
        self, clients: Sequence[ServerClient], weights: WrittenWeights
    ) -> Mapping[ServerClient, Exception]:
        assert self._group is not None
        assert self._whole is not None
        group, chosen, patch = self._group[1], self._whole, self._patch
        held = [self._held.pop(client, None) for client in clients]  # again, if all goes well
        if patch is not None and all(version == patch.told.against for version in held):
            chosen = patch
        self._sent = 0

        def work() -> None:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of this thread
            for sent in chosen.told.send(chosen.memory.bytes(), group, self._device):
                self._sent = sent
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()

        info = {"transfer": "nccl", **vars(chosen.told)}
        try:
            failed = await self._together(
                f"sending the weights of step {weights.version} to {len(clients)} servers",
                asyncio.wrap_future(in_thread(work, "sending weights")),
                {x: x.receive(info, weights.version) for x in clients},
            )
        except asyncio.CancelledError:
            self._drop()  # what was begun goes on, and would be taken for what is sent next
            raise
        self.sent_bytes += self._sent
        self._held |= {x: chosen.told.version for x in clients if x not in failed}
        if failed:
            self._drop()
        return failed

    async def _together(
        self,
        stage: str,
        ours: asyncio.Future[Any],
        theirs: Mapping[ServerClient, Coroutine[Any, Any, None]],
    ) -> Mapping[ServerClient, Exception]:
        """Waits for what the trainer and all servers do at the same time.

        Returns:
            Servers that failed. If one does before the trainer has done its part, the others wait
            for it in vain, and fail too.
        """
        until = time.monotonic() + self._timeout
        tasks = {client: asyncio.create_task(work) for client, work in theirs.items()}
        futures = {ours, *tasks.values()}
        try:
            await asyncio.wait(futures, timeout=self._timeout, return_when=asyncio.FIRST_EXCEPTION)
            is_done = ours.done() and ours.exception() is None
            if is_done:
                await asyncio.wait(tasks.values(), timeout=max(0.0, until - time.monotonic()))
            late = {client for client, task in tasks.items() if not task.done()}
            errors = {
                x: e for x, task in tasks.items() if x not in late and (e := task.exception())
            }
            problems = [f"{client.url}: {error}" for client, error in errors.items()]
            if ours.done() and (error := ours.exception()):
                problems.insert(0, str(error) or type(error).__name__)
            if not problems and (late or not is_done):
                sent = f", and {self._sent / 2**30:.2f} GiB were sent" if self._sent else ""
                problems = [f"not done within {self._timeout:g} s{sent}"]
        finally:
            for future in futures:
                future.cancel()
        failed = {*errors, *late} if is_done else set(tasks)
        return dict.fromkeys(failed, ServerTrouble(f"{stage}: {'; '.join(problems)}"))

    def forget(self, client: ServerClient) -> None:
        self._held.pop(client, None)
        if self._group is not None and client in self._group[0]:
            self._drop()

    def _drop(self) -> None:
        if self._group is not None:
            group, self._group = self._group[1], None
            in_thread(group.abort, "leaving a group of servers")  # which may take a while

    def close(self) -> None:
        self._drop()
        self._store.close()
        if self._patch_file is not None:
            self._patch_file.close()


def choose(
    config: ServerConfig, device: torch.device, is_local: bool, neighbours: Sequence[int]
) -> Kind:
    """What `rollout.server.transfer` says, or "auto" means here.

    Args:
        device: the trainer's.
        is_local: whether all servers are on the trainer's host, as far as their addresses say.
        neighbours: the GPUs of servers of our own.

    Raises:
        EngineError: it cannot run here.
    """
    kind = config.transfer
    if device.type != "cuda":
        if kind not in ("auto", "shared_memory"):
            raise EngineError(
                f"rollout.server.transfer is {kind}, which takes weights from a GPU, and the model "
                f"is on {device.type}: --set rollout.server.transfer=shared_memory"
            )
        return "shared_memory"
    if kind == "auto":
        kind = "nccl"
        if is_local:
            visible = torch.cuda.device_count()
            reached = all(
                gpu < visible and torch.cuda.can_device_access_peer(gpu, device)
                for gpu in neighbours
            )
            kind = "ipc" if reached else "shared_memory"
    if kind in ("nccl", "nccl_sparse") and find_spec("vllm") is None:
        raise EngineError(
            f"weights go to servers by {kind} (rollout.server.transfer), for which the trainer too "
            "needs vllm installed"
        )
    return kind


def make_transfer(
    kind: Kind,
    dtype: torch.dtype,
    device: torch.device,
    shapes: Mapping[str, Sequence[int]],
    timeout: float,
) -> Transfer:
    """Args:
    shapes: of all weights.
    timeout: seconds in which servers must have taken weights over.
    """
    if device.type == "cuda" and device.index is None:  # another thread has another current one
        device = torch.device("cuda", torch.cuda.current_device())
    if kind in ("nccl", "nccl_sparse"):
        return NcclTransfer(dtype, device, timeout, sparse=kind == "nccl_sparse")
    if kind == "ipc":
        allocate = partial(ExportedMemory, device=device)
        try:
            return MemoryTransfer(DeviceMemoryWeights(dtype, shapes, allocate))
        except RuntimeError as error:
            raise EngineError(f"{error}: --set rollout.server.transfer=shared_memory") from error
    return MemoryTransfer(SharedMemoryWeights(dtype))


def _leave(joining: Future[Group]) -> None:
    if not joining.cancelled() and joining.exception() is None:
        joining.result().abort()
