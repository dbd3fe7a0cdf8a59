"""The safetensors files of a model's folder, and which of their tensors are which of the model's.

Names of older checkpoints are turned into the present ones by transformers' own mapping, as
`from_pretrained` does it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from recap_fast.model.errors import ModelError
from recap_fast.model.policy import refuse_missing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
_COMPARED = 4096  # rows at a time of two tensors that should be one


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where each tensor of a folder is.

    Attributes:
        files: by the tensor's key.
    """

    folder: Path
    files: Mapping[str, Path]

    def slices(self, keys: Collection[str]) -> Iterator[tuple[str, Any]]:
        """Each key with a slice of safetensors, which reads what is asked of it through a memory
        map; a file's map is gone when the next file's turn has come.

        Raises:
            ModelError: a file is damaged, or lacks what the index says is in it.
        """
        for path in sorted({self.files[key] for key in keys}):
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    for key in sorted(key for key in keys if self.files[key] == path):
                        yield key, file.get_slice(key)
            except (OSError, SafetensorError) as error:
                raise ModelError(f"model.path: {path} cannot be read: {error}") from error


def find_weight_files(folder: Path) -> WeightFiles:
    """Reads the names of a folder's tensors.

    Raises:
        ModelError: its weights are in another format, or a file is damaged or not there.
    """
    if (folder / _FILE).is_file():
        return WeightFiles(folder, dict.fromkeys(_keys(folder / _FILE), folder / _FILE))
    if not (folder / _INDEX).is_file():
        raise ModelError(f"model.path: {folder} has {_what_instead(folder)}")
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {str(key): folder / name for key, name in index.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model.path: {folder / _INDEX} cannot be read: {error!r}") from error
    if absent := sorted({path.name for path in files.values() if not path.is_file()}):
        raise ModelError(
            f"model.path: {folder} lacks {len(absent)} of the files that {_INDEX} names, such as "
            f"{absent[0]}"
        )
    return WeightFiles(folder, files)


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.path: {path} cannot be read: {error}") from error


def _what_instead(folder: Path) -> str:
    others = sorted(path.name for glob in _OTHER_FORMATS for path in folder.glob(glob))
    if not others:
        return f"neither {_FILE} nor {_INDEX}"
    return (
        f"its weights in {others[0]}, of which a process cannot read a part: load it with "
        f"transformers' from_pretrained, write it with save_pretrained to a new folder, once, and "
        f"name that one"
    )


def match_names(model: PreTrainedModel, weights: WeightFiles) -> dict[str, str]:
    """The file's key of each of a model's parameters and saved buffers; of tied ones, of one alone.

    Args:
        model: on the meta device, not sharded: FSDP renames the classes that the mapping goes by.

    Raises:
        ModelError: weights are missing, are stored so that they must be computed with, or differ
            where the model ties them.
    """
    found, unexpected = _rename(model, weights)
    _untie(model, weights, found)
    tied = getattr(model, "all_tied_weights_keys", {})
    covered = set(found) | {target for target, source in tied.items() if source in found}
    names = SimpleNamespace(
        missing_keys=set(model.state_dict()) - covered, unexpected_keys=unexpected
    )
    model._adjust_missing_and_unexpected_keys(names)
    refuse_missing(names.missing_keys, str(weights.folder))
    if names.unexpected_keys:
        logger.warning(
            "%s has %d weights that the model has not, such as %s: they are not loaded",
            weights.folder, len(names.unexpected_keys), min(names.unexpected_keys),
        )  # fmt: skip
    return found


def _rename(model: PreTrainedModel, weights: WeightFiles) -> tuple[dict[str, str], set[str]]:
    """Keys by the model's names, and names that the model has not."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    conversions = get_model_conversion_mapping(model)
    renamings = [x for x in conversions if isinstance(x, WeightRenaming)]
    converters = [x for x in conversions if isinstance(x, WeightConverter)]
    wanted = model.state_dict()
    found: dict[str, str] = {}
    unexpected, computed = set(), []
    for key in sorted(weights.files, key=dot_natural_key):  # the order that renamings count on
        prefix = model.base_model_prefix
        name, converter = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, converter = key, None
        if converter is not None:
            computed.append(key)
        elif name in wanted:
            found.setdefault(name, key)
        else:
            unexpected.add(name)
    if computed:
        raise ModelError(
            f"model.path: {len(computed)} weights of {weights.folder}, such as {computed[0]}, are "
            f"stored in parts that transformers puts together ({type(model).__name__}), which is "
            f"not supported on more than one process"
        )
    # Saving turns the names back by what turned them here.
    model._weight_conversions = [x for x in conversions if x.was_used()]
    return found, unexpected


def _untie(model: PreTrainedModel, weights: WeightFiles, found: dict[str, str]) -> None:
    """Leaves of tied weights the one that is first in the model, whichever the files have."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target not in found:
            continue
        key = found.pop(target)
        if source in found and not _equal(weights, key, found[source]):
            raise ModelError(
                f"model.path: {weights.folder} has other values in {key} than in {found[source]}, "
                f"which its config.json ties: set tie_word_embeddings to false in it"
            )
        found.setdefault(source, key)


def _equal(weights: WeightFiles, first: str, second: str) -> bool:
    views = []
    for key in (first, second):  # which may be in one file or in two: both stay open
        [(_, view)] = weights.slices([key])
        views.append(view)
    shape = views[0].get_shape()
    if shape != views[1].get_shape() or views[0].get_dtype() != views[1].get_dtype():
        return False
    return all(
        torch.equal(views[0][start : start + _COMPARED], views[1][start : start + _COMPARED])
        for start in range(0, shape[0], _COMPARED)
    )
