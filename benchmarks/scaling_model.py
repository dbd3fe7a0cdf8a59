"""How long a step takes on many GPUs: a model from flops, bytes and links.

Everything that comes out of it is PREDICTED. A step on N GPUs, prompts dealt evenly:

    rollout   prompts once (compute), then a step of all sequences for every token: weights and the
              keys and values alive are read from memory, or the products take longer; the longest
              sequence ends it, while the mean is alive
    rewards   CPU time of a rank's own rollouts
    exchange  every rank receives all rollouts on the host
    train     per pass and layer: products, element-wise traffic, attention, or the host's launches
              if those take longer; FSDP's gathers and reductions hide behind them as far as they
              fit. Then head and loss, AdamW
    sync      every parameter put together once and written into the engine

A layer's forward takes max(compute, all-gather) and its backward max(compute, all-gather +
reduce-scatter), where compute is slowed by the share of the multiprocessors that NCCL holds
meanwhile. A ring of n ranks on k nodes moves S bytes in

    base + (n - k) * NVLink's step + (k - 1) * the network's step + S (n - 1) / n / bandwidth
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

NODE = 8
"""GPUs that NVLink joins."""


def _constant(value: float, source: str) -> Any:
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True)
class Machine:
    """What the prediction stands on; each value with where it comes from."""

    gemm: float = _constant(
        450e12,
        "FLOP/s of bf16 products in a step. NVIDIA's H100 SXM data sheet: 989e12 dense. Set, with "
        "elementwise, by torchtitan's FSDP2 step on 8 H100s (--check); those had 500 W of 700",
    )
    attention: float = _constant(
        400e12,
        "FLOP/s. FlashAttention-2 on H100: 350e12 to 400e12 forward (FlashAttention-3 paper)",
    )
    memory: float = _constant(
        2.8e12, "byte/s. Data sheet: 3.35e12 (HBM3); streaming kernels reach 85 to 90 % of it"
    )
    nvlink: float = _constant(
        370e9, "byte/s of a ring, NCCL's busbw: its author in NVIDIA/nccl-tests#212 (line rate 450)"
    )
    network: float = _constant(
        300e9,
        "byte/s of a ring over 8 NDR cards a node: 46e9 to 48e9 a card (NVIDIA/nccl-tests#290) is "
        "376e9; 200e9 measured on 256 GPUs at 2 GiB (NVIDIA/nccl#1218)",
    )
    card: float = _constant(47e9, "byte/s of one NDR card: NVIDIA/nccl-tests#290")
    base: float = _constant(8.4e-6, "s a ring: NVIDIA/nccl src/graph/tuning.cc at 01afd20, Simple")
    nvlink_step: float = _constant(3.4e-6, "s a hop over NVLink: the same file of NCCL's")
    network_step: float = _constant(9.6e-6, "s a hop over the network: the same file of NCCL's")
    nccl_share: float = _constant(
        16 / 132,
        "of the multiprocessors while NCCL runs: 16 channels (NCCL_MIN_NCHANNELS in #1218)",
    )
    elementwise: float = _constant(
        3.0, "times the traffic of fully fused norms, RoPE and SwiGLU: ESTIMATE, see gemm"
    )
    launch: float = _constant(
        8e-6,
        "s of host time an operator: ESTIMATE; 227 operators a layer were counted (forward 55)",
    )
    decode_overhead: float = _constant(
        2.5e-3, "s a token of vLLM's host and sampling: ESTIMATE; checked by 72B on 2 H100s"
    )
    prefill: float = _constant(0.8, "of gemm that prompts reach in vLLM: ESTIMATE")
    reward: float = _constant(
        5e-3, "CPU seconds a rollout: ESTIMATE for parsed answers; formulas take more"
    )
    reward_workers: float = _constant(2, "rewards.workers' default, a rank")
    host_link: float = _constant(
        0.5e9, "byte/s a rank of gloo's all-gather: ESTIMATE for 8 ranks behind 2 x 25 Gb/s"
    )
    sync_tensor: float = _constant(
        0.3e-3, "s a tensor of Python in gathering and loading weights: ESTIMATE"
    )
    capacity: float = _constant(80e9, "bytes of memory: data sheet")

    @property
    def sources(self) -> dict[str, str]:
        return {one.name: one.metadata["source"] for one in fields(self)}


@dataclass(frozen=True)
class Shape:
    """A decoder; heads of 128."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = False

    @property
    def kv(self) -> int:
        """Columns of keys, and of values."""
        return self.kv_heads * self.hidden // self.heads

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return self.hidden * (2 * self.hidden + 2 * self.kv + 3 * self.intermediate)

    @property
    def head(self) -> int:
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.head * (1 if self.tied else 2)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("3B", 2048, 36, 16, 2, 11008, 151936, tied=True),
        Shape("7B", 3584, 28, 28, 4, 18944, 152064),
        Shape("32B", 5120, 64, 40, 8, 27648, 152064),
        Shape("72B", 8192, 80, 64, 8, 29568, 152064),
    )
}
"""Qwen2.5's, from their config.json."""


