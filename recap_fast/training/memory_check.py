"""The memory plan at work: printed for a dry run, and checked before a start on CUDA."""

from __future__ import annotations

import logging
import math
import os

import torch
from rich.console import Console
from rich.table import Table

from recap_fast.config import TrainConfig
from recap_fast.model.shapes import ModelShapes, load_shapes
from recap_fast.rollout.factory import check_tensor_parallel
from recap_fast.training.distributed import World, check_divisors
from recap_fast.training.host_memory import available_memory
from recap_fast.training.memory_model import layer_widths
from recap_fast.training.memory_plan import CONTEXT, GIB, MemoryPlan, find_remedies, plan_memory
from recap_fast.types import UserError

logger = logging.getLogger(__name__)


class MemoryPlanError(UserError):
    """A run that does not fit the GPUs' memory."""

    is_shared = True  # planned from what all have told each other


def _check_adapted(config: TrainConfig, shapes: ModelShapes) -> None:
    """Of the language model's layers: a tower's have names that its shapes do not say."""
    lora = config.model.lora
    if lora is None or lora.target_modules == "all-linear":
        return
    if shapes.tower is not None and config.model.train_vision:
        return
    known = layer_widths(shapes)
    for target in lora.target_modules:
        if target.rpartition(".")[2] not in known:
            raise MemoryPlanError(
                f"model.lora.target_modules: no linear layer is called {target!r}; there are "
                f"{', '.join(known)}"
            )


def dry_run(config: TrainConfig, gpus: int, gpu_memory: float) -> bool:
    """Prints the plan of a run, and what would fit if it does not. Returns whether it fits.

    Args:
        gpus: processes, a GPU each.
        gpu_memory: GiB of each.

    Raises:
        ModelError: the model's shapes are not known here.
        ConfigError: the replicas, or an engine's processes, do not divide the GPUs.
        EngineError: the model cannot be cut into `rollout.tensor_parallel_size`.
        MemoryPlanError: a size that is none, or adapters of layers that are not there.
    """
    check_divisors(config, f"{gpus} GPUs of --gpus", gpus)
    if config.model.device == "cpu":
        raise MemoryPlanError("model.device is cpu: --dry-run plans GPUs (--set model.device=cuda)")
    if not math.isfinite(gpu_memory):
        raise MemoryPlanError(f"--gpu-memory: wanted GiB of each GPU, got {gpu_memory}")
    shapes = load_shapes(config.model.path)
    check_tensor_parallel(config.rollout, shapes)
    _check_adapted(config, shapes)
    plan = plan_memory(config, shapes, gpus, int(gpu_memory * GIB))
    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # under torchrun, once
    console.print(table_of(plan, title=f"{config.model.path} on {gpus} x {gpu_memory:g} GiB"))
    modes = ", ".join(f"{mode} {_gib(size)}" for mode, size in plan.activations.items())
    console.print(f"activations by checkpointing, in GiB: {modes}", highlight=False)
    console.print(host_line(plan), highlight=False)
    if plan.fits:
        console.print(
            f"fits: {_gib(plan.total)} of {_gib(plan.usable)} GiB that can be used", highlight=False
        )
    else:
        console.print(_refusal(plan, config, shapes), highlight=False, markup=False)
    return plan.fits


def table_of(plan: MemoryPlan, title: str) -> Table:
    """The plan as a table, a line for what stays and each stage's extras."""
    table = Table("each GPU", "GiB", "", title=title)
    table.columns[1].justify = "right"
    for part in plan.parts:
        table.add_row(part.name, _gib(part.bytes), part.note)
    table.add_row("stays", _gib(plan.permanent), "", style="bold", end_section=True)
    for stage, parts in plan.stages.items():
        for part in parts:
            table.add_row(f"  {part.name}", _gib(part.bytes), part.note)
        highest = "highest" if plan.stage_total(stage) == plan.total else ""
        total = _gib(plan.stage_total(stage))
        table.add_row(f"{stage}, in all", total, highest, style="bold", end_section=True)
    return table


