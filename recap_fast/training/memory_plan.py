"""The memory that a run needs on each GPU, before anything is loaded, and what to do without it.

Both are found by trying settings in the arithmetic of `recap_fast.training.memory_needs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recap_fast.config import LoraConfig, TrainConfig
from recap_fast.model.checkpointing import LayerModes
from recap_fast.model.shapes import ModelShapes
from recap_fast.training.memory_needs import CONTEXT, GIB, MemoryPlan, Planner

__all__ = ["CONTEXT", "GIB", "MemoryPlan", "Remedy", "find_remedies", "plan_memory"]

_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""That are tried where those at hand are too few."""


def plan_memory(
    config: TrainConfig, shapes: ModelShapes, world_size: int, gpu_memory: int
) -> MemoryPlan:
    """What each of `world_size` processes needs.

    Args:
        gpu_memory: bytes of each GPU.

    With `model.device: cpu` the plan is of a process on a CPU: whole float32 weights without FSDP,
    transformers' own kernels, and an engine that samples from the trained weights.

    With `model.gradient_checkpointing: auto` layers are checkpointed as far as the memory asks.
    """
    planner = Planner(config, shapes, world_size)
    plan = planner.plan(gpu_memory)
    if config.model.gradient_checkpointing == "auto" and not planner.on_cpu:
        for modes in LayerModes.by_cost(shapes.layers):
            plan = planner.plan(gpu_memory, modes)
            if plan.total <= plan.usable:
                break
    return plan


@dataclass(frozen=True, slots=True)
class Remedy:
    """Settings, and GPUs, with which a run fits."""

    settings: tuple[str, ...]
    """As --set takes them."""
    plan: MemoryPlan

    def describe(self, world_size: int) -> str:
        parts = [f"--set {setting}" for setting in self.settings]
        if self.plan.world_size != world_size:
            parts.insert(0, f"{self.plan.world_size} GPUs")
        need = f"{self.plan.total / GIB:.1f} GiB"
        if any(setting.startswith("model.offload") for setting in self.settings):
            need += f", and {self.plan.host_total / GIB:.1f} of the host's for each process"
        return ", ".join(parts) + f" ({need})"


def find_remedies(
    config: TrainConfig, shapes: ModelShapes, world_size: int, gpu_memory: int
) -> list[Remedy]:
    """What would fit, found by trying it in the plan: each change alone; where none is enough, all
    that cost little together, with narrower optimizer state, with everything on the host, or with
    adapters (LoRA); and the fewest GPUs, with the settings as they are and with all that cost
    little."""

    def attempt(change: Mapping[str, Any], gpus: int) -> Remedy | None:
        plan = plan_memory(_changed(config, change), shapes, gpus, gpu_memory)
        if not plan.fits:
            return None
        for key in change if len(change) > 1 else ():  # what is not needed is left out again
            fewer = {name: value for name, value in change.items() if name != key}
            if (remedy := attempt(fewer, gpus)) is not None:
                return remedy
        return Remedy(_as_settings(change), plan)

    changes, narrower = _changes(config), _narrower(config)
    offload = {} if config.model.offload else {"model.offload": True}
    if plan_memory(config, shapes, world_size, gpu_memory).problem:
        changes += [
            {"rollout.tensor_parallel_size": size}
            for size in (2, 4, 8)
            if world_size % size == 0 and shapes.heads % size == 0 and shapes.kv_heads % size == 0
        ]
    adapters = {} if config.model.lora else {"model.lora": LoraConfig()}
    together = {key: value for change in changes for key, value in change.items()}
    alone = [*changes, *narrower, offload]
    found = [r for change in alone if change and (r := attempt(change, world_size)) is not None]
    # Adapters are another run: they come after what leaves the numbers as they are.
    more_of_them = [together | change for change in (*narrower, offload)]
    for change in (together, *more_of_them, adapters, together | adapters):
        if not found and (remedy := attempt(change, world_size)) is not None:
            found.append(remedy)
    replicas = config.distributed.replicas
    more = [count for count in _GPUS if count > world_size and count % replicas == 0]
    for change in ({}, together):
        remedies = (attempt(change, count) for count in more)
        fewest = next((remedy for remedy in remedies if remedy is not None), None)
        if fewest is not None:
            more = [count for count in more if count < fewest.plan.world_size]
            found.append(fewest)
    return found


def _changes(config: TrainConfig) -> list[dict[str, Any]]:
    """Changes that may make room, those first that change no numbers."""
    changes: list[dict[str, Any]] = []
    if config.distributed.replicas > 1:
        changes.append({"distributed.replicas": 1})
    if config.model.gradient_checkpointing in ("none", "selective"):
        changes.append({"model.gradient_checkpointing": "auto"})
    fewest = max(config.max_sequence_tokens, config.data.max_supervised_tokens)
    if config.training.max_tokens > fewest:
        changes.append({"training.max_tokens": fewest})
    if config.rollout.engine == "vllm_server":
        if config.rollout.server.transfer in ("auto", "ipc"):
            changes.append({"rollout.server.transfer": "shared_memory"})
        return changes
    share = config.rollout.gpu_memory_utilization
    if share < 0.9:
        changes.append({"rollout.gpu_memory_utilization": 0.9})
    if config.rollout.engine != "transformers" and not config.rollout.sleep:
        changes.append({"rollout.sleep": True})
    return changes


def _narrower(config: TrainConfig) -> list[dict[str, Any]]:
    """Optimizer states of fewer bytes, the wider first."""
    states = ["float32", "bfloat16", "8bit"]
    after = states[states.index(config.optimizer.state) + 1 :]
    return [{"optimizer.state": state} for state in after]


def _changed(config: TrainConfig, change: Mapping[str, Any]) -> TrainConfig:
    for key, value in change.items():
        config = _with(config, key, value)
    return config


def _with(part: Any, key: str, value: Any) -> Any:
    section, _, rest = key.partition(".")
    inner = _with(getattr(part, section), rest, value) if rest else value
    return part.model_copy(update={section: inner})


def _as_settings(change: Mapping[str, Any]) -> tuple[str, ...]:
    """As --set takes them."""
    found = []
    for key, value in change.items():
        if isinstance(value, LoraConfig):
            found.append(f"{key}.rank={value.rank}")
        else:
            found.append(f"{key}={str(value).lower()}")
    return tuple(found)
