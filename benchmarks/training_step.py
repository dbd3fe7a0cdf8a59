"""A whole GRPO training step on random weights of a given shape, through recap-fast and TRL.

The work: G prompts x R rollouts, each a prompt of P and a completion of C random tokens, random
advantages, one AdamW update. Float32 master weights, bfloat16 compute, in both trainers.

FLOPs are counted, not estimated: with T packed tokens and N predicted tokens,

    forward   = 2 T W + 4 L A sum_t keys(t)     W: parameters of the linear layers but the head
                                                L layers, A = heads * head size
    model     = 3 forward + 6 N H V             backward is twice forward; the head has 3 GEMMs

keys(t) is the number of positions that token t attends to, itself included. What gradient
checkpointing computes again does not count. MFU = model / seconds / peak FLOP/s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recap_fast.config import LoraConfig, TrainConfig
from recap_fast.model import attention
from recap_fast.model.liger import patch_backbone
from recap_fast.model.policy import Policy, make_policy
from recap_fast.training.distributed import World, start_world
from recap_fast.training.optimization import PolicyOptimizer
from recap_fast.training.packing import PackedUpdate, pack_update
from recap_fast.types import Prompt, Rollout


@dataclass(frozen=True)
class ModelShape:
    """A decoder of Qwen2's architecture, with a tied head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


@dataclass(frozen=True)
class Workload:
    """One step's work."""

    name: str
    model: ModelShape
    prompts: int
    group: int
    prompt_tokens: int
    completion_tokens: int
    max_tokens: int  # packed tokens in one pass
    gradient_checkpointing: bool

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group


WORKLOADS = {
    "small": Workload(
        "tiny", ModelShape(128, 2, 4, 2, 256, 331), prompts=2, group=4, prompt_tokens=8,
        completion_tokens=16, max_tokens=128, gradient_checkpointing=False,
    ),
    "cpu": Workload(  # SmolLM2-135M's shape
        "135M", ModelShape(576, 30, 9, 3, 1536, 49152), prompts=2, group=8, prompt_tokens=64,
        completion_tokens=32, max_tokens=8192, gradient_checkpointing=False,
    ),
    "gpu": Workload(  # the text decoder of Qwen2.5-VL-3B
        "Qwen2.5-VL-3B", ModelShape(2048, 36, 16, 2, 11008, 151936), prompts=8, group=8,
        prompt_tokens=64, completion_tokens=512, max_tokens=16384, gradient_checkpointing=True,
    ),
}  # fmt: skip
"""By the word given to --shapes."""


def build_model(shape: ModelShape, device: torch.device, *, packed: bool, seed: int = 0) -> Any:
    """Qwen2ForCausalLM with random float32 weights, made on the device.

    Args:
        packed: attention over recap-fast's packed batches; else torch's sdpa over padded ones.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    attention.register()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        attn_implementation=attention.IMPLEMENTATION if packed else "sdpa",
    )
    with device:
        return Qwen2ForCausalLM(config).train()


def make_rollouts(workload: Workload, seed: int = 0) -> tuple[list[Rollout], np.ndarray]:
    """Random rollouts and advantages [S, 1] float32."""
    random = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return random.integers(workload.model.vocab, size=count).tolist()

    rollouts = []
    for group in range(workload.prompts):
        prompt = Prompt("random", group, tokens(workload.prompt_tokens), "", "", {})
        for _ in range(workload.group):
            completion = tokens(workload.completion_tokens)
            # About what a model with random weights gives every token.
            logprobs = [-math.log(workload.model.vocab)] * len(completion)
            rollouts.append(Rollout(prompt, group, completion, logprobs, "length", ""))
    return rollouts, random.standard_normal((len(rollouts), 1)).astype(np.float32)


def model_settings(
    workload: Any, device: torch.device, *, liger: bool = True, **settings: Any
) -> dict[str, Any]:
    """The `model` section of a workload's configuration."""
    checkpointing = workload.gradient_checkpointing
    return {
        "path": workload.name,
        "device": device.type,
        "liger": liger,
        "gradient_checkpointing": checkpointing,
        **settings,
    }


def make_config(workload: Workload, device: torch.device, *, liger: bool = True) -> TrainConfig:
    """A configuration of one rewarded objective; no data is loaded from it."""
    return TrainConfig.model_validate(
        {
            "run": "unused",
            "model": model_settings(workload, device, liger=liger),
            "data": {
                "sources": [
                    {
                        "name": "sums",
                        "kind": "rl",
                        "reasoning_gym": "chain_sum",
                        "rewards": {"accuracy": "accuracy"},
                    }
                ],
                "max_prompt_tokens": workload.prompt_tokens,
                "max_supervised_tokens": workload.max_tokens,
            },
            "rollout": {"max_new_tokens": workload.completion_tokens},
            "training": {"max_tokens": workload.max_tokens},
        }
    )


def make_update(
    workload: Workload,
    config: TrainConfig,
    device: torch.device,
    backend: attention.Backend = attention.SDPA,
) -> PackedUpdate:
    """The packed batches of the step, on the device, laid out for an attention backend."""
    rollouts, advantages = make_rollouts(workload)
    update = pack_update(
        rollouts, advantages, [], [],
        config=config.loss, max_tokens=workload.max_tokens, attention=backend,
    )  # fmt: skip
    return update.to(device)