@dataclass(frozen=True)
class Work:
    """One step's rollouts, over all GPUs, and how they are trained."""

    prompts: int
    group: int = 8
    prompt_tokens: int = 512
    completion_tokens: int = 512
    """Mean; the longest has `longest` times as many."""
    longest: float = 4.0
    pass_tokens: int = 16384
    recompute: float = 1.0
    """Of a layer's forward, the share computed again in backward: 1 is full checkpointing."""
    replicas: int = 1
    """1: FSDP over all GPUs. More: HSDP, shards of N / replicas."""

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group


def collective(machine: Machine, size: float, ranks: int) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes in all."""
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / NODE)
    bandwidth = machine.nvlink if nodes == 1 else machine.network
    steps = (ranks - nodes) * machine.nvlink_step + (nodes - 1) * machine.network_step
    return machine.base + steps + size * (ranks - 1) / ranks / bandwidth


def replicas_sum(machine: Machine, size: float, shard: int, replicas: int) -> float:
    """Seconds in which a rank's shard of `size` bytes is summed over its copies on other nodes."""
    if replicas == 1:
        return 0.0
    ring = 2 * (replicas - 1)
    wire = size / shard * ring / replicas / machine.card
    return machine.base + ring * machine.network_step + wire


def overlapped(machine: Machine, compute: float, communication: float) -> float:
    """Seconds of both side by side; what computes is slower while NCCL holds multiprocessors."""
    slowed = compute + machine.nccl_share * min(compute, communication)
    return max(slowed, communication)


def layer_compute(machine: Machine, shape: Shape, work: Work, tokens: float) -> tuple[float, float]:
    """Seconds of a layer's forward and backward on one GPU, without communication."""
    h, i = shape.hidden, shape.intermediate
    products = 2 * shape.layer * tokens / machine.gemm
    # Each token attends to half of its sequence on average; backward is 2.5 times forward.
    keys = (work.prompt_tokens + work.completion_tokens) / 2
    attention = 4 * h * keys * tokens / machine.attention
    # bf16, fused: norms 4h each, RoPE 4.5h, residuals 6h each, SwiGLU 6i; and backward.
    traffic = machine.elementwise * tokens / machine.memory
    forward = products + attention + (24.5 * h + 6 * i) * traffic
    backward = 2 * products + 2.5 * attention + (28.5 * h + 10 * i) * traffic
    backward += work.recompute * forward
    return max(forward, 55 * machine.launch), max(backward, 172 * machine.launch)


def train_seconds(machine: Machine, shape: Shape, work: Work, gpus: int) -> dict[str, float]:
    """Of the update: "compute", what communication adds ("exposed"), "optimizer"."""
    own = work.rollouts / gpus
    predicted = own * work.completion_tokens
    tokens = predicted + own / work.group * work.prompt_tokens  # a group's prompt once
    passes = max(1, math.ceil(tokens / work.pass_tokens))
    shard = gpus // work.replicas
    forward, backward = layer_compute(machine, shape, work, tokens / passes)
    gather = collective(machine, 2 * shape.layer, shard)
    reduce = collective(machine, 4 * shape.layer, shard)
    reduce += replicas_sum(machine, 4 * shape.layer, shard, work.replicas)
    layer = overlapped(machine, forward, gather) + overlapped(machine, backward, gather + reduce)
    # The embedding and an untied head are units of their own: nothing of theirs is hidden.
    ends = collective(machine, 2 * shape.head, shard) + collective(machine, 4 * shape.head, shard)
    ends += replicas_sum(machine, 4 * shape.head, shard, work.replicas)
    ends *= 1 if shape.tied else 2
    compute = passes * shape.layers * (forward + backward) + _head_seconds(
        machine, shape, predicted, passes
    )
    exposed = passes * (shape.layers * (layer - forward - backward) + gather + reduce + ends)
    # Gradient, master, both moments read, all but the gradient written; the norm reads once more.
    optimizer = 32 * shape.parameters / shard / machine.memory
    return {"compute": compute, "exposed": exposed, "optimizer": optimizer}


