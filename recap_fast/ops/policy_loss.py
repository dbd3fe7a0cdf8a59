"""The head and the policy loss in one: logits, log-probs, loss and gradients, chunk by chunk.

Shapes: N packed tokens, H hidden, V vocabulary, S sequences (rollouts), K objectives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recap_fast.loss_config import PolicyLossConfig
from recap_fast.ops import objective, reference
from recap_fast.ops._autograd import graph_is_kept, refuse_double_backward
from recap_fast.ops._validate import resolve_impl, statistics_dtype
from recap_fast.ops.advantages import normalized_advantages
from recap_fast.ops.arguments import LossArguments
from recap_fast.ops.chunked import Head, Swept, Wanted, make_head, sweep
from recap_fast.ops.output import PolicyLossOutput
from recap_fast.ops.rows import RowGradient
from recap_fast.ops.tokens import TokenTable, tabulate


def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    sequence_ids: Tensor,
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    group_ids: Tensor | None = None,
    objective_weights: Tensor | None = None,
    token_objectives: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    bias: Tensor | None = None,
    denominators: Tensor | None = None,
    kl_denominator: Tensor | float | None = None,
    config: PolicyLossConfig = PolicyLossConfig(),
    impl: str = "auto",
) -> PolicyLossOutput:
    """Reweighted policy-gradient and supervised losses of one packed batch.

    loss = 1/K * sum_k lambda_k L_k + kl_coef * KL - entropy_coef * H (RECAP, arXiv 2510.21978,
    over GRPO, arXiv 2402.03300), from hidden states, without ever holding [N, V] logits. The
    gradient is made in the forward pass: 3 GEMMs in all, 4 for off-policy ratios at sequence level.

    Args:
        hidden: [N, H] float32, bfloat16 or float64; already predicts `targets`. Its dtype is that
            of the GEMMs; weight and bias are cast to it, their gradients summed in float32 and
            returned in their own dtype. Rows may be strided; no copy is made of them.
        weight: [V, H]; may be frozen, and may be the embedding too (a tied head).
        targets: [N] int64; -100 is ignored and gets no gradient.
        sequence_ids: [N] int32 or int64 in [0, S); any value at ignored targets.
        rewards: [S, K] float32; NaN where an objective is absent. Needs `group_ids`; becomes
            advantages as by `group_advantages`. Exactly one of rewards and advantages is given.
        advantages: [S, K] float32; NaN where an objective is absent. 0 still counts.
        group_ids: [S] integers; rollouts of one prompt share one.
        objective_weights: [K] lambda, read on the device; None: all 1. Gets no gradient.
        token_objectives: [N] integers; -1: policy-gradient token; k >= 0: supervised token of
            objective k. None: all -1.
        old_logprobs: [N] float32 of the policy that the ratio compares with. None: on-policy, the
            ratio is exactly 1, the gradient as if old = logprobs.detach().
        ref_logprobs: [N] float32 of the reference policy of the KL term.
        rollout_logprobs: [N] float32 as the rollout engine sampled them.
        bias: [V].
        denominators: [K] global d_k; None: counted here. Below 1 they are taken as 1.
        kl_denominator: [] or a number: that of KL and entropy; None: counted here.
        config: the loss's constants. `logits_dtype` "float32" asks the GEMM for float32 logits of
            bfloat16 operands, which torch offers on CUDA; its CPU GEMM leaves bfloat16.
        impl: "torch" (chunked), "reference" (eager, holds [N, V]), "triton", or "auto". An
            explicit name is run or refused, never replaced.

    Returns:
        PolicyLossOutput; everything but `loss` is detached.

    Raises:
        ValueError: a wrong shape, dtype or device, or arguments that contradict each other.
        NotImplementedError: impl="triton".
        RuntimeError: double backward.
    """
    arguments = LossArguments(
        hidden=hidden,
        weight=weight,
        targets=targets,
        sequence_ids=sequence_ids,
        rewards=rewards,
        advantages=advantages,
        group_ids=group_ids,
        objective_weights=objective_weights,
        token_objectives=token_objectives,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        bias=bias,
        denominators=denominators,
        kl_denominator=kl_denominator,
    )
    arguments.check(config)
    if resolve_impl(impl) == "reference":
        return reference.policy_loss(arguments, config)
    wanted = _wanted(arguments)
    output, swept = _forward(arguments, wanted, config)
    if not wanted.any():
        return output
    gradients = (
        swept.d_hidden,
        None if swept.d_weight is None else swept.d_weight.to(weight.dtype),
        None if swept.d_bias is None or bias is None else swept.d_bias.to(bias.dtype),
    )
    del swept  # a float32 sum must not live beside its rounded copy until backward
    loss = _AttachGradients.apply(hidden, weight, bias, output.loss, *gradients)
    return replace(output, loss=loss)


def _wanted(arguments: LossArguments) -> Wanted:
    """Gradients that autograd may ask for: none under no_grad, none of a frozen head."""
    if not torch.is_grad_enabled():
        return Wanted()
    bias = arguments.bias
    return Wanted(
        hidden=arguments.hidden.requires_grad,
        weight=arguments.weight.requires_grad,
        bias=bias is not None and bias.requires_grad,
    )


@torch.no_grad()
def _forward(
    arguments: LossArguments, wanted: Wanted, config: PolicyLossConfig
) -> tuple[PolicyLossOutput, Swept]:
    """Everything that is returned, and the wanted gradients of the loss."""
    advantages, present = _advantage_table(arguments)
    tokens = tabulate(arguments, advantages, present, config)
    head = make_head(
        arguments.hidden,
        arguments.weight,
        arguments.bias,
        arguments.targets,
        config.temperature,
        config.logit_softcap,
        config.logits_dtype,
    )
    swept = sweep(head, wanted, _row_gradient(head, tokens, config) if wanted.any() else None)
    losses, clip_fraction = objective.objective_losses(tokens, swept.logprobs, config)
    kl = None
    if tokens.ref is not None:
        kl, _ = objective.kl_estimate(tokens, swept.logprobs, config)
    output = PolicyLossOutput(
        loss=objective.total_loss(tokens, losses, swept.entropy, kl, config),
        objective_losses=losses,
        logprobs=swept.logprobs,
        entropy=swept.entropy,
        kl=kl,
        clip_fraction=clip_fraction,
        advantages=advantages,
    )
    return output, swept


def _advantage_table(arguments: LossArguments) -> tuple[Tensor, Tensor]:
    """Advantages [S, K], 0 where absent, and presence [S, K] bool."""
    full = statistics_dtype(arguments.hidden.dtype)
    if arguments.rewards is not None:
        assert arguments.group_ids is not None
        rewards = arguments.rewards.detach()
        return normalized_advantages(rewards, arguments.group_ids).to(full), ~rewards.isnan()
    assert arguments.advantages is not None
    given = arguments.advantages.detach().to(full)
    present = ~given.isnan()
    return given.where(present, 0.0), present


def _row_gradient(head: Head, tokens: TokenTable, config: PolicyLossConfig) -> RowGradient:
    """How the loss depends on each token's log-prob and entropy.

    Known at once when nothing is compared with the log-probs; from all log-probs (one more GEMM)
    for ratios of whole sequences; else row by row, as the log-probs come.
    """
    by_entropy = objective.entropy_gradient(tokens, config)
    by_logprob = None
    if objective.is_constant(tokens, config):
        by_logprob = objective.logprob_gradient(
            tokens, torch.zeros_like(tokens.regulariser_share), config
        )
    elif config.ratio_level == "sequence":
        by_logprob = objective.logprob_gradient(tokens, sweep(head, Wanted()).logprobs, config)

    def row_gradient(
        rows: slice, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        known = by_logprob[rows] if by_logprob is not None else None
        if known is None:
            known = objective.logprob_gradient(tokens.rows(rows), logprobs, config)
        return known, None if by_entropy is None else by_entropy[rows]

    return row_gradient


class _AttachGradients(torch.autograd.Function):
    """Hangs gradients made in the forward pass onto the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        refuse_double_backward("fused_linear_policy_loss")
        keep = graph_is_kept()
        scaled = [None if g is None else _scaled(g, grad_output, keep) for g in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def _scaled(gradient: Tensor, factor: Tensor, keep: bool) -> Tensor:
    """gradient * factor without reading the factor on the host; in place unless kept for later."""
    if factor.is_cuda:
        # CUDA would round a 0-dim factor to bfloat16 first; with dimensions it promotes.
        factor = factor.reshape([1] * gradient.dim())
    if keep:
        return torch.mul(gradient, factor).to(gradient.dtype)
    return torch.mul(gradient, factor, out=gradient)