def model_flops(workload: Workload, update: PackedUpdate) -> float:
    """Floating-point operations of the step, see the module's text."""
    shape = workload.model
    kv = shape.hidden // shape.heads * shape.kv_heads
    by_layer = shape.hidden * (2 * shape.hidden + 2 * kv + 3 * shape.intermediate)
    linear = shape.layers * by_layer
    # A group's prompt is computed once; each completion attends to it and to itself.
    prompt, own = workload.prompt_tokens, workload.completion_tokens - 1
    keys = workload.prompts * prompt * (prompt + 1) / 2
    keys += workload.rollouts * (own * prompt + own * (own + 1) / 2)
    forward = 2 * update.num_packed_tokens * linear + 4 * shape.layers * shape.hidden * keys
    return 3 * forward + 6 * update.num_policy_tokens * shape.hidden * shape.vocab


Step = Callable[[], Any]


def recap_optimizer(
    workload: Workload,
    device: torch.device,
    *,
    liger: bool = True,
    lora: LoraConfig | None = None,
) -> tuple[PolicyOptimizer, Policy, TrainConfig]:
    """recap-fast's optimizer over a model that is made and patched as the trainer's is. Under
    adapters its weights are rounded to bfloat16, as those of published models are.

    Liger, where it can run, patches every model of the type that this process makes afterwards:
    see `benchmarks.liger.patches_undone`.
    """
    config = make_config(workload, device, liger=liger)
    patch_backbone(config.model, "qwen2", device)
    model = build_model(workload.model, device, packed=True)
    settings = config.model
    if lora is not None:
        settings = settings.model_copy(update={"lora": lora})
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    policy = make_policy(model, settings, workload.name)
    return sharded_optimizer(policy, config), policy, config


def sharded_optimizer(policy: Policy, config: TrainConfig) -> PolicyOptimizer:
    """As the trainer makes it: on CUDA over FSDP's shards, which one process alone has too."""
    world = _world(policy.device.type)
    policy.shard(world.mesh)
    return PolicyOptimizer(policy, None, config, world)


@cache
def _world(kind: str) -> World:
    return start_world(make_config(WORKLOADS["small"], torch.device(kind)))


def recap_step(
    workload: Workload,
    device: torch.device,
    *,
    liger: bool = True,
    lora: LoraConfig | None = None,
) -> tuple[Step, PackedUpdate, Any]:
    """recap-fast's optimizer step from packed batches that lie on the device.

    Returns:
        The step, its batches, and the model.
    """
    optimizer, policy, config = recap_optimizer(workload, device, liger=liger, lora=lora)
    update = make_update(workload, config, device, policy.attention)
    weights = torch.ones(1, device=device)
    return lambda: optimizer.step(update, weights, 1e-6), update, policy.model


@dataclass(frozen=True)
class TrlStep:
    """The training part of TRL's GRPOTrainer over given rollouts: loss, backward, clip, AdamW."""

    trainer: Any
    model: Any
    optimizer: Any
    batches: list[dict[str, Tensor]]

    def backward(self) -> tuple[Tensor, Tensor]:
        """Leaves clipped gradients in the model. Returns the loss and their norm before."""
        losses = []
        for batch in self.batches:
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(self.model, batch)
            self.trainer.accelerator.backward(loss)
            losses.append(loss.detach())
        norm = self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        return torch.stack(losses).sum(), norm

    def __call__(self) -> None:
        """One update."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def trl_step(
    workload: Workload,
    device: torch.device,
    folder: str,
    micro_batch: int,
    *,
    autocast: bool = True,
    patch: Callable[[Any], object] | None = None,
) -> TrlStep:
    """TRL's GRPOTrainer: its own loss and backward for each micro-batch, its own AdamW.

    Args:
        micro_batch: rollouts in a pass.
        autocast: bfloat16 over float32 weights, as recap-fast; else float32 throughout.
        patch: called with the trainer's model, as a user does before `train()`.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tests.tiny_tokenizer import tiny_tokenizer

    accumulation = workload.rollouts // micro_batch
    arguments = GRPOConfig(
        output_dir=folder,
        use_cpu=device.type == "cpu",
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        num_generations=workload.group,
        generation_batch_size=workload.rollouts,
        max_completion_length=workload.completion_tokens,
        learning_rate=1e-6,
        bf16=autocast,
        gradient_checkpointing=workload.gradient_checkpointing,
        loss_type="bnpo",
        optim="adamw_torch_fused",
        report_to="none",
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=build_model(workload.model, device, packed=False),
        processing_class=tiny_tokenizer(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * workload.prompts}),
    )
    if patch is not None:
        patch(trainer.model)
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    model.train()
    trainer.current_gradient_accumulation_steps = accumulation
    batches = [
        {name: tensor[start : start + micro_batch] for name, tensor in _padded(workload, device)}
        for start in range(0, workload.rollouts, micro_batch)
    ]
    return TrlStep(trainer, model, optimizer, batches)


def _padded(workload: Workload, device: torch.device) -> list[tuple[str, Tensor]]:
    """The same rollouts as TRL lays them out. All lengths are equal, so nothing is padding."""
    rollouts, advantages = make_rollouts(workload)
    prompts = torch.tensor([rollout.prompt.token_ids for rollout in rollouts], device=device)
    completions = torch.tensor([rollout.token_ids for rollout in rollouts], device=device)
    return [
        ("prompt_ids", prompts),
        ("prompt_mask", torch.ones_like(prompts)),
        ("completion_ids", completions),
        ("completion_mask", torch.ones_like(completions)),
        ("advantages", torch.tensor(advantages[:, 0], device=device)),
    ]
