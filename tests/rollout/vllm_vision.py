"""vLLM's vision-language models on a machine without torchvision.

Of torchvision they need transformers' image processor (there is one that uses Pillow instead) and a
video processor, which images do not ask for. Where torchvision is installed nothing is replaced.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from recap_fast.rollout import vllm

CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
_PROCESSOR = "transformers.models.qwen2_vl.image_processing_qwen2_vl"


@contextmanager
def vllm_model_class(kind: str) -> Iterator[Any]:
    """vLLM's class for a model type. Its modules are forgotten at the end, if they were made with
    a stand-in."""
    pytest.importorskip("vllm.model_executor.models.utils")
    name = f"vllm.model_executor.models.{kind}"
    if is_torchvision_available():
        yield getattr(importlib.import_module(name), CLASSES[kind])
        return
    pillow = importlib.import_module(_PROCESSOR.replace("processing_", "processing_pil_"))
    stand_in = ModuleType(_PROCESSOR)
    stand_in.__dict__.update(
        smart_resize=pillow.smart_resize, Qwen2VLImageProcessor=Qwen2VLImageProcessorPil
    )
    before = set(sys.modules)
    sys.modules[_PROCESSOR] = stand_in
    try:
        yield getattr(importlib.import_module(name), CLASSES[kind])
    finally:
        for module in set(sys.modules) - before:
            if module == _PROCESSOR or module.startswith("vllm.model_executor.models.qwen"):
                del sys.modules[module]


@contextmanager
def vllm_takes_images(kind: str, folder: Path) -> Iterator[None]:
    """Lets vLLM load the model of that type that is saved in a folder, with images."""
    with vllm_model_class(kind) as model_class:
        if is_torchvision_available():
            yield
            return
        from vllm import ModelRegistry

        info = model_class._processor_factory.info
        kept = ModelRegistry.models[CLASSES[kind]], info.get_hf_processor, vllm._has_torchvision
        vllm._has_torchvision = lambda: True
        # vLLM looks at a class that it has to find itself in a process of its own.
        ModelRegistry.register_model(CLASSES[kind], model_class)
        info.get_hf_processor = lambda self, **options: _ImageProcessor(
            folder, self.get_tokenizer(), options
        )
        try:
            yield
        finally:
            ModelRegistry.models[CLASSES[kind]], info.get_hf_processor, vllm._has_torchvision = kept


class _ImageProcessor(Qwen2_5_VLProcessor):
    """transformers' processor of images and text, without videos."""

    def __init__(self, folder: Path, tokenizer: Any, options: dict[str, Any]) -> None:
        self.tokenizer, self.chat_template = tokenizer, None
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, **options)
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        self.video_processor = SimpleNamespace(  # asked for its limits while vLLM starts
            valid_kwargs=type("None", (), {}),
            merge_size=self.image_processor.merge_size,
            temporal_patch_size=self.image_processor.temporal_patch_size,
            size={"shortest_edge": 64, "longest_edge": 4096},
        )
