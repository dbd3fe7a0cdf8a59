"""Starts the rollout engine that a configuration names."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from recap_fast.config import RolloutConfig
from recap_fast.model.vision import make_adapter
from recap_fast.rollout.embedded import EmbeddedEngine
from recap_fast.rollout.protocol import EngineError, RolloutEngine, iter_weights, stop_token_ids

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
) -> RolloutEngine:
    """Starts the engine that `config.engine` names.

    Args:
        model: the trained model. The transformers engine samples from this very module.
        model_path: folder or hub name from which vLLM reads the architecture and first weights.
        max_model_len: longest prompt and completion together, in tokens.
        seed: of the engine itself; `SamplingSpec.seed` decides what is sampled.
        image_pixels: least and largest area of the rows' images; None where no row has any.

    Raises:
        EngineError: the engine was asked for by name and cannot run here.
    """
    device = torch.device(device)
    if config.engine != "transformers":
        from recap_fast.rollout.vllm import VllmEngine, why_unavailable

        vision = make_adapter(model)
        reason = why_unavailable(device, takes_images=vision is not None)
        if reason is None:
            return VllmEngine(
                config,
                model_path=model_path,
                tokenizer=tokenizer,
                max_model_len=max_model_len,
                seed=seed,
                device=device,
                weight_names=frozenset(name for name, _ in iter_weights(model)),
                stop_ids=stop_token_ids(model, tokenizer),
                vision=vision,
                image_pixels=image_pixels,
            )
        if config.engine == "vllm":
            raise EngineError(f'rollout.engine is "vllm", which cannot run here: {reason}')
        logger.warning("Rollouts use transformers, because vLLM cannot run here: %s", reason)
    return EmbeddedEngine(config, model=model, tokenizer=tokenizer, max_model_len=max_model_len)