def host_line(plan: MemoryPlan) -> str:
    """What a process takes of its host's memory."""
    parts = ", ".join(f"{part.name} {_gib(part.bytes)}" for part in plan.host)
    return f"host memory of each process, in GiB: {_gib(plan.host_total)} ({parts})"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _refusal(plan: MemoryPlan, config: TrainConfig, shapes: ModelShapes) -> str:
    """One line: what is short, and each of what would fit."""
    stage = max(plan.stages, key=plan.stage_total)
    reason = f"the {stage} needs {_gib(plan.total)} GiB of the {_gib(plan.usable)} that can be used"
    if plan.total <= plan.usable:
        reason = plan.problem
    elif plan.problem:
        reason = f"{reason}, and {plan.problem}"
    remedies = find_remedies(config, shapes, plan.world_size, plan.memory)
    would = "; or ".join(remedy.describe(plan.world_size) for remedy in remedies)
    gpus = f"{plan.world_size} GPU{'s' if plan.world_size > 1 else ''}"
    return (
        f"does not fit {gpus} of {_gib(plan.memory)} GiB: {reason}. "
        f"Would fit: {would or 'nothing that was tried (wanted larger GPUs, or a smaller model)'}"
    )


def check_memory(config: TrainConfig, path: str, world: World) -> MemoryPlan | None:
    """Refuses a run that does not fit the GPUs, before anything is loaded.

    Not on a CPU: what the host's other programs take and give back is not known, it swaps, and the
    rollout engine has a setting of its own there.

    Args:
        path: what `resolve_model` returned.

    Returns:
        The plan, with the engine's KV cache and each layer's checkpointing; None on a CPU.

    Raises:
        MemoryPlanError: on all processes, with numbers and what would fit; for the GPUs' memory, or
            for that of the hosts where they say what they have.
        ModelError: the model's shapes cannot be read.
    """
    if world.device.type != "cuda":
        logger.debug("memory is planned for GPUs only")
        return None

    def free() -> tuple[dict[str, torch.Tensor], tuple[int, int | None]]:
        now, total = torch.cuda.mem_get_info(world.device)
        gpu = min(total, now + CONTEXT)  # this process's context, which the plan has, is there
        host, processes = available_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return {}, (gpu, None if host is None else host // processes)

    amounts = [amount for _, amount in world.exchange(free)]
    memory = min(gpu for gpu, _ in amounts)
    shapes = load_shapes(path)
    plan = plan_memory(config, shapes, world.size, memory)
    if not plan.fits:
        raise MemoryPlanError(_refusal(plan, config, shapes))
    host = min((share for _, share in amounts if share is not None), default=plan.host_total)
    if plan.host_total > host:
        offload = ", or leave model.offload out" if config.model.offload else ""
        raise MemoryPlanError(
            f"{host_line(plan)}; a host has {_gib(host)} for each of its processes: give them a "
            f"host with more, or fewer on each{offload}"
        )
    logger.info(
        "memory: %s GiB planned of %s on each GPU, the engine's KV cache %s; %s",
        _gib(plan.total), _gib(memory), _gib(plan.kv_cache), plan.checkpointing.describe(),
    )  # fmt: skip
    return plan


@torch.no_grad()
def reserve_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the buffers of the gradients and AdamW's state before the rollout engine starts, where
    they are on CUDA: memory that is missing is then missed at the start, not in the first step.

    A step that is skipped, as for a gradient that is not finite, makes both and changes no weight.
    """
    if optimizer.param_groups[0]["params"][0].device.type == "cuda":
        take_skipped_step(optimizer)


def take_skipped_step(optimizer: torch.optim.Optimizer) -> None:
    """Of a fused AdamW, whose state counts no step then."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    one = torch.ones((), device=parameters[0].device)
    vars(optimizer).update(grad_scale=one, found_inf=one)
    optimizer.step()
