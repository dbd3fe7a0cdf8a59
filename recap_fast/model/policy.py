"""Loads language models, with vision or without, and runs their backbones on packed batches.

Parameters are float32 master weights, but for the frozen base of LoRA's adapters; the backbone
computes in `ModelConfig.dtype` under autocast.
The head's GEMM is not run here: `Policy.head` hands its weight to the fused losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recap_fast.config import ModelConfig
from recap_fast.model.attention import IMPLEMENTATION, SDPA, Backend, register
from recap_fast.model.attention_choice import choose_attention, choose_vision_attention
from recap_fast.model.chat_template import MEDIA
from recap_fast.model.checkpointing import LayerModes, Mode, checkpoint_layers, decoder_layers
from recap_fast.model.errors import ModelError
from recap_fast.model.generation_config import repair_generation_config
from recap_fast.model.liger import patch_backbone
from recap_fast.model.logits import refuse_more_than_backbone_and_head, scale_and_softcap
from recap_fast.model.lora import (
    add_adapters,
    base_of,
    is_adapter,
    load_adapters,
)
from recap_fast.model.model_path import SMOLLM2
from recap_fast.model.precision import compute_dtype
from recap_fast.model.sharding import compute_device, inside, is_sharded, shard_model
from recap_fast.model.train_mode import enter_train_mode
from recap_fast.model.vision import is_vision_language, make_adapter

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from recap_fast.model.batch import PackedBatch


@dataclass(frozen=True, slots=True)
class Head:
    """The output projection: logits = hidden @ weight.T + bias, then the soft cap."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal LM, as the fused operations take it.

    Raises:
        ModelError: logits that are scaled or changed in an unknown way, more than a head above the
            backbone, or a head that is no linear layer. LoRA on a head is not: the weight that it
            shows is that of the layer below it.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"the head must be a linear layer, without LoRA, got {type(layer)}")
    try:
        scale, softcap = scale_and_softcap(model)
        refuse_more_than_backbone_and_head(model)
    except ValueError as error:
        raise ModelError(f"model.path: {error}") from None
    if scale != 1:
        raise ModelError(f"model.path: logits that are multiplied, by {scale}, are not supported")
    return Head(layer.weight, layer.bias, softcap)


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
        self._backbone = model.get_decoder()
        head_of(model)  # refuses what it cannot train

    @property
    def head(self) -> Head:
        return head_of(self.model)

    @property
    def device(self) -> torch.device:
        return compute_device(self.model)

    @property
    def frozen_tower(self) -> nn.Module | None:
        """The vision tower, if there is one and nothing of it is trained."""
        tower = None if self.vision is None else self.vision.tower
        trained = tower is None or any(p.requires_grad for p in tower.parameters())
        return None if trained else tower

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

    def score(self, batch: PackedBatch, function: Callable[[Tensor], Any]) -> Any:
        """function(hidden [N, H]) with the states of `hidden`, run where the weights are whole:
        inside the forward of the model and, where it is sharded apart, of the head."""

        def run() -> Any:
            return inside(self.model.get_output_embeddings(), function, self.hidden(batch))

        return inside(self.model, run)

    def _inputs(self, batch: PackedBatch) -> dict[str, Any]:
        ids = batch.input_ids[None]
        if batch.images is None:
            return {"input_ids": ids}
        assert self.vision is not None, "the batch was packed with another model's adapter"
        # A frozen tower is no part of the shards, and float32 unless it was published narrower.
        with self._autocast(self.frozen_tower is not None or not is_sharded(self.model)):
            return self.vision.embed(ids, batch.images)

    def shard(self, mesh: DeviceMesh | None, *, offload: bool = False) -> None:
        """Keeps the parameters in shards over the mesh's processes; a frozen tower stays whole.

        Args:
            offload: the shards stay in the host's memory.
        """
        if mesh is not None:
            shard_model(self.model, mesh, self.compute_dtype, self.frozen_tower, offload=offload)

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
        """Off for a sharded model, whose working weights are in the compute dtype already."""
        return self._autocast(not is_sharded(self.model))

    def _autocast(self, wanted: bool) -> torch.autocast:
        narrow = wanted and self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype, enabled=narrow)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda, but torch sees no CUDA device here")
    return torch.device(name)


def model_dtype(config: ModelConfig) -> torch.dtype:
    """What the model computes in on its device."""
    return compute_dtype(config.dtype, pick_device(config.device))


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
    config: ModelConfig,
    path: str,
    *,
    trainable: bool = True,
    attention: str | None = None,
    seed: int = 0,
) -> Policy:
    """Loads a model in float32 for training, or in the compute dtype as a frozen reference.

    A base under adapters is read in the compute dtype where it was published in that.

    Args:
        path: what `resolve_model` returned, or a checkpoint's folder, which may hold adapters.
        attention: backend instead of the configuration's: a reference runs the policy's batches.
        seed: of new adapters' first values.

    Raises:
        ModelError: the model, or its attention backend, cannot be used here.
        LoraError: its adapters cannot be made or read.
    """
    device = pick_device(config.device)
    auto_class, model_config = find_class(config, path, device, trainable)
    has_adapters = config.lora is not None or is_adapter(path)
    base = base_of(path)
    model, loading = _from_pretrained(
        auto_class,
        base,
        dtype=weight_dtype(config, trainable, model_config.dtype if has_adapters else None),
        attn_implementation=ATTENTION,
        output_loading_info=True,
        **_placement(device),
    )
    refuse_missing(loading["missing_keys"], base)
    return make_policy(
        model.to(device), config, path, trainable=trainable, attention=attention, seed=seed
    )


