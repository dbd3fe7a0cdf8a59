"""What a version of the weights changes in the one before, for servers that hold that one.

Compared, sent and applied as bits, so that a patched copy is the new version, NaN and -0.0
included. A patch is a sequence of named tensors. A weight that is in it under its own name alone is
whole. One that comes right behind its positions, int[n] in the flattened weight, is its n values
there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from recap_fast.rollout.sent_weights import BroadcastWeights, Group, SharedWeights, views
from recap_fast.rollout.shared_weights import MemoryFile

_POSITIONS = "positions in "
_INT32_VALUES = 2**31
"""Values of a weight whose positions fit into int32."""
_CHUNK = 2**20
"""Values compared at a time: what is known of them stays in a core's cache."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Changes:
    """Finds them while a version is written over the one before, weight by weight.

    Args:
        before: that version, in the memory that is written over.
        file: where the patch goes. It takes at most about what the weights take.
    """

    def __init__(self, before: SharedWeights, file: MemoryFile) -> None:
        self._before = before.index
        self._memory = before.bytes()
        self._file = file
        self._seen = 0
        self._is_alike = True
        file.clear()

    def see(self, name: str, tensor: Tensor) -> None:
        """The next weight, on the host, contiguous and in the engine's dtype. Not yet written."""
        entries = self._before[self._seen : self._seen + 1]
        self._seen += 1
        described = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        self._is_alike &= [entry[:3] for entry in entries] == [described]
        if not self._is_alike:
            return
        [(_, old)] = views(entries, self._memory)
        positions = differing(old, tensor)
        if positions is None:
            self._file.add(name, tensor)
        elif len(positions):
            self._file.add(_POSITIONS + name, positions)
            self._file.add(name, tensor.view(-1)[positions.long()])

    def patch(self) -> SharedWeights | None:
        """What was found, after the last weight. None: the versions have other weights."""
        if not self._is_alike or self._seen != len(self._before):
            return None
        return self._file.finish()


def differing(old: Tensor, new: Tensor) -> Tensor | None:
    """Where two contiguous tensors differ in a bit.

    Returns:
        Positions in the flattened tensors: int32[n], or int64[n] where those do not fit. None where
        positions and values would take more bytes than the whole tensor.
    """
    assert old.shape == new.shape
    dtype = torch.int32 if new.numel() <= _INT32_VALUES else torch.int64
    most = new.nbytes // (dtype.itemsize + new.itemsize)
    found = [torch.empty(0, dtype=dtype)]
    count = 0
    pairs = zip(_bits(old).split(_CHUNK), _bits(new).split(_CHUNK), strict=True)
    for place, (old_bits, new_bits) in enumerate(pairs):
        positions = (old_bits != new_bits).nonzero().view(-1)
        count += len(positions)
        if count > most:
            return None
        found.append((positions + place * _CHUNK).to(dtype))
    return torch.cat(found)


class HostCopy:
    """A server's copy of the last whole version: on its host, in the engine's dtype."""

    def __init__(self) -> None:
        self._version: str | None = None
        self._tensors: dict[str, Tensor] = {}

    def receive(
        self, told: BroadcastWeights, group: Group, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Takes what a group is sent, and gives all weights of the new version, on the device.

        Raises:
            RuntimeError: it is a patch of a version that is not here. The others of the group have
                received it then.
        """
        received = told.receive(group, device)
        if told.against is None:
            self._version = None
            self._tensors.clear()
            return received if told.version is None else self._kept(received, told.version)
        assert told.version is not None
        return self._patched(received, told.against, told.version, device)

    def _kept(
        self, received: Iterable[tuple[str, Tensor]], version: str
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in received:
            self._tensors[name] = tensor.to("cpu", copy=True)
            yield name, tensor
        self._version = version

    def _patched(
        self,
        received: Iterator[tuple[str, Tensor]],
        against: str,
        version: str,
        device: torch.device,
    ) -> Iterator[tuple[str, Tensor]]:
        if self._version != against:
            for _ in received:
                pass
            raise RuntimeError(
                f"the trainer sent what has changed since version {against}, and the server holds "
                f"{self._version or 'none'}"
            )
        self._version = None  # neither, until all of it is there
        positions = None
        for name, tensor in received:
            if name.startswith(_POSITIONS):
                positions = tensor.cpu().long()
                continue
            copy, values = _bits(self._tensors[name]), _bits(tensor.cpu())
            if positions is None:
                copy.copy_(values)
            else:
                copy[positions] = values
            positions = None
        self._version = version
        for name, tensor in self._tensors.items():
            # Copies on a CPU too: vLLM may hold a layer's back, and write into what it loads.
            yield name, tensor.to(device, copy=True)


def _bits(tensor: Tensor) -> Tensor:
    """A contiguous tensor, flat, in integers of its values' size. Nothing is copied."""
    return tensor.view(-1).view(_BITS[tensor.itemsize])
