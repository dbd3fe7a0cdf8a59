"""Adapters that servers load beside the base, each version under a name of its own.

The base is what servers have read from the model's folder, as the trainer has; nothing trains it,
and it is compared, not sent. A version of the adapters is a folder in peft's format, which servers
of this host read. A request names the version that it wants and is sampled from that one to its
end, so nothing pauses, and no key or value is ever another version's: vLLM's prefix cache goes by
the name.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from recap_fast.model.lora import (
    ADAPTERS_FILE,
    adapted_layer,
    adapter_scales,
    save_settings,
    whole_adapters,
)
from recap_fast.rollout.server_client import ServerClient, ServerTrouble
from recap_fast.rollout.server_label import taken
from recap_fast.rollout.server_worker import adapter_digest, digest
from recap_fast.rollout.shared_weights import DIGEST_COLUMNS, Comparison, sample_columns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "policy-"


@dataclass(frozen=True, slots=True)
class NamedVersion:
    """One version of the adapters."""

    version: int
    name: str
    folder: Path
    ranks: Mapping[str, int]
    """Of each adapted layer."""
    digests: Mapping[str, str]
    """`adapter_digest` of each adapted layer, in the engine's dtype."""


class NamedAdapters:
    """The versions that may still be asked for, in a folder that only this user can read.

    Args:
        dtype: the engine's.
        slots: how many versions a server holds at a time.
        run: whose they are.
    """

    def __init__(self, dtype: torch.dtype, slots: int, run: str) -> None:
        self._dtype, self._slots, self._run = dtype, slots, run
        self._root = Path(tempfile.mkdtemp(prefix="recap-fast-adapters-"))  # mode 0700
        self._live: list[NamedVersion] = []
        self._retired: list[NamedVersion] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._base: dict[str, str] = {}
        """Digests of some columns of the base's weights."""
        self._comparison = Comparison()
        self._seen: dict[ServerClient, set[str]] = {}
        """Names whose values each server was seen to hold."""

    @property
    def newest(self) -> NamedVersion | None:
        return self._live[-1] if self._live else None

    def note_base(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the base's weights, as `base_weights` gives them, to compare servers' with."""
        for name, tensor in weights:
            self._shapes[name] = tuple(tensor.shape)
            self._base[name] = digest(sample_columns(tensor, DIGEST_COLUMNS).to(self._dtype))

    def write(self, model: PreTrainedModel, version: int) -> NamedVersion:
        """Makes a new version of a model's adapters, which every process takes part in; the oldest
        is no longer live where there are more than servers hold."""
        # Never a name again, in any run: what a server keeps under it would pass for the new one.
        name = f"{_own_prefix(self._run)}{version}-{secrets.token_hex(6)}"
        tensors = {
            name: tensor.to("cpu", self._dtype, copy=True).contiguous()
            for name, tensor in whole_adapters(model)
        }
        folder = self._root / name
        save_settings(model, folder)
        save_file(tensors, folder / ADAPTERS_FILE)
        layers: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            layer, part = adapted_layer(key)
            layers.setdefault(layer, {})[part] = tensor
        scales = adapter_scales(model)
        found = NamedVersion(
            version,
            name,
            folder,
            {layer: parts["lora_A"].shape[0] for layer, parts in layers.items()},
            {  # vLLM scales B as it loads it, in this dtype
                layer: adapter_digest(parts["lora_A"], parts["lora_B"] * scales[layer])
                for layer, parts in layers.items()
            },
        )
        # A folder stays for one version longer: a server may have to read it for what it samples.
        for old in self._retired:
            shutil.rmtree(old.folder)
        live = [*self._live, found]
        self._retired, self._live = live[: -self._slots], live[-self._slots :]
        return found

    async def give(self, client: ServerClient) -> None:
        """Has a server hold the live versions, if there are any, and no other, and sees what it has
        of each that it loads. Versions that are written meanwhile are among them.

        Raises:
            OtherRunError: since it was given some, another run has given it others.
            ServerTrouble, EngineError: it does not.
        """
        newest = None
        while newest is not self.newest:
            newest, live = self.newest, list(self._live)
            there = {name for name in await client.adapters() if name.startswith(_PREFIX)}
            theirs = sorted(name for name in there if not name.startswith(_own_prefix(self._run)))
            if theirs and client in self._seen:  # what a run that has ended has left goes, but once
                raise taken(theirs[-1], self._run, client.url)
            seen = self._seen.get(client, set()) & there & {one.name for one in live}
            if not seen:  # new here, or started again
                await self._check_base(client)
            for name in sorted(there - seen):
                await client.unload_adapter(name)
            self._seen[client] = seen
            for one in live:  # the newest last: vLLM drops what was used longest ago
                if one.name not in seen:
                    await client.load_adapter(one.name, one.folder)
                    await _check(client, one)
                    seen.add(one.name)
            there = set(await client.adapters())
            if missing := [one.name for one in live if one.name not in there]:
                raise ServerTrouble(f"{client.url} lacks {', '.join(missing)} after loading it")

    async def _check_base(self, client: ServerClient) -> None:
        held = await client.digests(self._shapes, DIGEST_COLUMNS)
        if wrong := self._comparison.differing(client.url, held, self._base):
            raise ServerTrouble(
                f"{client.url} has another base than the trainer in {len(wrong)} of {len(held)} "
                f"weights: {', '.join(wrong[:5])}; start it again from this run's model.path"
            )

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


def _own_prefix(run: str) -> str:
    return f"{_PREFIX}{run}-"


async def _check(client: ServerClient, wanted: NamedVersion) -> None:
    """Sees whether a server computes with the values of a version that it has just loaded."""
    held = await client.adapter_digests(wanted.ranks)
    wrong = [
        sorted(name for name, value in wanted.digests.items() if layers.get(name) != value)
        for layers in held.values()
    ]
    closest = min(wrong, key=len, default=sorted(wanted.digests))
    if closest:
        shown = ", ".join(closest[:5])
        raise ServerTrouble(
            f"{client.url} does not hold the values of {wanted.name} in {len(closest)} of "
            f"{len(wanted.digests)} layers: {shown}"
        )