ATTENTION = {"": IMPLEMENTATION, "text_config": IMPLEMENTATION}


def find_class(
    config: ModelConfig, path: str, device: torch.device, trainable: bool
) -> tuple[Any, PreTrainedConfig]:
    """transformers' class for a model, ready to run on the device, and the model's configuration.

    Raises:
        ModelError: there is no such model, or it has no tower to train.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    register()
    model_config = _from_pretrained(AutoConfig, base_of(path))
    takes_images = is_vision_language(model_config)
    if config.train_vision and not takes_images:
        raise ModelError(
            f"model.train_vision: {path} is a model of type {model_config.model_type}, whose "
            f"vision, if any, is not supported"
        )
    if trainable:
        patch_backbone(config, model_config.model_type, device)
    return AutoModelForImageTextToText if takes_images else AutoModelForCausalLM, model_config


def weight_dtype(
    config: ModelConfig, trainable: bool, published: torch.dtype | None = None
) -> torch.dtype:
    """Float32 for what is trained.

    Args:
        published: of a base under adapters: its files' dtype, which it stays in where that is what
            is computed in.
    """
    compute = model_dtype(config)
    return compute if not trainable or published == compute else torch.float32


def refuse_missing(names: Iterable[str], path: str) -> None:
    """Raises `ModelError` where weights of the model are not in its files."""
    if missing := sorted(names):
        raise ModelError(
            f"model.path: {path} lacks {len(missing)} of the model's weights, such as {missing[0]}"
        )


def make_policy(
    model: PreTrainedModel,
    config: ModelConfig,
    path: str,
    *,
    trainable: bool = True,
    attention: str | None = None,
    device: torch.device | None = None,
    seed: int = 0,
) -> Policy:
    """`load_policy` for a model whose weights are there, on its device. Raises `ModelError`.

    Args:
        path: what messages call the model, and adapters their base; a folder of adapters is read.
        device: where a model on the meta device will have its weights; None: where it is.
    """
    dtype = model_dtype(config)
    _choose_trained(model, config, path, trainable, seed)
    if trainable:
        enter_train_mode(model)
        if config.gradient_checkpointing != "auto":  # which comes of the memory plan
            _checkpoint(model, path, config.gradient_checkpointing)
        repair_generation_config(model)
    else:
        model.eval()
    name = attention or config.attention
    backend = choose_attention(name, path, model, dtype, device)
    vision_backend = SDPA
    if is_vision_language(model.config):
        vision_backend = choose_vision_attention(name, path, model, dtype, device)
    policy = Policy(model, dtype, backend, vision_backend)
    if policy.vision is not None and not config.train_vision:
        policy.vision.tower.requires_grad_(False)
    narrow_tower(policy)
    return policy


def _checkpoint(model: PreTrainedModel, path: str, mode: Mode) -> None:
    try:
        checkpoint_layers(model, LayerModes.uniform(mode, len(decoder_layers(model))))
    except ValueError as error:
        raise ModelError(f"model.gradient_checkpointing: {path}: {error}") from None


def narrow_tower(policy: Policy) -> None:
    """Keeps a frozen tower on a GPU in the compute dtype; elsewhere float32 is not slower."""
    if policy.frozen_tower is not None and policy.device.type == "cuda":
        narrow_frozen(policy.frozen_tower, policy.compute_dtype)


def _choose_trained(
    model: PreTrainedModel, config: ModelConfig, path: str, trainable: bool, seed: int
) -> None:
    """Everything is trained, or nothing, or the adapters that are made here."""
    model.requires_grad_(trainable)
    if not is_adapter(path) and not (trainable and config.lora):
        return
    narrow_frozen(model, model_dtype(config))
    vision = make_adapter(model)
    frozen = None if vision is None or config.train_vision else vision.tower
    if is_adapter(path):
        load_adapters(model, path, frozen=frozen)
        if not trainable:
            model.requires_grad_(False)
    elif config.lora:
        add_adapters(model, config.lora, path, frozen=frozen, seed=seed)


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

    Buffers stay: rotary frequencies need float32. So does what has no values yet.
    """
    parameters = list(module.parameters())
    if not any(p.is_meta for p in parameters) and all(
        torch.equal(p, p.to(dtype).to(p.dtype)) for p in parameters
    ):
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)


def _from_pretrained(auto_class: Any, path: str, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except Exception as error:  # of a damaged folder transformers raises anything
        first = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"model.path: {path} could not be loaded (a folder, a hub name that this machine "
            f"reaches, or {SMOLLM2!r} is wanted): {first}"
        ) from error
