"""LoRA: peft's adapters in the linear layers of a frozen base, of which they alone are trained.

They are put into the model itself: to everything else it stays the model that it was. The loss, the
attention and the engine that samples from the very module need not know; what leaves the process
is the base's weights with the adapters added, or the adapters alone.

Shapes of an adapted layer [out, in]: A [r, in], B [out, r]; it acts as W + alpha / r * B A.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recap_fast.config import LoraConfig
from recap_fast.model.gathering import gather_whole
from recap_fast.model.sharding import part_of
from recap_fast.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"  # peft's name for the only one
ADAPTER_SETTINGS = "adapter_config.json"
ADAPTERS_FILE = "adapter_model.safetensors"
_BASE = ".base_layer.weight"
_PREFIX = "base_model.model."
"""What peft's files put before the names of the base's modules."""


class LoraError(UserError):
    """Adapters that cannot be made, or read."""


def add_adapters(
    model: PreTrainedModel,
    settings: LoraConfig,
    base: str,
    *,
    frozen: nn.Module | None = None,
    seed: int = 0,
) -> None:
    """Freezes a model and puts trainable adapters into it, in float32, that change nothing yet.

    On the meta device they have no values: `draw_adapters` or `read_adapters`, later.

    Args:
        base: folder or hub name that the adapters' checkpoints name as their base.
        frozen: a part of the model that takes no adapters, such as its vision tower.
        seed: of the adapters' first values, the same in every process.

    Raises:
        LoraError: peft is not installed, or `target_modules` names what is not there or is no
            linear layer of the backbone.
    """
    peft = _peft()
    left_out = next((name for name, module in model.named_modules() if module is frozen), None)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,  # rollouts are sampled without
        target_modules=_targets(model, settings, left_out),
        exclude_modules=None if left_out is None else rf"{re.escape(left_out)}\..*",
        base_model_name_or_path=os.path.abspath(base) if os.path.isdir(base) else base,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws values of its own
        peft.inject_adapter_in_model(config, model, _ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft makes them in the base's dtype
            parameter.data = parameter.data.float()
    draw_adapters(model, seed)


@torch.no_grad()
def draw_adapters(model: PreTrainedModel, seed: int) -> None:
    """Gives adapters their first values, of which each process of a sharded model keeps its part: A
    as peft draws it (Kaiming uniform, a = sqrt 5), B zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in adapter_state(model).items():
        values = torch.zeros(tensor.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        if not tensor.is_meta:
            tensor.copy_(part_of(values, tensor))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise LoraError(
            f"LoRA needs peft, which cannot be imported ({error}): pip install 'peft>=0.21,<0.22'"
        ) from None
    return peft


def _targets(model: PreTrainedModel, settings: LoraConfig, left_out: str | None) -> list[str]:
    """Names that peft finds the layers by: theirs, or what theirs end with."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and not (left_out and f"{name}.".startswith(f"{left_out}."))
    }
    head = model.get_output_embeddings()
    linear = {n for n, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
    if settings.target_modules == "all-linear":
        return sorted({_shortened(name, linear, modules) for name in linear})
    for target in settings.target_modules:
        found = _found(target, modules)
        if not found:
            raise LoraError(_unknown(target, linear, left_out))
        if wrong := sorted(set(found) - linear):
            kind = "head" if modules[wrong[0]] is head else type(modules[wrong[0]]).__name__
            raise LoraError(
                f"model.lora.target_modules: wanted linear layers below the head, such as "
                f"{', '.join(_last_names(linear))}; {target!r} names {wrong[0]}, the {kind}"
            )
    return sorted(set(settings.target_modules))


def _found(target: str, names: Mapping[str, Any]) -> list[str]:
    """As peft compares them."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _shortened(name: str, linear: set[str], modules: Mapping[str, Any]) -> str:
    """What a name ends with, unless that names other modules too, as "0" does."""
    last = name.rpartition(".")[2]
    return last if linear.issuperset(_found(last, modules)) else name


def _last_names(names: set[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _unknown(target: str, linear: set[str], left_out: str | None) -> str:
    known = _last_names(linear)
    close = difflib.get_close_matches(target.rpartition(".")[2], known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
    aside = f" ({left_out} is frozen: model.train_vision)" if left_out else ""
    return f"model.lora.target_modules: no linear layer is called {target!r}{aside}; {hint}"


def has_adapters(model: nn.Module) -> bool:
    return _ADAPTER in getattr(model, "peft_config", {})


def adapted_names(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """A mapping from names of a model without adapters, with those that it has beside them."""
    there = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())}
    moved = {}
    for name, value in names.items():
        layer, _, leaf = name.rpartition(".")
        inner = f"{layer}.base_layer.{leaf}"
        moved[inner if inner in there else name] = value
    return moved


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base alone, for passes without gradients."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    # Not peft's own switch: it freezes the adapters meanwhile, which the optimizer and FSDP hold.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_weights(
    model: PreTrainedModel, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """A model's state under the names that it has without adapters: adapted weights in float32,
    made one at a time beside the model's own; the others as views. What has two names, as a tied
    head has, comes under both, one after the other.

    Those of a sharded model are gathered, each once and many in one collective, which every process
    takes part in; see `gather_whole`.

    Args:
        dtype: what the taker needs: sharded weights without adapters are cast to it before they
            are gathered, where it is narrower.
    """
    return _weights(model, dtype, adapter_scales(model))


def base_weights(
    model: PreTrainedModel, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """As `merged_weights`, of the base alone."""
    return _weights(model, dtype, {})


def adapter_scales(model: PreTrainedModel) -> dict[str, float]:
    """Of each adapted layer, by its name: what B A is multiplied with."""
    if not has_adapters(model):
        return {}
    from peft.tuners.lora import LoraLayer

    return {
        name: float(module.scaling[_ADAPTER])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def adapter_rank(model: PreTrainedModel) -> int:
    settings: Any = model.peft_config
    return int(settings[_ADAPTER].r)


def _weights(
    model: PreTrainedModel, dtype: torch.dtype | None, scales: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """Args:
    scales: of layers whose adapters are added.
    """
    state = model.state_dict(keep_vars=True)
    scaling = {f"{layer}{_BASE}": scale for layer, scale in scales.items()}
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if not is_of_adapter(name):
            names.setdefault(id(tensor), []).append(name)
    firsts = [group[0] for group in names.values()]
    stream = gather_whole(_in_order(state, firsts, scaling, dtype))
    for (first, tensor), group in zip(stream, names.values(), strict=False):
        if first in scaling:
            (_, a), (_, b) = next(stream), next(stream)
            tensor = _merged(tensor, a, b, scaling[first])
        for name in group:
            yield plain_name(name), tensor


def is_of_adapter(name: str) -> bool:
    """Of a tensor in a model's state."""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """What a tensor of the base is called where there are no adapters."""
    return name.replace(".base_layer.", ".")


def _in_order(
    state: Mapping[str, Tensor], names: Iterable[str], adapted: Container[str], dtype: Any
) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """What is to be gathered, a layer's adapters right behind its base."""
    for name in names:
        tensor = state[name].detach()
        if name not in adapted:
            narrower = dtype is not None and dtype.itemsize < tensor.dtype.itemsize
            is_cast = narrower and tensor.is_floating_point()
            yield name, tensor, dtype if is_cast else tensor.dtype
            continue
        yield name, tensor, tensor.dtype
        for part in ("lora_A", "lora_B"):
            adapter = f"{name.removesuffix(_BASE)}.{part}.{_ADAPTER}.weight"
            yield adapter, state[adapter].detach(), state[adapter].dtype


def _merged(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, [out, in] float32. A product of bfloat16 would round the adapters away."""
    return torch.addmm(base.float(), b.float(), a.float(), alpha=scale)


def adapter_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters' tensors, under the names that they have in the model's state."""
    return {name: t for name, t in model.state_dict().items() if is_of_adapter(name)}


def saved_adapters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters' tensors under the names that they have in peft's file; shards stay shards."""
    return {_saved_name(name): tensor for name, tensor in adapter_state(model).items()}


def whole_adapters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """`saved_adapters`, gathered where they are in shards, which every process takes part in. A
    tensor is there until the next is asked for."""
    state = saved_adapters(model)
    return gather_whole((name, tensor.detach(), tensor.dtype) for name, tensor in state.items())


def adapted_layer(name: str) -> tuple[str, str]:
    """Of a tensor's name in peft's file: its layer's name, and "lora_A" or "lora_B"."""
    layer, _, part = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
    return layer, part


def save_settings(model: PreTrainedModel, folder: Path) -> None:
    """Writes adapter_config.json, which with the tensors of `saved_adapters` in a file of
    `ADAPTERS_FILE`'s name is what peft and transformers load."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: Any = model.peft_config
    settings[_ADAPTER].save_pretrained(folder)


def load_adapters(model: PreTrainedModel, folder: str, *, frozen: nn.Module | None = None) -> None:
    """`add_adapters` with the settings and the values of a folder's adapters.

    Raises:
        LoraError: the folder holds other adapters than ours, or those of another model.
    """
    config = _read(folder)
    settings = LoraConfig(
        rank=config.r, alpha=config.lora_alpha, target_modules=sorted(config.target_modules)
    )
    add_adapters(model, settings, base_of(folder), frozen=frozen)
    read_adapters(model, folder)


@torch.no_grad()
def read_adapters(model: PreTrainedModel, folder: str) -> None:
    """Gives adapters the values of a folder's, of which each process of a sharded model keeps its
    part. Raises `LoraError` as `load_adapters` does."""
    try:
        saved = load_file(Path(folder, ADAPTERS_FILE))
    except (OSError, SafetensorError) as error:
        raise LoraError(f"{folder}: {ADAPTERS_FILE} cannot be read: {error}") from error
    for name, tensor in adapter_state(model).items():
        found = saved.pop(_saved_name(name), None)
        if found is None or found.shape != tensor.shape:
            given = "lacks it" if found is None else f"has {list(found.shape)}"
            raise LoraError(
                f"{folder}: wanted {name} of {list(tensor.shape)}; {ADAPTERS_FILE} {given}"
            )
        if not tensor.is_meta:
            tensor.copy_(part_of(found, tensor))
    if saved:
        raise LoraError(
            f"{folder}: {ADAPTERS_FILE} has what the model has not, such as {min(saved)}"
        )


def _saved_name(name: str) -> str:
    return _PREFIX + name.replace(f".{_ADAPTER}.", ".")


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds adapters in the place of a model."""
    return os.path.exists(os.path.join(path, ADAPTER_SETTINGS))


def base_of(path: str) -> str:
    """The model that the adapters in a folder belong to; the path itself of anything else."""
    return str(_read(path).base_model_name_or_path) if is_adapter(path) else path


def _read(path: str) -> Any:
    peft = _peft()
    try:
        config = peft.PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LoraError(f"{path}: {ADAPTER_SETTINGS} cannot be read: {error}") from error
    if not isinstance(config, peft.LoraConfig) or config.use_dora or config.use_rslora:
        raise LoraError(f"{path}: wanted the adapters of a checkpoint of ours, plain LoRA")
    return config
