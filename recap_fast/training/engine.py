"""Starts the rollout engine for a model that this run has loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recap_fast.config import TrainConfig
from recap_fast.data.images import ImageEncoder
from recap_fast.model.policy import Policy, load_policy
from recap_fast.rollout.factory import check_vllm, make_engine
from recap_fast.rollout.protocol import RolloutEngine
from recap_fast.training.distributed import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def start_engine(
    config: TrainConfig,
    policy: Policy,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    images: ImageEncoder | None,
    world: World,
    *,
    kv_cache_bytes: int | None = None,
    logs: Path,
) -> RolloutEngine:
    """`make_engine` for what a run trains or evaluates. All its processes call it together.

    Args:
        model_path: folder or hub name of the model, without adapters.
        images: the model's image encoder; None for a text model.
        kv_cache_bytes: of vLLM's KV cache on CUDA, from the memory plan where there is one.
        logs: folder for what servers print.

    Raises:
        EngineError: as `make_engine`.
    """

    def second_model() -> PreTrainedModel:
        """For an engine that samples in this process while the trained model is in shards."""
        return load_policy(config.model, model_path, trainable=False).model

    if config.rollout.engine in ("auto", "vllm"):
        # Before processes wait for each other, so that all are told, and one says it.
        world.together(lambda: check_vllm(config.rollout, policy.model, policy.device))
    return make_engine(
        config.rollout,
        model=policy.model,
        model_path=model_path,
        tokenizer=tokenizer,
        max_model_len=config.max_rollout_tokens,
        seed=config.seed,
        device=policy.device,
        image_pixels=images.pixel_budget if images else None,
        kv_cache_bytes=kv_cache_bytes,
        detached=second_model if world.mesh is not None else None,
        world_size=world.size,
        timeout=world.timeout,
        logs=logs,
        leads=world.is_main,
        agree=world.on_main,
    )