def _head_seconds(machine: Machine, shape: Shape, tokens: float, passes: int) -> float:
    """Three products, float32 logits (10 bytes each), and dW read and written each chunk."""
    chunks = max(passes, math.ceil(tokens / 4096))
    traffic = 10 * tokens * shape.vocab + 8 * chunks * shape.head
    return 6 * tokens * shape.head / machine.gemm + traffic / machine.memory


def tensor_parallel(shape: Shape) -> int:
    """GPUs an engine: the fewest that hold 40 GB of bf16 weights each or less."""
    return 2 ** max(0, math.ceil(math.log2(2 * shape.parameters / 40e9)))


def decode_step(
    machine: Machine, shape: Shape, sequences: float, context: float, parallel: int = 1
) -> float:
    """Seconds of one token for each of `sequences`, of `context` tokens each, on one engine."""
    weights = 2 * (shape.parameters - (0 if shape.tied else shape.head))
    cache = 4 * shape.kv * shape.layers * context * sequences
    read = (weights + cache) / parallel / machine.memory
    products = weights * sequences / parallel / machine.gemm
    # Two sums a layer, too small for bandwidth to count.
    sums = 2 * shape.layers * collective(machine, 0, parallel) / 2 if parallel > 1 else 0.0
    return max(read, products) + sums + machine.decode_overhead


def rollout_seconds(machine: Machine, shape: Shape, work: Work, gpus: int) -> float:
    """Prompts, then as many tokens as the longest completion has, the mean of sequences alive."""
    parallel = min(tensor_parallel(shape), gpus)
    sequences = work.rollouts / gpus * parallel
    prompt = 2 * shape.parameters * work.prompt_tokens * sequences / work.group
    prompt /= machine.gemm * machine.prefill * parallel
    context = work.prompt_tokens + work.completion_tokens / 2
    token = decode_step(machine, shape, sequences / work.longest, context, parallel)
    return prompt + work.longest * work.completion_tokens * token


def step_seconds(machine: Machine, shape: Shape, work: Work, gpus: int) -> dict[str, float]:
    """Every part of a step and "total".

    Raises:
        ValueError: `work.replicas` does not divide `gpus`.
    """
    if gpus % work.replicas:
        raise ValueError(f"wanted replicas that divide {gpus} GPUs, got {work.replicas}")
    own = work.rollouts / gpus
    length = work.prompt_tokens + work.completion_tokens
    shard = gpus // work.replicas
    tensors = 12 * shape.layers + 3  # of Qwen2.5, gathered one by one
    gathered = collective(machine, 4 * shape.parameters, shard)
    gathered += (tensors - 1) * collective(machine, 0, shard)
    parts = {
        "rollout": rollout_seconds(machine, shape, work, gpus),
        "rewards": own * machine.reward / machine.reward_workers,
        "exchange": 12 * work.rollouts * length / machine.host_link if gpus > 1 else 0.0,
        **train_seconds(machine, shape, work, gpus),
        "sync": gathered + 12 * shape.parameters / machine.memory + tensors * machine.sync_tensor,
    }
    return parts | {"total": sum(parts.values())}


def fits(machine: Machine, shape: Shape, work: Work, gpus: int) -> bool:
    """A rough rule; `recap-fast train --dry-run` counts: float32 masters, gradients and AdamW's
    state in shards, checkpointed activations in bf16, a whole layer and head, 8 GB."""
    states = 16 * shape.parameters / (gpus // work.replicas)
    activations = 2 * work.pass_tokens * shape.hidden * shape.layers
    whole = 6 * (shape.layer + shape.head)
    return states + activations + whole + 8e9 <= machine.capacity


def fewest_replicas_apart(machine: Machine, shape: Shape, work: Work, gpus: int) -> int:
    """HSDP's replicas: shards over one node, or over the fewest nodes that hold the model."""
    for shard in (NODE * 2**k for k in range(10)):
        if shard >= gpus:
            return 1
        one = Work(**{**vars(work), "replicas": gpus // shard})
        if gpus % shard == 0 and fits(machine, shape, one, gpus):
            return gpus // shard
    return 1
