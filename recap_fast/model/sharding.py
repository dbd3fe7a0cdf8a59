"""FSDP2 over a policy: float32 masters in shards, working weights a layer at a time.

Each decoder layer is a unit; so is the head, with the embedding where they are tied. The rest is
the root's: an embedding of its own, the final norm, a trained vision tower. Where a unit's weights
are whole only while its forward runs, code of ours that reads them runs inside of it: `inside`.

The head's unit takes a float32 gradient: the loss sums it in that over a pass's tokens. Rounded to
bfloat16 before the sum over processes it would be off by 1.7e-3 instead of 1.3e-7. A unit reduces
all its gradients in one dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from recap_fast.model.checkpointing import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_METHOD = "run_inside"


def shard_model(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    whole: nn.Module | None,
    *,
    offload: bool = False,
) -> None:
    """Applies FSDP2 in place. Gradients are sums over the processes, in float32.

    Args:
        compute_dtype: of the working weights; parameters, the masters, stay float32.
        whole: a frozen module that every process keeps, such as a vision tower.
        offload: shards, with gradients and optimizer state, stay in the host's memory.
    """
    narrow = None if compute_dtype == torch.float32 else compute_dtype
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    }
    if offload:
        # Pinned, copies overlap with compute; without an accelerator there is nothing to pin for.
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        settings["reshard_after_forward"] = True  # no backward pass frees what stays whole for it
    kept = set() if whole is None else set(whole.parameters())
    layers: Any = decoder_layers(model)
    for layer in layers:
        fully_shard(layer, **settings)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    if is_tied:  # read where the embedding's forward is long over
        fully_shard([embedding, head], **{**settings, "reshard_after_forward": False})
    else:
        fully_shard(head, **{"reshard_after_forward": False, **settings})
    fully_shard(model, ignored_params=kept, **settings)
    _let_inside(model)
    if is_tied:  # whole from the embedding's forward on, so also where the head is read
        embedding.register_forward_pre_hook(_take_float32_gradients)
        _prefetch([model, embedding, *layers])
    else:
        _let_inside(head, _take_float32_gradients)
        _prefetch([model, *layers, head])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Denominators are the whole step's already. gloo has no scaled sum to put a 1 in.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if isinstance(model, FSDPModule):
        model.set_reduce_scatter_unused_params(True)  # of a tower, where one rank has images


def _take_float32_gradients(module: nn.Module, *_: Any) -> None:
    """Of a unit whose weights are whole, before autograd meets them."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32


def _prefetch(units: Sequence[Any]) -> None:
    """Has each unit's forward ask for the weights of the next one, in the order that they run in.

    By itself FSDP asks when the next one's forward is launched: too late where launching takes
    longer than computing, as in passes of few tokens. Backward passes ask ahead by themselves.
    """
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])


def _let_inside(module: Any, before: Callable[[nn.Module], None] | None = None) -> None:
    """Gives a unit the method that `inside` calls; `before` meets its whole weights first."""

    def run(self: nn.Module, function: Callable[..., Any], *given: Any) -> Any:
        if before is not None:
            before(self)
        return function(*given)

    setattr(module, _METHOD, MethodType(run, module))
    register_fsdp_forward_method(module, _METHOD)


def inside(module: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), as a part of the module's forward.

    Tensors that gradients pass through must be arguments themselves, and results tensors or tuples
    of them: FSDP hangs its hooks onto those.
    """
    run = getattr(module, _METHOD, None)
    return function(*arguments) if run is None else run(function, *arguments)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def compute_device(model: nn.Module) -> torch.device:
    """Where a model computes, while its shards may wait on the host."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this process may have a shard: a collective, then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Sliceable(Protocol):
    """A tensor, or one in a file, of which only the part that is asked for is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


def part_of(tensor: Sliceable, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as `like` is where that has dimensions."""
    if not isinstance(like, DTensor) or len(tensor.shape) == 0:
        return tensor[...].to(like.device)
    (chunk,) = like.__create_chunk_list__()
    ends = zip(chunk.offsets, chunk.sizes, strict=True)
    local = tensor[tuple(slice(begin, begin + size) for begin, size in ends)]
    # A copy, because staging for a checkpoint takes a shard with an offset for one with a memory.
    made = DTensor.from_local(
        local.to(like.device, copy=True).contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return made.to(like.device)  # `from_local` moves what is offloaded to the mesh's device
