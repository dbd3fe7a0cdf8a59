"""TRL's fused head, computed by our operators inside the head's own forward.

Shapes: B rows, T tokens of a row, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from recap_fast.model.logits import refuse_more_than_backbone_and_head, scale_and_softcap
from recap_fast.ops.logprobs import linear_logprobs, linear_token_statistics
from recap_fast.reweighting.base import checked_positive

__all__ = ["completion_columns", "use_recap_fast_head"]

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True, slots=True)
class _Scoring:
    """What `use_recap_fast_head` was asked for, with the model's scale and softcap folded in."""

    temperature: float
    softcap: float | None
    outputs: tuple[str, ...]
    in_float32: bool


def use_recap_fast_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Compute TRL's fused head by `linear_logprobs` and `linear_token_statistics`.

    As after `trl.trainer.utils.add_fused_lm_head`, `model(..., labels=labels, fused_lm_head=True)`
    gives a `FusedCausalLMOutput`, and without `fused_lm_head` the model is what it was. May be
    called on a model that TRL has patched, such as `trainer.model`, and on a PEFT model.

    Two differences. The statistics are computed inside the head module's own forward, so that the
    hooks of FSDP2 gather its weight and reduce its gradient also where the head is a unit of its
    own (TRL's `full_tensor()` there leaves each rank with the gradient of its own tokens). And on a
    GPU all given positions are scored, as choosing those with labels would wait for the device;
    `completion_columns` narrows them.

    Args:
        model: a causal or image-text language model of transformers.
        temperature: divides the logits.
        cast_lm_head_to_fp32: run the head in float32, outside autocast.
        outputs: fields to fill: "log_probs" (always there) and "entropy" [B, T - 1] float32,
            differentiable; "log_sum_sq_probs" and "mean_logits" [B, T - 1] float32 and "is_top1"
            [B, T - 1] bool, without gradient. 0 and False where the label is -100.

    Raises:
        ValueError: an unknown output; a temperature that is no number above 0; a model without a
            head; a head that is more than one linear map (LoRA on the head, a
            quantised one); more than a head above the backbone, as in BERT's family; logits that
            the configuration changes in an unknown way, or in one that the model's forward leaves
            out; DeepSpeed ZeRO-3.
    """
    if isinstance(outputs, str):
        raise ValueError(f"outputs: wanted a tuple of names, got the string {outputs!r}")
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"outputs: wanted names in {OUTPUTS}, got {unknown[0]!r}")
    checked_positive("temperature", temperature)
    if is_deepspeed_zero3_enabled():
        raise ValueError("use_recap_fast_head: wanted FSDP2, DDP or one process, got ZeRO-3")
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(
            "use_recap_fast_head: wanted a model of transformers with a language-model head, such "
            f"as AutoModelForCausalLM gives, got {type(model).__name__}"
        )
    scale, softcap = scale_and_softcap(model)
    # c tanh(s x / c) / T = (c/s) tanh(x / (c/s)) / (T/s): a factor needs no pass of its own.
    scoring = _Scoring(
        temperature=temperature / scale,
        softcap=None if softcap is None else softcap / scale,
        outputs=tuple(outputs),
        in_float32=cast_lm_head_to_fp32,
    )
    _plain_head(model)
    refuse_more_than_backbone_and_head(model)
    plain_forward = model.forward

    @functools.wraps(type(model).forward)  # generate checks its arguments against the signature
    def forward(self: Any, *arguments: Any, fused_lm_head: bool = False, **keywords: Any) -> Any:
        if not fused_lm_head:
            return plain_forward(*arguments, **keywords)
        return _fused_forward(self, scoring, *arguments, **keywords)

    model.forward = types.MethodType(forward, model)


_columns: ContextVar[int | None] = ContextVar("completion_columns", default=None)


@contextmanager
def completion_columns(count: int) -> Iterator[None]:
    """Says that only the last `count` of the columns [B, T] have labels; others are not scored."""
    token = _columns.set(count)
    try:
        yield
    finally:
        _columns.reset(token)


def _fused_forward(
    model: Any,
    scoring: _Scoring,
    *arguments: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **keywords: Any,
) -> FusedCausalLMOutput:
    if labels is None and shift_labels is None:
        raise ValueError("fused_lm_head=True: wanted labels [B, T] or shift_labels, got neither")
    config = model.config.get_text_config()
    keywords["use_cache"] = False
    if getattr(config, "output_router_logits", False):
        keywords.setdefault("output_router_logits", True)
    backbone = model.base_model(*arguments, **keywords)
    hidden = backbone.last_hidden_state
    if shift_labels is None:
        assert labels is not None
        hidden, targets = hidden[:, :-1], labels[:, 1:]
    else:
        targets = shift_labels
    fields = _token_fields(_plain_head(model), hidden, targets, scoring)
    mask = (targets != -100).to(fields["log_probs"].device)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss, aux_loss = -fields["log_probs"].sum() / count, None
    if keywords.get("output_router_logits"):
        aux_loss = load_balancing_loss_func(
            backbone.router_logits,
            config.num_experts,
            config.num_experts_per_tok,
            keywords.get("attention_mask"),
        )
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)


def _token_fields(
    head: nn.Linear, hidden: Tensor, targets: Tensor, scoring: _Scoring
) -> dict[str, Tensor]:
    """The wanted fields [B, T] of hidden [B, T, H]."""
    length, columns = targets.shape[1], _columns.get()
    if columns is not None and columns < length:
        hidden, targets = hidden[:, -columns:], targets[:, -columns:]
    # Through the module's call, for FSDP's hooks; the head's forward is patched for it alone.
    with _scoring_forward(head):
        fields = head(hidden, targets=targets, scoring=scoring)
    return {
        name: nn.functional.pad(field, (length - field.shape[1], 0))
        for name, field in fields.items()
    }


@contextmanager
def _scoring_forward(head: Any) -> Iterator[None]:
    """Lets a call of the head score targets; afterwards the module is as it was."""
    own = head.__dict__.get("forward")
    head.forward = types.MethodType(_score, head)
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _score(
    head: nn.Linear, hidden: Tensor, *, targets: Tensor, scoring: _Scoring
) -> dict[str, Tensor]:
    """The wanted fields [B, T] of hidden [B, T, H], inside the head's own forward."""
    # With the model split over devices, the backbone may end on another one than the head.
    hidden, targets = hidden.to(head.weight.device), targets.to(head.weight.device)
    outside_autocast: Any = nullcontext()
    if scoring.in_float32:
        hidden = hidden.float()
        outside_autocast = torch.autocast(hidden.device.type, enabled=False)
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    rows = None
    # Choosing rows needs their number on the host: free on a CPU, a wait for the device elsewhere.
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        (rows,) = torch.nonzero(flat_targets != -100, as_tuple=True)
        flat, flat_targets = flat[rows], flat_targets[rows]
    with outside_autocast:
        fields = _statistics(flat, head.weight, head.bias, flat_targets, scoring)
    if rows is not None:
        fields = {
            name: field.new_zeros(targets.numel()).index_copy(0, rows, field)
            for name, field in fields.items()
        }
    return {name: field.view(targets.shape) for name, field in fields.items()}


def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scoring: _Scoring
) -> dict[str, Tensor]:
    """The wanted fields [N] of hidden [N, H]."""
    how: dict[str, Any] = {
        "bias": bias,
        "temperature": scoring.temperature,
        "logit_softcap": scoring.softcap,
    }
    if not set(scoring.outputs) - {"log_probs", "entropy"}:
        logprobs, entropy = linear_logprobs(hidden, weight, targets, **how)
        known = {"log_probs": logprobs, "entropy": entropy}
    else:
        found = linear_token_statistics(hidden, weight, targets, **how)
        known = {"log_probs": found.logprobs} | {
            name: getattr(found, name) for name in OUTPUTS if name != "log_probs"
        }
    return {name: known[name] for name in ("log_probs", *scoring.outputs)}


def _plain_head(model: Any) -> nn.Linear:
    """The model's head: looked up at each call, since FSDP and PEFT replace modules later."""
    head = model.get_output_embeddings()
    active = getattr(head, "active_adapter", None)
    if isinstance(active, str) and hasattr(head, "modules_to_save"):
        # PEFT's trained copy, or what it was copied from, which a reference is scored with.
        head = head.original_module if head.disable_adapters else head.modules_to_save[active]
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the head of {type(model).__name__}: wanted a plain torch.nn.Linear, got "
            f"{type(head).__module__}.{type(head).__name__} (LoRA on the head, or a quantised one, "
            f"is not supported)"
        )
    return head
