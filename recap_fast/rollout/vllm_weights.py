"""Reads weights back from vLLM's model, as it computes with them.

Where a model is cut over several processes (tensor parallelism) all of them read together, and each
gets the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recap_fast.rollout.protocol import column_picks


@torch.no_grad()
def read_columns(model: Any, shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, Tensor]:
    """See `VllmEngine.read_columns`; `model` is vLLM's, or this process's part of it."""
    hf_names = _engine_names(model, shapes)
    shapes = {name: shapes[hf_name] for name, hf_name in hf_names.items()}
    fused = {
        part: (whole, parts)
        for whole, parts in getattr(model, "packed_modules_mapping", {}).items()
        for part in parts
    }
    found = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        parent, _, child = path.rpartition(".")
        whole, parts = fused.get(child, (child, [child]))
        siblings = [f"{parent}.{part}.{leaf}" if parent else f"{part}.{leaf}" for part in parts]
        try:
            module = model.get_submodule(f"{parent}.{whole}" if parent else whole)
        except AttributeError:
            continue
        module = getattr(module, "base_layer", module)  # beside which a server has adapters
        if any(sibling not in shapes for sibling in siblings):
            continue
        # A fused layer's rows are those of its parts, laid end to end.
        rows = [shapes[sibling][0] for sibling in siblings]
        start = sum(rows[: siblings.index(name)])
        values = _module_columns(module, leaf, shape, count)
        if values is not None:
            values = _all_rows(module, values, rows)
        if values is not None and values.shape[0] >= start + shape[0]:
            found[hf_names[name]] = values[start : start + shape[0]].float().cpu()
    return found


def _engine_names(model: Any, hf_names: Iterable[str]) -> dict[str, str]:
    """Names in vLLM's model -> Hugging Face names; a vision-language model's modules differ."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return {name: name for name in hf_names}
    if hasattr(mapper, "get_rename_mapper"):  # without it q_proj would become qkv_proj here
        mapper = mapper.get_rename_mapper()
    engine_names = ((mapper.apply_list([name]), name) for name in hf_names)
    return {mapped[0]: name for mapped, name in engine_names if mapped}


def _module_columns(module: Any, leaf: str, shape: Sequence[int], count: int) -> Tensor | None:
    """Columns of a module's weight, or of the rows that this process has of it; of a linear layer
    by what it does to one-hot vectors.

    On a CPU a layer computes with a repacked copy, and its parameter is empty or, for a tied head,
    may be newer than that copy. Products with one-hot vectors are exact in any dtype.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    parameter = getattr(module, leaf, None)
    if parameter is None or parameter.is_meta:  # a vision tower that no image asks for
        return None
    if leaf == "weight" and len(shape) == 2 and isinstance(module, LinearBase | ParallelLMHead):
        return _products(module, column_picks(shape[1], count), shape[1], parameter)
    if parameter.ndim != len(shape):
        return None
    if parameter.ndim == 2:
        return parameter[:, column_picks(shape[1], count).to(parameter.device)]
    return parameter if parameter.ndim == 1 else None


def _products(module: Any, picks: Tensor, width: int, like: Tensor) -> Tensor:
    """Columns `picks` of a linear layer of `width` inputs, in `like`'s dtype and on its device."""
    from vllm.distributed import get_tp_group
    from vllm.model_executor.layers.linear import RowParallelLinear

    one_hot = torch.zeros(len(picks), width, dtype=like.dtype, device=like.device)
    one_hot[torch.arange(len(picks)), picks] = 1
    if not (isinstance(module, RowParallelLinear) and module.tp_size > 1):
        return module.quant_method.apply(module, one_hot, bias=None).T
    # Each process has some of the inputs: all but one add zeros to a column.
    own = one_hot.chunk(module.tp_size, dim=1)[module.tp_rank].contiguous()
    part = module.quant_method.apply(module, own, bias=None)
    return get_tp_group().all_reduce(part).T


def _all_rows(module: Any, values: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of all processes, in the order that they have in one, where each process has some.

    Args:
        values: this process's.
        rows: of each part of a fused layer, in all.
    """
    from vllm.distributed import get_tp_group
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    group = get_tp_group()
    size = group.world_size
    is_vocabulary = isinstance(module, VocabParallelEmbedding)
    if size == 1 or not (is_vocabulary or isinstance(module, ColumnParallelLinear)):
        return values
    if not is_vocabulary and module.tp_size == 1:  # a vision tower that is whole in each
        return values
    every = group.all_gather(values.contiguous(), dim=0).unflatten(0, (size, -1))
    if is_vocabulary:  # padded at the end
        return every.flatten(0, 1)
    found, start = [], 0
    for place, count in enumerate(rows):
        # Where there are fewer heads of keys and values than processes, some have the same.
        copies = getattr(module, "num_kv_head_replicas", 1) if place else 1
        end = start + count * copies // size
        found.append(every[::copies, start:end].flatten(0, 1))
        start = end
    return torch.cat(found)
