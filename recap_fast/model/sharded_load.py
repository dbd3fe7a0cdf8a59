"""Loads a model in shards of which each process reads its own alone.

The model is made on the meta device, where it takes no memory, is sharded there, and then filled
from memory maps of the safetensors files, a parameter at a time. What `from_pretrained` does beside
reading is done here too, with transformers' own functions: the outcome is the same to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from recap_fast.config import ModelConfig
from recap_fast.model.errors import ModelError
from recap_fast.model.hub import model_folder
from recap_fast.model.lora import (
    adapted_names,
    base_of,
    draw_adapters,
    is_adapter,
    read_adapters,
)
from recap_fast.model.policy import (
    ATTENTION,
    Policy,
    find_class,
    load_policy,
    make_policy,
    narrow_tower,
    pick_device,
    weight_dtype,
)
from recap_fast.model.weight_files import WeightFiles, find_weight_files, match_names

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def load_sharded_policy(
    config: ModelConfig,
    path: str,
    mesh: DeviceMesh | None,
    *,
    trainable: bool = True,
    attention: str | None = None,
    seed: int = 0,
) -> Policy:
    """`load_policy`, sharded over the mesh's processes, which read what is theirs.

    Every process calls it. A process that shards with no other reads the model whole onto its
    device, unless that is to be offloaded.

    Args:
        path: a folder that every process sees, of safetensors; or one of adapters, whose base is
            such a folder or in the hub's cache.
        mesh: None: nothing is sharded.

    Raises:
        ModelError: the model, or its attention backend, cannot be used here; or, on several
            processes, it is no such folder.
    """
    if mesh is None or (mesh.size() == 1 and not config.offload):
        policy = load_policy(config, path, trainable=trainable, attention=attention, seed=seed)
        policy.shard(mesh, offload=config.offload)
        return policy
    device = pick_device(config.device)
    auto_class, model_config = find_class(config, path, device, trainable)
    adapted = is_adapter(path) or (trainable and config.lora is not None)
    base = model_folder(base_of(path)) if is_adapter(path) else path
    weights = find_weight_files(Path(base))
    refuse_quantised(model_config, base)
    dtype = weight_dtype(config, trainable, model_config.dtype if adapted else None)
    model = make_empty(auto_class, model_config, base, dtype)
    keys = match_names(model, weights)
    policy = make_policy(
        model, config, path, trainable=trainable, attention=attention, device=device
    )
    policy.shard(mesh, offload=config.offload)
    read = fill(model, weights, adapted_names(model, keys), device, offload=config.offload)
    if is_adapter(path):
        read_adapters(model, path)
    elif adapted:
        draw_adapters(model, seed)
    narrow_tower(policy)
    logger.info("read %.2f GB of %s", read / 1e9, base)
    return policy


def refuse_quantised(config: PreTrainedConfig, path: str) -> None:
    """Raises `ModelError`: what is stored is not what is computed with."""
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        kind = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
        raise ModelError(
            f"model.path: {path} is quantised ({kind}), which is not supported on more than one "
            f"process: name the folder of the model that it was made from"
        )


def make_empty(
    auto_class: Any, config: PreTrainedConfig, path: str, dtype: torch.dtype
) -> PreTrainedModel:
    """A model on the meta device, as `from_pretrained` makes it before it reads.

    Raises:
        ModelError: the class cannot be made of the configuration.
    """
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    except Exception as error:  # of a damaged configuration transformers raises anything
        first = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"model.path: {path}: its config.json makes no model: {first}") from error
    model.generation_config = _generation_config(path)
    made: PreTrainedModel = model
    return made


def _generation_config(path: str) -> Any:
    from transformers import GenerationConfig

    if (Path(path) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(path)
    return GenerationConfig.from_pretrained(
        path, config_file_name="config.json", _from_model_config=True
    )


def fill(
    model: PreTrainedModel,
    weights: WeightFiles,
    keys: Mapping[str, str],
    device: torch.device,
    *,
    offload: bool = False,
) -> int:
    """Gives a model its weights; returns how many bytes of the files were read for them.

    Args:
        model: on the meta device, sharded or not. Its parameters keep their dtypes.
        keys: of `match_names`.
        device: where the weights go.
        offload: shards go to the host instead; what is whole does not.

    Raises:
        ModelError: a file cannot be read, a weight has another shape than the model's, or the model
            has a buffer that neither the files nor transformers give a value.
    """
    host = torch.device("cpu")
    model._apply(
        lambda t: torch.empty_like(t, device=host if offload and isinstance(t, DTensor) else device)
    )
    model.tie_weights()
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    names = {key: name for name, key in keys.items()}
    read = 0
    for key, view in weights.slices(names):
        tensor = tensors[names[key]]
        if tuple(view.get_shape()) != tuple(tensor.shape):
            raise ModelError(
                f"model.path: {key} of {weights.folder} has the shape {view.get_shape()}; the "
                f"model's config.json wants {list(tensor.shape)}"
            )
        read += _read_part(tensor, view)
    _rebuild_buffers(model)
    return read


@torch.no_grad()
def _read_part(tensor: Tensor, view: Any) -> int:
    """Copies this process's part from a slice of safetensors; returns the bytes that it takes up
    there."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if part.numel() == 0:
        return 0
    rows = view[_index(tensor)]
    part.copy_(rows.to(part.device))  # as stored, of half the size; widened over there
    return int(rows.numel() * rows.element_size())


def _index(tensor: Tensor) -> Any:
    """Where in the whole tensor this process's part is."""
    if not isinstance(tensor, DTensor) or tensor.dim() == 0:
        return ...
    assert all(isinstance(p, (Shard, Replicate)) for p in tensor.placements), tensor.placements
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


@torch.no_grad()
def _rebuild_buffers(model: PreTrainedModel) -> None:
    """Computes what no file holds, such as rotary frequencies: transformers initialises whatever is
    not marked as loaded."""
    lost = dict(model.named_non_persistent_buffers())
    for module in model.modules():
        if not module._non_persistent_buffers_set:
            module._is_hf_initialized = True
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = not any(tensor is buffer for buffer in lost.values())
    for buffer in lost.values():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    model.initialize_weights()
    unset = [name for name, value in lost.items() if _is_nan(value)]
    if unset:
        raise ModelError(
            f"{type(model).__name__}: nothing gives its buffer {unset[0]} a value, which is not "
            f"supported on more than one process"
        )


def _is_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())
