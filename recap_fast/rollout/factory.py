"""Starts the rollout engine that a configuration names."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recap_fast.config import RolloutConfig
from recap_fast.model.shapes import ModelShapes
from recap_fast.model.vision import make_adapter
from recap_fast.rollout.embedded import DetachedEngine, EmbeddedEngine
from recap_fast.rollout.protocol import (
    EngineError,
    RolloutEngine,
    stop_token_ids,
    weight_names,
    weight_shapes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def make_engine(
    config: RolloutConfig,
    *,
    model: PreTrainedModel,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    max_model_len: int,
    seed: int,
    device: torch.device | str,
    image_pixels: tuple[int, int] | None = None,
    kv_cache_bytes: int | None = None,
    detached: Callable[[], PreTrainedModel] | None = None,
    world_size: int = 1,
    timeout: float = 600.0,
    logs: Path = Path("logs"),
    leads: bool = True,
    agree: Callable[[Callable[[], Any]], Any] = lambda make: make(),
) -> RolloutEngine:
    """Starts the engine that `config.engine` names.

    Args:
        model: the trained model. The transformers engine samples from this very module.
        model_path: folder or hub name from which vLLM reads the architecture and first weights.
        max_model_len: longest prompt and completion together, in tokens.
        seed: of the engine itself; `SamplingSpec.seed` decides what is sampled.
        detached: loads a second model for the transformers engine, where `model` is in shards.
        image_pixels: least and largest area of the rows' images; None where no row has any.
        kv_cache_bytes: of vLLM's KV cache on CUDA; None: what `gpu_memory_utilization` leaves.
        world_size: processes of the run, all of which start an engine together.
        timeout: seconds that an engine's processes wait for each other.
        logs: folder for what servers print.
        leads: whether this process, alone of the run's, starts servers and gives them weights.
        agree: gives all processes what the one that leads makes.

    Raises:
        EngineError: the engine was asked for by name and cannot run here.
    """
    device = torch.device(device)
    if config.engine == "vllm_server":
        from recap_fast.rollout.server import ServerEngine
        from recap_fast.rollout.server_worker import model_sizes

        if image_pixels is not None and config.asynchronous.on_update == "recompute":
            raise EngineError(
                "rollout.async.on_update is recompute, and rows have images: vllm's engine ends "
                "where it recomputes a request with images after it has dropped what it cached of "
                "them (--set rollout.async.on_update=keep)"
            )
        return ServerEngine(
            config,
            model_path=model_path,
            tokenizer=tokenizer,
            max_model_len=max_model_len,
            seed=seed,
            device=device,
            weight_shapes=weight_shapes(model),
            sizes=model_sizes(model.config.get_text_config()),
            # A head may be padded beyond that; vLLM samples from none of the padding.
            vocabulary=model.config.get_text_config().vocab_size,
            stop_ids=stop_token_ids(model, tokenizer),
            logs=logs,
            vision=make_adapter(model),
            image_pixels=image_pixels,
            first_gpu=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            leads=leads,
            agree=agree,
            adapted=model if config.server.adapters == "named" else None,
        )
    if config.engine != "transformers":
        reason = check_vllm(config, model, device)
        if reason is None:
            from recap_fast.rollout.vllm import VllmEngine

            return VllmEngine(
                config,
                model_path=model_path,
                tokenizer=tokenizer,
                max_model_len=max_model_len,
                seed=seed,
                device=device,
                weight_names=weight_names(model),
                stop_ids=stop_token_ids(model, tokenizer),
                vision=make_adapter(model),
                image_pixels=image_pixels,
                kv_cache_bytes=kv_cache_bytes,
                world_size=world_size,
                timeout=timeout,
            )
        logger.warning("Rollouts use transformers, because vLLM cannot run here: %s", reason)
    how: dict[str, Any] = {"tokenizer": tokenizer, "max_model_len": max_model_len}
    if detached is not None:
        return DetachedEngine(config, model=detached(), **how)
    return EmbeddedEngine(config, model=model, **how)


def check_vllm(config: RolloutConfig, model: PreTrainedModel, device: torch.device) -> str | None:
    """Why vLLM cannot run here where another engine may take its place; None where it can.

    Raises:
        EngineError: the configuration leaves no other engine, or asks of vLLM what it cannot do.
    """
    from recap_fast.rollout.vllm import why_unavailable

    reason = why_unavailable(device, takes_images=make_adapter(model) is not None)
    if reason is None:
        if config.sleep and device.type != "cuda":
            raise EngineError(
                f"rollout.sleep is true, and the model is on {device.type}: vllm sleeps on CUDA "
                f"only (--set rollout.sleep=false)"
            )
        return None
    if config.engine == "vllm":
        raise EngineError(f'rollout.engine is "vllm", which cannot run here: {reason}')
    if config.tensor_parallel_size > 1:
        raise EngineError(
            f"rollout.tensor_parallel_size is {config.tensor_parallel_size}, which needs vllm, and "
            f"that cannot run here: {reason}"
        )
    return reason


def check_tensor_parallel(config: RolloutConfig, shapes: ModelShapes) -> None:
    """Raises `EngineError` where a model cannot be cut into `config.tensor_parallel_size`."""
    size = config.tensor_parallel_size
    for count, what in (
        (shapes.heads, "attention heads"),
        (shapes.intermediate, "intermediate values"),
    ):
        if count % size:
            raise EngineError(
                f"rollout.tensor_parallel_size is {size}, which does not divide the model's "
                f"{count} {what}"
            )
    if shapes.kv_heads % size and size % shapes.kv_heads:
        raise EngineError(
            f"rollout.tensor_parallel_size is {size}, and the model has {shapes.kv_heads} heads of "
            f"keys and values: wanted one to divide the other"
        )
