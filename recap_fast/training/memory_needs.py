"""The memory that a run needs on each GPU: the arithmetic.

What stays (masters, gradients, optimizer state, the engine) and what each stage adds for a while
are counted from the shapes; libraries' own needs are estimates and named so. It asks no device and
no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

import torch

from recap_fast.config import TrainConfig
from recap_fast.model.checkpointing import LayerModes, Mode
from recap_fast.model.gathering import BUCKET_BYTES
from recap_fast.model.precision import compute_dtype
from recap_fast.model.shapes import ModelShapes
from recap_fast.rollout.sent_weights import PIECE
from recap_fast.rollout.server_command import is_loopback
from recap_fast.training.host_memory import Kept, host_parts
from recap_fast.training.memory_model import (
    FLOAT32,
    Kernels,
    Part,
    activation_bytes,
    adapter_parameters,
    backward_bytes,
    logits_bytes,
    moment_bytes,
    recomputed_bytes,
    tower_bytes,
)
from recap_fast.training.packing import MAX_OVERFILL

GIB = 2**30
CONTEXT = GIB
"""Estimate: CUDA's context with torch's, vLLM's and Triton's kernels, and cuBLAS's workspace."""
COMMUNICATION = GIB
"""Estimate: NCCL's buffers, where there are several processes."""
GRAPHS = GIB
"""Estimate: vLLM's CUDA graphs with what they keep."""
USABLE = 0.95
"""Share of a GPU's memory that a plan may fill: the rest is lost between the allocator's blocks."""
ENGINE_TOKENS, ENGINE_SEQUENCES = 16384, 1024
"""Tokens of vLLM's largest pass and sequences that it samples from at once, as it starts on GPUs
of 70 GiB or more (vllm/engine/arg_utils.py); it tries them while it starts."""
_LAYERS_WHOLE = 3
"""Layers whose working weights are there at once: the present one, the next, and the buffer that
the next is gathered into."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Of each process, in bytes.

    Attributes:
        world_size: processes, a GPU each.
        memory: of a GPU.
        parts: what stays from the start to the end.
        stages: what each stage adds while it runs. The first, the load of the weights, runs before
            all parts but masters and tower are there, the others beside all of them.
        kv_cache: of the engine, in `parts` too, or in the stages in which a sleeping engine is
            awake; 0 where the engine samples from the trained model.
        activations: by checkpointing mode of all layers.
        checkpointing: of the layers, as in the stage "training pass".
        host: what the process takes of its host's memory; nothing where it trains on a CPU.
        problem: what else stands in the way, or "".
    """

    world_size: int
    memory: int
    parts: tuple[Part, ...]
    stages: Mapping[str, tuple[Part, ...]]
    kv_cache: int
    activations: Mapping[str, int]
    checkpointing: LayerModes
    host: tuple[Part, ...]
    problem: str

    @property
    def permanent(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def host_total(self) -> int:
        return sum(part.bytes for part in self.host)

    @property
    def total(self) -> int:
        """At the highest of the stages."""
        return max(self.stage_total(stage) for stage in self.stages)

    @property
    def usable(self) -> int:
        return int(self.memory * USABLE)

    @property
    def fits(self) -> bool:
        return self.total <= self.usable and not self.problem

    def stage_total(self, stage: str) -> int:
        early = ("frozen base", "masters", "frozen tower", "CUDA and libraries")
        there = [p for p in self.parts if stage != "load" or p.name in early]
        return sum(part.bytes for part in (*there, *self.stages[stage]))


class Planner:
    """The arithmetic of one plan. Sizes in bytes unless they are named parameters."""

    def __init__(self, config: TrainConfig, shapes: ModelShapes, world_size: int) -> None:
        self.config, self.shapes, self.world_size = config, shapes, world_size
        self.shards = max(1, world_size // config.distributed.replicas)
        self.sharing = config.rollout.tensor_parallel_size
        self.sleeps = config.rollout.sleep
        self.has_servers = config.rollout.engine == "vllm_server"
        self.on_cpu = config.model.device == "cpu"
        device = torch.device("cpu" if self.on_cpu else "cuda")
        self.value = compute_dtype(config.model.dtype, device).itemsize
        self.engine_value = compute_dtype(config.rollout.dtype, device).itemsize
        self.kernels = Kernels(
            self.value, config.model.liger and not self.on_cpu, "cpu" if self.on_cpu else "cuda"
        )
        self.tokens = ceil(config.training.max_tokens * MAX_OVERFILL)
        self.trains_tower = config.model.train_vision and shapes.tower is not None
        sharded = shapes.parameters if self.trains_tower else shapes.text_parameters
        self.frozen = shapes.parameters - sharded
        self.lora = lora = config.model.lora
        self.base = 0 if lora is None else sharded
        self.trained = (
            sharded
            if lora is None
            else adapter_parameters(
                shapes, lora.rank, lora.target_modules, trains_tower=self.trains_tower
            )
        )
        self.state, self.offload = config.optimizer.state, config.model.offload
        self.root = shapes.embedding + shapes.other
        self.root += shapes.tower_parameters if self.trains_tower else 0
        self.embedding = shapes.largest_tensor

    def plan(self, memory: int, modes: LayerModes | None = None) -> MemoryPlan:
        """`modes` are those of the layers, in the place of the configuration's."""
        cache, problem = self._kv_cache(memory)
        if modes is None:
            named = self.config.model.gradient_checkpointing
            modes = self._all_layers("none" if named == "auto" else named)
        each: tuple[Mode, ...] = ("none", "selective", "full")
        return MemoryPlan(
            world_size=self.world_size,
            memory=memory,
            parts=tuple(part for part in (*self._weights(), *self._others(cache)) if part.bytes),
            stages={
                "load": self._load(),
                "rollouts": (*self._engine(cache, asleep=True), *self._rollouts()),
                "training pass": self._training_pass(modes),
                "weight sync": (*self._engine(cache, asleep=True), *self._sync()),
            },
            kv_cache=cache,
            activations={
                mode: sum(
                    count(self.shapes, self.kernels, self.tokens, self._all_layers(mode))
                    for count in (activation_bytes, recomputed_bytes)
                )
                for mode in each
            },
            checkpointing=modes,
            host=tuple(part for part in self._host() if part.bytes),
            problem=problem,
        )

    def _all_layers(self, mode: Mode) -> LayerModes:
        return LayerModes.uniform(mode, self.shapes.layers)

    def _weights(self) -> Iterator[Part]:
        # Narrow on a GPU, where it was published so; whole on each.
        value = FLOAT32 if self.on_cpu else self.value
        yield Part("frozen tower", value * self.frozen, "whole on each GPU")
        if self.offload:
            return
        own = ceil(self.trained / self.shards)
        spread = f"1/{self.shards} of " if self.shards > 1 else ""
        count = f"{spread}{_counted(self.trained)}"
        # As narrow as a tower is, where it was published so.
        yield Part("frozen base", self.value * ceil(self.base / self.shards), "under adapters")
        yield Part("masters", 4 * own, f"float32, {count}")
        yield Part("gradients", 4 * own, "float32")
        moments = ceil(moment_bytes(self.state) * own)
        yield Part("optimizer state", moments, f"AdamW, {self.state}")

    def _host(self) -> Iterator[Part]:
        if not self.on_cpu:
            reference = self.shapes.text_parameters if self._has_reference() else 0
            kept = Kept(self.trained, self.base, reference, self.value, self.shards)
            yield from host_parts(self.shapes, kept, self.state, offload=self.offload)

    def _others(self, cache: int) -> Iterator[Part]:
        if self._has_reference():
            yield Part("reference model", self._reference(), "its tower is whole")
        if self.on_cpu:
            return
        yield from self._engine(cache, asleep=False)
        if self.has_servers:
            yield Part("weights for servers", self._for_servers(), "whole on the first GPU, by ipc")
        else:
            yield Part("engine graphs", GRAPHS, "estimate")
        extra = COMMUNICATION if self.world_size > 1 else 0
        yield Part("CUDA and libraries", CONTEXT + extra, "estimate")

    def _has_reference(self) -> bool:
        is_base = self.lora is not None and self.config.model.reference == "initial"
        return self.config.model.reference is not None and not is_base

    def _engine(self, cache: int, *, asleep: bool) -> tuple[Part, ...]:
        """What an engine gives back while it sleeps: a part of the stages in which it does not, or
        of what stays where it never sleeps."""
        if self.on_cpu or self.has_servers or asleep != self.sleeps:
            return ()
        spread = f"1/{self.sharing} of an engine's" if self.sharing > 1 else "whole"
        return (
            Part("engine weights", self._engine_weights(), spread),
            Part("engine KV cache", cache, f"{self._rollouts_here()} rollouts at their longest"),
        )

    def _for_servers(self) -> int:
        """A copy that servers of this host read. Where "auto" means something else it is not there:
        whether GPUs reach each other is known later than this."""
        settings = self.config.rollout.server
        if settings.adapters == "named":  # in files
            return 0
        is_near = all(is_loopback(url) for url in settings.urls)
        reads = settings.transfer == "ipc" or (settings.transfer == "auto" and is_near)
        tied = 0 if self.shapes.head else self.shapes.embedding  # sent under both its names
        return self.engine_value * (self.shapes.parameters + tied) if reads else 0

    def _engine_weights(self) -> int:
        return ceil(self.engine_value * self.shapes.parameters / self.sharing)

    def _reference(self) -> int:
        """Of the policy's shapes: shards, a whole tower, and an embedding that is the head too,
        which stays whole. Its other working copies are gone before the policy's are there."""
        text = 0 if self.offload else ceil(self.value * self.shapes.text_parameters / self.shards)
        kept = self.shapes.embedding if self.shapes.tied and not self.on_cpu else 0
        return text + self.value * (kept + self.shapes.tower_parameters)

    def _rollouts_here(self) -> int:
        """Of the engine that this process has a part in."""
        engines = max(1, self.world_size // self.sharing)
        return ceil(self.config.data.batch_size / engines) * self.config.rollout.group_size

    def _kv_cache(self, memory: int) -> tuple[int, str]:
        """By need: every rollout of a step at its longest; bounded by the share of the GPU that the
        engine may have, in which there must be room for one."""
        if self.on_cpu or self.has_servers:
            return 0, ""
        one = self.config.max_rollout_tokens * self.shapes.kv_bytes(self.engine_value)
        one = ceil(one / min(self.sharing, self.shapes.kv_heads))  # a head is not cut, but copied
        share = self.config.rollout.gpu_memory_utilization
        weights = self._engine_weights()
        room = int(memory * share) - weights - GRAPHS
        if room < one:
            return one, (
                f"the engine's weights ({weights / GIB:.1f} GiB), graphs and the KV cache of one "
                f"rollout ({one / GIB:.1f} GiB) are more than rollout.gpu_memory_utilization = "
                f"{share} of {memory / GIB:.1f} GiB"
            )
        return min(one * self._rollouts_here(), room), ""

    def _load(self) -> tuple[Part, ...]:
        """A process reads its shards a tensor at a time; a frozen tower is float32 until it is
        found to be narrow."""
        parts = [] if self.offload else [Part("largest tensor", FLOAT32 * self.embedding)]
        if self.frozen and not self.on_cpu:
            parts.append(Part("tower in float32", FLOAT32 * self.frozen))
        return tuple(parts)

    def _rollouts(self) -> tuple[Part, ...]:
        if self.on_cpu or self.has_servers:
            return ()
        width = ceil(3 * self.shapes.intermediate / self.sharing) + 2 * self.shapes.hidden
        sampled = 3 * FLOAT32 * ENGINE_SEQUENCES * self.shapes.vocabulary
        passes = ENGINE_TOKENS * width * self.engine_value
        return (Part("engine's largest pass", passes + sampled, "estimate"),)

    def _training_pass(self, modes: LayerModes) -> tuple[Part, ...]:
        """At the highest of four moments: a frozen tower's forward pass, before there are
        activations; the loss, which meets all of them; the backward pass of the first layer that
        it comes to; and that of the embedding, when they are gone."""
        shapes, kernels, tokens = self.shapes, self.kernels, self.tokens
        shown = f"{tokens:,} tokens, {modes.describe()}"
        kept = Part("activations", activation_bytes(shapes, kernels, tokens, modes), shown)
        again = Part("recomputed layer", recomputed_bytes(shapes, kernels, tokens, modes))
        is_narrow = self.config.loss.logits_dtype == "bfloat16"
        logits = logits_bytes(shapes, kernels, tokens, bfloat16_logits=is_narrow)
        working = Part("working copies", self._working(), f"root, head, {_LAYERS_WHOLE} layers")
        if self.offload:
            note = "and a shard of the largest unit, on its way"
            working = Part("working copies", working.bytes + self._on_their_way(), note)
        head = Part("head's gradient", self._head_gradient())
        reduced = Part("head's gradient", self._head_gradient(reducing=True))
        between = backward_bytes(shapes, kernels, tokens) + self._layer_gradients()
        pixels, block, blocks = tower_bytes(shapes, kernels, tokens)
        all_images = "where all tokens are an image's"
        images = Part("images", pixels + (blocks if self.trains_tower else 0), all_images)
        moments = (
            (working, images, Part("vision tower", block, all_images)),
            (working, images, kept, Part("logits chunk", logits), head),
            (working, images, kept, reduced, again, Part("between layers", between)),
            (working, images, Part("embedding's gradient", self._last_gradients())),
        )
        highest = max(moments, key=lambda parts: sum(part.bytes for part in parts))
        return tuple(part for part in highest if part.bytes)

    def _working(self) -> int:
        """Weights in the compute dtype, whole: FSDP's."""
        if self.on_cpu:
            return 0
        layers = _LAYERS_WHOLE * self.shapes.layer
        return self.value * (self.root + self.shapes.head + layers)

    def _on_their_way(self) -> int:
        """From the host, as the masters are, and gradients to it."""
        largest = max(self.root, self.shapes.head, self.shapes.layer)
        return ceil(FLOAT32 * largest / self.shards)

    def _unsharded_gradient(self, parameters: int) -> int:
        """Of a unit of FSDP, before the reduction and as that wants it, in float32; of the largest
        tensor alone without FSDP. Those of adapters are small beside the rest."""
        if self.lora is not None:
            return 0
        if self.on_cpu:
            return FLOAT32 * min(parameters, self.embedding)
        return (self.value + FLOAT32) * parameters

    def _layer_gradients(self) -> int:
        if self.on_cpu and self.lora is None:
            return FLOAT32 * self.shapes.hidden * self.shapes.intermediate
        return 2 * self._unsharded_gradient(self.shapes.layer)  # one is made, one is reduced

    def _head_gradient(self, *, reducing: bool = False) -> int:
        """float32 sums of the loss's chunks, and FSDP's buffer to reduce them in; a tied head's
        wait for the embedding's. Without FSDP the loss adds to the gradient that is there."""
        if self.on_cpu or self.lora is not None:
            return 0
        buffer = FLOAT32 if reducing and self.shapes.head else 0
        return (FLOAT32 + buffer) * self.embedding

    def _last_gradients(self) -> int:
        """Of the root's unit, and of a tied head's, which is float32 before it is reduced."""
        reduced = self._unsharded_gradient(self.root)
        is_tied = not self.shapes.head
        wider = 0 if self.on_cpu or self.lora is not None else FLOAT32 - self.value
        return reduced + (wider * self.embedding if is_tied else 0)

    def _sync(self) -> tuple[Part, ...]:
        if self.on_cpu:
            return ()
        # A bucket with its own shards and what is cut out of it, or the embedding with its own.
        buckets = max(2 * BUCKET_BYTES, self.engine_value * self.embedding)
        gathered = ceil(buckets * (1 + 1 / self.shards)) if self.shards > 1 else 0
        if self.has_servers:
            return (Part("gathered weights", gathered), Part("a piece of a broadcast", PIECE))
        engine = self.engine_value * (self.embedding + 2 * self.shapes.layer)
        return (
            Part("gathered weights", gathered),
            Part("engine's reload", engine, "a layer and its copy"),
        )


def _counted(parameters: int) -> str:
    size, unit = (1e9, "billion") if parameters >= 1e9 else (1e6, "million")
    return f"{parameters / size:.2f} {unit} parameters"
