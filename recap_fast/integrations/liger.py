"""Liger's fused GRPO loss computed by ours: `FusedLinearGRPOLoss`, called as theirs is.

    from recap_fast.integrations.liger import FusedLinearGRPOLoss as LigerFusedLinearGRPOLoss

or, for a trainer that makes the import itself, before that is imported:

    import liger_kernel.chunked_loss as chunked_loss
    from recap_fast.integrations.liger import FusedLinearGRPOLoss
    chunked_loss.LigerFusedLinearGRPOLoss = FusedLinearGRPOLoss

Shapes: B sequences, T tokens of each, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist

from recap_fast.integrations.peers import require_peer
from recap_fast.ops import PolicyLossConfig, fused_linear_policy_loss, linear_logprobs
from recap_fast.ops._validate import (
    COMPUTE_DTYPES,
    IGNORED_TARGET,
    INTEGER_DTYPES,
    NUMBER_DTYPES,
    check_tensor,
    statistics_dtype,
)

__all__ = ["FusedLinearGRPOLoss"]

require_peer("liger-kernel")

Aggregation = Literal["token", "sequence", "constant"]
AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "sequence",
    "bnpo": "token",
    "dr_grpo": "constant",
    "dapo": "token",
    "cispo": "token",
}
"""Loss types of theirs that are one of ours -> how tokens are summed."""

NUMBERS = (*NUMBER_DTYPES, torch.bfloat16, torch.float16)


class FusedLinearGRPOLoss(torch.nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss` 0.8.5 by `fused_linear_policy_loss`.

    Equal to theirs in loss, gradients and metrics up to rounding, with these exceptions:

    - log-ratios (to the old policy, to the reference) are clamped to +-20 and have no gradient
      beyond, where theirs go on to infinity;
    - what old, reference and importance tensors hold at masked tokens has no effect, be it NaN;
    - a mask of other numbers than 0 and 1, or a target of -100 where it is 1, is refused (on a
      GPU, where looking would wait for it, the loss becomes NaN); theirs weighs by it;
    - for float64 inputs all is float64, where theirs stays in float32.

    Args:
        beta: coefficient of the KL term (the k3 estimator).
        compiled: taken and of no effect: nothing is left to compile.
        use_ref_model: whether forward gets a reference; without one the KL term is 0.
        chunk_size: taken and of no effect: chunks follow the device's memory, not sequences.
        epsilon_low: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high]; "cispo" bounds
            it by `epsilon_high` itself, from above only.
        epsilon_high: see epsilon_low.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo" or "cispo".
        max_completion_length: constant of "dr_grpo", in tokens.
        importance_sampling_level: "token", or "sequence" (GSPO), which "cispo" does not have.
        sapo_temperature_pos: as the other one and the vespo_ arguments, taken and of no effect:
            their loss types are refused.
        temperature: divides the logits, those of the reference too.
        delta: upper bound of the ratio in the unclipped branch; without effect in "cispo".
        use_bias_correction_kl: must be False.

    Raises:
        ValueError: an option of theirs that is not implemented here (the loss types "sapo",
            "luspo" and "vespo", `use_bias_correction_kl`), or a number outside its range.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg
        self._config()

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss [] and its metrics. Gradients reach `_input`, `lin_weight` and `bias`.

        Args:
            _input: [B, T, H] float32, bfloat16, float16 or float64; predicts the tokens beside it.
            lin_weight: [V, H].
            selected_token_ids: [B, T] integers.
            attention_mask: [B, T] 0 or 1 of any dtype, bool too.
            advantages: [B] floats.
            bias: [V].
            ref_per_token_logps: [B, T] floats; before ref_input, if both are given.
            old_per_token_logps: [B, T] floats. None: on-policy.
            ref_input: [B, T, any] of the reference, with `ref_weight` [V, any], `ref_bias` [V].
            vllm_is_ratio: [B, T], [B, 1] or [B] weights of the policy term, not of the KL.
            num_items_in_batch: tokens of all processes and accumulated batches, which "dapo" and
                "cispo" divide by, times the number of processes. None: this batch's, a mean over
                the processes.

        Returns:
            loss, and (mean KL, fraction of clipped tokens), or with beta=0 (the latter,).

        Raises:
            ValueError: a wrong shape, dtype or device, `use_ref_model` without a reference, or a
                mask as above.
        """
        b, t = _check_batch(_input, selected_token_ids, attention_mask, advantages)
        config, full = self._config(), statistics_dtype(_input.dtype)
        mask = attention_mask != 0
        targets = selected_token_ids.long().where(mask, IGNORED_TARGET).flatten()
        reference = self._reference(
            (b, t), targets, ref_per_token_logps, ref_input, ref_weight, ref_bias
        )
        old = _per_token("old_per_token_logps", old_per_token_logps, (b, t))
        advantages = advantages.detach().to(full)
        counted = mask.sum().to(full)
        denominator = self._denominator(b, counted, num_items_in_batch)
        output = fused_linear_policy_loss(
            _input.flatten(0, 1),
            lin_weight,
            targets,
            sequence_ids=torch.arange(b, device=mask.device).unsqueeze(1).expand(b, t).flatten(),
            advantages=advantages.unsqueeze(1),
            objective_weights=_one_or_nan(attention_mask, selected_token_ids, advantages),
            old_logprobs=old,
            ref_logprobs=reference,
            importance_weights=_importance_weights(vllm_is_ratio, (b, t)),
            bias=bias,
            denominators=denominator.reshape(1),
            kl_denominator=denominator,
            config=config,
        )
        tokens = counted.clamp(min=1)
        clipped = self._is_clipped(output.logprobs.detach().view(b, t), old, mask, advantages)
        metrics = [(clipped & mask).sum() / tokens]
        if self.beta != 0:
            # Without a reference theirs takes the policy itself for one.
            kl = torch.zeros_like(tokens) if output.kl is None else output.kl.sum()
            metrics.insert(0, kl / tokens)
        return output.loss, tuple(metrics)

    def _config(self) -> PolicyLossConfig:
        """Read anew by each call, as theirs reads its attributes.

        Raises:
            ValueError: an option that is not implemented, or a number outside its range.
        """
        if self.loss_type not in AGGREGATIONS:
            known = ", ".join(AGGREGATIONS)
            raise ValueError(f"loss_type: wanted one of {known}, got {self.loss_type!r}")
        level: Any = self.importance_sampling_level
        if level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level: wanted 'token' or 'sequence', got {level!r}"
            )
        if self.use_bias_correction_kl:
            raise ValueError("use_bias_correction_kl: wanted False, got True: not implemented")
        is_cispo = self.loss_type == "cispo"
        if is_cispo and level == "sequence":
            raise ValueError(
                "Sequence-level importance sampling is not supported for loss_type='cispo': "
                "wanted importance_sampling_level 'token'"
            )
        for name in ("beta", "epsilon_low", "epsilon_high"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: wanted a finite number >= 0, got {getattr(self, name)}")
        if self.delta is not None and not (math.isfinite(self.delta) and self.delta > 0):
            raise ValueError(f"delta: wanted None or a finite number > 0, got {self.delta}")
        return PolicyLossConfig(
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high - 1 if is_cispo else self.epsilon_high,
            clip_delta=self.delta,
            loss_type="cispo" if is_cispo else "clip",
            ratio_level=level,
            aggregation=AGGREGATIONS[self.loss_type],
            max_completion_length=self.max_completion_length,
            kl_coef=self.beta if self.use_ref_model else 0.0,
            temperature=self.temperature,
        )

    def _reference(
        self,
        shape: tuple[int, int],
        targets: Tensor,
        logps: Tensor | None,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor | None:
        """Log-probs of the reference [B * T]; None where the loss has no use for them."""
        if not self.use_ref_model:
            return None
        if logps is None and hidden is None:
            raise ValueError("use_ref_model: wanted ref_per_token_logps or ref_input, got neither")
        if logps is not None and hidden is not None:
            warnings.warn(
                "ref_per_token_logps and ref_input are both given: the former is taken",
                stacklevel=3,
            )
        if self.beta == 0:
            return None
        if logps is not None:
            return _per_token("ref_per_token_logps", logps, shape)
        b, t = shape
        hidden = check_tensor(
            "ref_input", hidden, [("B", b), ("T", t), ("H", None)], COMPUTE_DTYPES, targets.device
        )
        if weight is None:
            raise ValueError("ref_weight: wanted a tensor [V, H] beside ref_input, got None")
        with torch.no_grad():
            logprobs, _ = linear_logprobs(
                hidden.flatten(0, 1), weight, targets, bias=bias, temperature=self.temperature
            )
        return logprobs

    def _denominator(
        self, sequences: int, counted: Tensor, num_items_in_batch: Tensor | float | None
    ) -> Tensor:
        """What the sum over tokens is divided by, []; below 1 it is taken as 1."""
        if self.loss_type in ("grpo", "dr_grpo"):
            return torch.full_like(counted, sequences)
        if self.loss_type == "bnpo":
            return counted
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if num_items_in_batch is not None:
            return (torch.zeros_like(counted) + num_items_in_batch).reshape(()) / processes
        if processes > 1:
            counted = counted.clone()
            dist.all_reduce(counted)
        return counted / processes

    def _is_clipped(
        self, logprobs: Tensor, old: Tensor | None, mask: Tensor, advantages: Tensor
    ) -> Tensor:
        """[B, T] or [B, 1] bool, as theirs: a bound is passed on the side that it bounds.

        `PolicyLossOutput.clip_fraction` asks for more: that the clipped term decides.
        """
        log_ratio = torch.zeros_like(logprobs)
        if old is not None:
            log_ratio = (logprobs - old.view_as(logprobs)).where(mask, 0.0)
        if self.importance_sampling_level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio, advantages = log_ratio.exp(), advantages.unsqueeze(1)
        if self.loss_type == "cispo":
            return (ratio > self.epsilon_high) & (advantages > 0)
        low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        return low | ((ratio > 1 + self.epsilon_high) & (advantages > 0))


def _check_batch(
    hidden: Tensor, token_ids: Tensor, mask: Tensor, advantages: Tensor
) -> tuple[int, int]:
    """B and T. Raises ValueError, by the names of `FusedLinearGRPOLoss.forward`."""
    shape = [("B", None), ("T", None), ("H", None)]
    b, t, _ = check_tensor("_input", hidden, shape, COMPUTE_DTYPES).shape
    tokens, device = [("B", b), ("T", t)], hidden.device
    check_tensor("selected_token_ids", token_ids, tokens, INTEGER_DTYPES, device)
    check_tensor("attention_mask", mask, tokens, (torch.bool, torch.uint8, *NUMBERS), device)
    check_tensor("advantages", advantages, tokens[:1], NUMBERS, device)
    return b, t


def _per_token(name: str, values: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Log-probs [B, T] as [B * T], at least float32."""
    if values is None:
        return None
    check_tensor(name, values, list(zip("BT", shape, strict=True)), NUMBERS)
    return values.detach().to(statistics_dtype(values.dtype)).flatten()


def _importance_weights(ratio: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """vllm_is_ratio [B, T], [B, 1] or [B] as [B * T], at least float32."""
    if ratio is None:
        return None
    b, t = shape
    if tuple(ratio.shape) not in ((b, t), (b, 1), (b,)):
        got = list(ratio.shape)
        raise ValueError(f"vllm_is_ratio: wanted shape [B={b}, T={t}], [B, 1] or [B], got {got}")
    ratio = ratio.detach().to(statistics_dtype(ratio.dtype))
    return (ratio.unsqueeze(1) if ratio.dim() == 1 else ratio).expand(b, t).flatten()


def _one_or_nan(mask: Tensor, token_ids: Tensor, advantages: Tensor) -> Tensor:
    """[1]: 1; NaN, and with it the loss, for an advantage of NaN, which would mean none to us.

    And for a mask that is no mask, if looking at it here would wait for the device. Elsewhere:

    Raises:
        ValueError: a mask of other numbers than 0 and 1, or an ignored target where it is 1.
    """
    odd = (mask != 0) & (mask != 1)
    ignored = (mask != 0) & (token_ids == IGNORED_TARGET)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        if odd.any():
            raise ValueError(f"attention_mask: wanted 0 or 1, got {mask[odd][0].item()}")
        if ignored.any():
            raise ValueError(
                "selected_token_ids: wanted a token where attention_mask is 1, got -100"
            )
    wrong = (odd | ignored).any() | advantages.isnan().any()
    return advantages.new_ones(1).where(~wrong, torch.nan)
