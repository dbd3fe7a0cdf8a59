"""Where the trainer puts a version of the weights for its servers: memory of the host, or a GPU's.

On the host that is a file of memory that has no name anywhere (memfd): no death of the trainer or
of a server leaves memory behind, and what a container allows /dev/shm does not matter. Either way
they stay there until the next update, for a server that was restarted to take over at once.
"""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recap_fast.rollout.cuda_memory import ExportedMemory
from recap_fast.rollout.protocol import column_picks
from recap_fast.rollout.sent_weights import MEMORY_NAME, SharedWeights, place, views
from recap_fast.rollout.server_client import ServerTrouble
from recap_fast.rollout.server_worker import digest
from recap_fast.types import WeightSyncError

logger = logging.getLogger(__name__)

DIGEST_COLUMNS = 2
"""Of each weight, that are compared after every update."""
_OFTEN_MISSING = frozenset(("visual", "experts"))
"""Parts of names: an image tower that no row has images for, experts that vLLM lays together."""


@dataclass(frozen=True, slots=True)
class WrittenWeights:
    """One version of the weights, as servers are told of it."""

    version: int
    update_info: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]
    digests: Mapping[str, str]
    """Of `DIGEST_COLUMNS` columns of each weight, in the engine's dtype."""


class MemoryFile:
    """Named tensors, one behind the other, in a file of memory."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create(MEMORY_NAME, os.MFD_CLOEXEC)
        self.clear()

    def clear(self) -> None:
        """What is added next goes over what is there."""
        self._index: list[list[Any]] = []
        self._end = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Args:
        tensor: on the host, contiguous.
        """
        self._end = place(self._index, name, tensor.dtype, tensor.shape)
        _write_all(self._descriptor, tensor, self._index[-1][3])

    def finish(self) -> SharedWeights:
        """Everything that was added."""
        os.ftruncate(self._descriptor, self._end)
        return SharedWeights(os.getpid(), self._descriptor, self._index)

    def close(self) -> None:
        os.close(self._descriptor)


class SharedMemoryWeights:
    """A file of memory, rewritten for each version. No server may read it meanwhile."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._file = MemoryFile()
        self.close = self._file.close

    def write(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: int,
        see: Callable[[str, Tensor], None] | None = None,
    ) -> WrittenWeights:
        """Takes a stream of weights, one at a time; they are stored in the engine's dtype.

        Args:
            see: is shown each weight as it is stored, before it goes over the version before.
        """
        digests: dict[str, str] = {}
        self._file.clear()
        for name, tensor in named_tensors:
            stored = tensor.detach().to("cpu", self._dtype).contiguous()
            if see is not None:
                see(name, stored)
            self._file.add(name, stored)
            digests[name] = digest(sample_columns(stored, DIGEST_COLUMNS))
        return written(version, "shared_memory", vars(self._file.finish()), digests)


class DeviceMemoryWeights:
    """The same in the memory of a GPU: whole, so that a server that was restarted finds them there.

    Args:
        shapes: of every weight that will come, by name.
        allocate: gives memory of a number of bytes that servers may open.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shapes: Mapping[str, Sequence[int]],
        allocate: Callable[[int], ExportedMemory],
    ) -> None:
        self._index: list[list[Any]] = []
        end = 0
        for name, shape in shapes.items():
            end = place(self._index, name, dtype, shape)
        self._memory = allocate(end)
        self._views = dict(views(self._index, self._memory.bytes))

    def write(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> WrittenWeights:
        """Raises `WeightSyncError` for a weight that nobody spoke of."""
        digests: dict[str, str] = {}
        for name, tensor in named_tensors:
            stored = self._views.get(name)
            if stored is None or stored.shape != tensor.shape:
                wanted = "no such weight" if stored is None else list(stored.shape)
                raise WeightSyncError(f"{name}: wanted {wanted}, got {list(tensor.shape)}")
            stored.copy_(tensor.detach())
            # Copied to the host, so this weight, and all before it, have arrived.
            digests[name] = digest(sample_columns(stored, DIGEST_COLUMNS))
        info = {
            "handle": base64.b64encode(self._memory.handle).decode(),
            "nbytes": self._memory.bytes.nbytes,
            "index": self._index,
        }
        return written(version, "ipc", info, digests)

    def close(self) -> None:
        self._views.clear()
        self._memory.close()


class Comparison:
    """Holds what servers show of their weights against what they should have, by digests.

    What vLLM keeps in another shape than a checkpoint cannot be shown, and goes unchecked. That is
    said, once; it may be no more than the lesser part, and nothing that has been shown before.
    """

    def __init__(self) -> None:
        self._shown: frozenset[str] | None = None

    def differing(self, url: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
        """Names of weights of the server at `url` that have other digests than wanted.

        Raises:
            ServerTrouble: it shows too few to say so.
        """
        missing = sorted(wanted.keys() - found.keys())
        named = ", ".join(missing[:5]) + (", ..." if missing[5:] else "")
        usual = [name for name in wanted if not _OFTEN_MISSING.intersection(name.split("."))]
        is_less = self._shown is not None and not self._shown.isdisjoint(missing)
        if is_less or 2 * sum(name in found for name in usual) < len(usual) or not found:
            raise ServerTrouble(
                f"{url} shows {len(found)} of {len(wanted)} weights, too few to know what it has: "
                f"{named} cannot be read back"
            )
        wrong = sorted(name for name, value in found.items() if value != wanted.get(name))
        if self._shown is None and not wrong:
            self._shown = frozenset(found)
            if missing:
                logger.warning(
                    "of the servers' %d weights %d are compared after an update, and not: %s",
                    len(wanted),
                    len(found),
                    named,
                )
        return wrong


def written(
    version: int, transfer: str, info: Mapping[str, Any], digests: Mapping[str, str]
) -> WrittenWeights:
    """What servers are told of weights that lie ready for them.

    Args:
        transfer: how they are sent, as the server's engine knows it.
        info: fields of that way's record, with an index.
    """
    shapes = {name: tuple(shape) for name, _, shape, _ in info["index"]}
    return WrittenWeights(version, {"transfer": transfer, **info}, shapes, digests)


def sample_columns(weight: Tensor, count: int) -> Tensor:
    """Up to `count` evenly spaced columns of a matrix; anything else whole."""
    if weight.ndim != 2:
        return weight
    return weight[:, column_picks(weight.shape[1], count).to(weight.device)]


def _write_all(descriptor: int, tensor: Tensor, offset: int) -> None:
    values: Any = tensor.view(-1).view(torch.uint8).numpy()
    left = memoryview(values)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
