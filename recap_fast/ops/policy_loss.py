"""The head and the policy loss in one: logits, log-probs, loss and gradients, chunk by chunk.

Shapes: N packed tokens, H hidden, V vocabulary, S sequences (rollouts), K objectives.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from recap_fast.ops import objective, reference
from recap_fast.ops._autograd import empty_if_none
from recap_fast.ops._validate import resolve_impl, statistics_dtype
from recap_fast.ops.advantages import normalized_advantages
from recap_fast.ops.arguments import LossArguments
from recap_fast.ops.attach import attach_gradients
from recap_fast.ops.autocast import follow_autocast
from recap_fast.ops.chunked import Head, HeadStage, Swept, TorchRows, Wanted, make_head, sweep
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.ops.output import PolicyLossOutput
from recap_fast.ops.rows import RowGradient
from recap_fast.ops.tokens import TokenTable, count, tabulate


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
    importance_weights: Tensor | None = None,
    bias: Tensor | None = None,
    denominators: Tensor | None = None,
    kl_denominator: Tensor | float | None = None,
    loss_scale: Tensor | None = None,
    weight_grad: Tensor | None = None,
    config: PolicyLossConfig = PolicyLossConfig(),
    impl: str = "auto",
    objective_gradients: bool = False,
) -> PolicyLossOutput:
    """Reweighted policy-gradient and supervised losses of one packed batch.

    loss = 1/K * sum_k lambda_k L_k + kl_coef * KL - entropy_coef * H (RECAP, arXiv 2510.21978,
    over GRPO, arXiv 2402.03300), from hidden states, without ever holding [N, V] logits. The
    gradient is made in the forward pass: 3 GEMMs in all, 4 for off-policy ratios at sequence level.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64; already predicts `targets`. Its dtype
            is that of the GEMMs; weight and bias are cast to it, their gradients summed in float32
            and returned in their own dtype, or the weight's in its `grad_dtype`. Under
            torch.autocast it is cast first, as torch.nn.functional.linear casts it. Rows may be
            strided; no copy is made of them. float16 needs `loss_scale`, or small gradients vanish.
        weight: [V, H]; may be frozen, and may be the embedding too (a tied head). With
            `weight.grad_dtype = torch.float32` (torch's own attribute of a leaf) the float32 sum
            reaches a bfloat16 weight's gradient unrounded. Not under torch.compile.
        targets: [N] int64; -100 is ignored and gets no gradient.
        sequence_ids: [N] int32 or int64 in [0, S); any value at ignored targets.
        rewards: [S, K] float32; NaN where an objective is absent. Needs `group_ids`; becomes
            advantages as by `group_advantages`. Exactly one of rewards and advantages is given.
        advantages: [S, K] float32; NaN where an objective is absent. 0 still counts.
        group_ids: [S] integers; rollouts of one prompt share one.
        objective_weights: [K] lambda, read on the device; None: all 1. Gets no gradient.
        token_objectives: [N] integers; -1: policy-gradient token; k >= 0: supervised token of
            objective k. None: all -1. Any other number at a target that counts is refused on a
            CPU; on a GPU, where looking would wait for it, the loss becomes NaN.
        old_logprobs: [N] float32 of the policy that the ratio compares with. None: on-policy, the
            ratio is exactly 1, the gradient as if old = logprobs.detach().
        ref_logprobs: [N] float32 of the reference policy of the KL term.
        rollout_logprobs: [N] float32 as the rollout engine sampled them, by whichever version of
            the policy. With `rollout_is_cap` what a policy token adds to each L_k, KL apart, is
            multiplied by w_t = exp(old - rollout), truncated or masked, where `old` is
            `old_logprobs` or, without those, the log-probs found here, with no gradient through it.
        importance_weights: [N] float32 w_t, which multiplies what a policy token adds to each L_k,
            KL apart; gets no gradient. 0 leaves the token out, but it still counts in d_k. What
            TRL calls importance_sampling_ratio and Liger vllm_is_ratio. Not beside
            `rollout_is_cap`, whose weight is made of the log-probs.
        bias: [V].
        denominators: [K] global d_k; None: counted here. Below 1 they are taken as 1.
        kl_denominator: [] or a number: that of KL and entropy; None: counted here.
        loss_scale: [] float32, the factor by which a loss scaler multiplies the loss before its
            backward: `scaler.scale(torch.ones((), device=...))` of a `torch.amp.GradScaler`. The
            forward pass makes gradients of loss * loss_scale before it rounds them to float16, and
            backward multiplies them by its own factor over `loss_scale`: exactly 1 after
            `scaler.scale(output.loss)`, and right for any other. `output.loss` is not scaled.
            Gradients that overflow are inf or NaN, whereupon a scaler skips its step. None: 1.
            impl="reference" has no need of it. Not beside `weight_grad`.
        weight_grad: [V, H] float32, contiguous, such as Megatron's main_grad: the weight's gradient
            is added to it in the forward pass, and none reaches `weight` through autograd. The
            loss must then be backpropagated as it is: a factor put on it later would miss this
            gradient (put it into `objective_weights`), and a forward pass that is run twice, as
            under activation checkpointing, adds it twice. DDP and FSDP reduce what autograd brings:
            between processes the buffers are to be summed by the caller.
        config: the loss's constants. `logits_dtype` "float32" asks the GEMM for float32 logits of
            bfloat16 operands, which torch offers on CUDA; its CPU GEMM leaves bfloat16.
        impl: "triton" (chunked, one kernel between the GEMMs), "torch" (chunked), "reference"
            (eager, holds [N, V]), or "auto": Triton on CUDA unless hidden is float64, else torch.
            An explicit name is run or refused, never replaced.
        objective_gradients: whether to sum up each objective's gradient at the hidden states, for
            one more product of [K, N] and [N, H]. hidden must need a gradient. Not beside an
            entropy bonus, whose gradient has another direction than that of a token's log-prob.

    Returns:
        PolicyLossOutput; everything but `loss` is detached.

    Raises:
        ValueError: a wrong shape, dtype or device, arguments that contradict each other, an
            objective that there is not (on a CPU), or impl="triton" where it cannot run.
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
        importance_weights=importance_weights,
        bias=bias,
        denominators=denominators,
        kl_denominator=kl_denominator,
        loss_scale=loss_scale,
        weight_grad=weight_grad,
    )
    arguments.check(config)
    learns = torch.is_grad_enabled()
    if objective_gradients:
        _check_objective_gradients(config, learns and hidden.requires_grad)
    hidden = follow_autocast(hidden)
    arguments = replace(arguments, hidden=hidden)
    chosen = resolve_impl(impl, hidden.device, hidden.dtype)
    if chosen == "reference":
        if weight_grad is not None:
            raise ValueError('weight_grad: wanted None with impl="reference", got a tensor')
        arguments.check_values()
        with torch.autocast(hidden.device.type, enabled=False):  # its sums are matrix products
            return reference.policy_loss(arguments, config, objective_gradients)
    if kl_denominator is not None and not isinstance(kl_denominator, Tensor):
        full = statistics_dtype(hidden.dtype)
        on_device = torch.full((), kl_denominator, dtype=full, device=hidden.device)
        arguments = replace(arguments, kl_denominator=on_device)
    # Gradients that autograd may ask for: none under no_grad, none of a frozen head.
    learns_weight = learns and (weight.requires_grad or weight_grad is not None)
    loss, losses, logprobs, entropy, kl, clip_fraction, table, *others = _policy_loss(
        *(_detached(getattr(arguments, field.name)) for field in fields(arguments)),
        want_hidden=learns and hidden.requires_grad,
        want_weight=learns_weight,
        want_bias=learns and bias is not None and bias.requires_grad,
        want_objectives=objective_gradients,
        weight_grad_dtype=_gradient_dtype(weight),
        impl=chosen,
        **{field.name: getattr(config, field.name) for field in fields(config)},
    )
    rollout_weight, is_bounded, by_objective, squares, *gradients = others
    if learns and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        loss = attach_gradients(loss, hidden, weight, bias, *gradients, arguments.loss_scale)
    return PolicyLossOutput(
        loss=loss,
        objective_losses=losses,
        logprobs=logprobs,
        entropy=entropy,
        kl=None if ref_logprobs is None else kl,
        clip_fraction=clip_fraction,
        advantages=table,
        importance_weights=None if config.rollout_is_cap is None else rollout_weight,
        importance_bounded=None if config.rollout_is_cap is None else is_bounded,
        objective_gradients=by_objective if objective_gradients else None,
        objective_squares=squares if objective_gradients else None,
    )


def _check_objective_gradients(config: PolicyLossConfig, learns: bool) -> None:
    if config.entropy_coef != 0:
        raise ValueError(
            f"objective_gradients: wanted entropy_coef=0 beside it, got {config.entropy_coef}"
        )
    if not learns:
        raise ValueError("objective_gradients: wanted hidden to need a gradient, it needs none")


def _gradient_dtype(weight: Tensor) -> torch.dtype:
    """What autograd would cast the weight's gradient to."""
    if torch.compiler.is_compiling() or not weight.is_leaf:
        return weight.dtype
    return weight.grad_dtype or weight.dtype  # None: it takes any


def _detached(value: Any) -> Any:
    """The loss learns through hidden, weight and bias, and what it attaches to them itself."""
    return None if value is None else value.detach()


# A custom operator, so that torch.compile meets one opaque call without a graph break. Operators
# take no dataclasses: the fields of `LossArguments` travel in their order, those of
# `PolicyLossConfig` by name.
_SCHEMA = """(
    Tensor hidden, Tensor weight, Tensor targets, Tensor sequence_ids, Tensor? rewards,
    Tensor? advantages, Tensor? group_ids, Tensor? objective_weights, Tensor? token_objectives,
    Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? rollout_logprobs,
    Tensor? importance_weights, Tensor? bias, Tensor? denominators, Tensor? kl_denominator,
    Tensor? loss_scale, Tensor(a!)? weight_grad, *,
    bool want_hidden, bool want_weight, bool want_bias, bool want_objectives,
    ScalarType weight_grad_dtype, str impl,
    float clip_low, float clip_high, float? clip_delta, str loss_type, str ratio_level,
    str aggregation, int? max_completion_length, float kl_coef, str kl_estimator,
    float entropy_coef, float temperature, float? logit_softcap, float? rollout_is_cap,
    str rollout_is_mode, float? rollout_is_min, str logits_dtype
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor)"""


@torch.library.custom_op(
    "recap_fast::linear_policy_loss", mutates_args={"weight_grad"}, schema=_SCHEMA
)
def _policy_loss(
    *tensors: Any,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    want_objectives: bool,
    weight_grad_dtype: torch.dtype,
    impl: str,
    **config: Any,
) -> tuple[Tensor, ...]:
    """What `PolicyLossOutput` has in its order, then d_hidden, d_weight and d_bias.

    What does not exist is an empty tensor: operators return no None.
    """
    a = LossArguments(*tensors)
    wanted = Wanted(hidden=want_hidden, weight=want_weight, bias=want_bias)
    loss_config = PolicyLossConfig(**config)
    output, swept = _forward(a, wanted, loss_config, weight_grad_dtype, impl)
    by_objective = squares = None
    if want_objectives:
        by_objective, squares = _objective_gradients(a, output, swept, loss_config)
    if a.weight_grad is not None:
        swept = replace(swept, d_weight=None)  # an input cannot be an output
    return (
        output.loss,
        output.objective_losses,
        output.logprobs,
        output.entropy,
        empty_if_none(output.kl, output.loss),
        output.clip_fraction,
        output.advantages,
        empty_if_none(output.importance_weights, output.loss),
        empty_if_none(output.importance_bounded, output.loss),
        empty_if_none(by_objective, output.loss),
        empty_if_none(squares, output.loss),
        *swept.gradients(a.hidden, a.weight, a.bias, weight_grad_dtype),
    )


@_policy_loss.register_fake
def _(
    *tensors: Any,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    want_objectives: bool,
    weight_grad_dtype: torch.dtype,
    rollout_is_cap: float | None,
    **settings: Any,
) -> tuple[Tensor, ...]:
    a = LossArguments(*tensors)
    table = a.rewards if a.rewards is not None else a.advantages
    assert table is not None
    full = statistics_dtype(a.hidden.dtype)

    def new(*shape: Any) -> Tensor:
        return a.hidden.new_empty(shape, dtype=full)

    n, k = a.hidden.shape[0], table.shape[1]
    wanted = Wanted(want_hidden, want_weight and a.weight_grad is None, want_bias)
    return (
        new(),
        new(k),
        new(n),
        new(n),
        new(n) if a.ref_logprobs is not None else new(0),
        new(k),
        new(*table.shape),
        new(0 if rollout_is_cap is None else n),
        new(0) if rollout_is_cap is None else a.hidden.new_empty(n, dtype=torch.bool),
        new(k, a.hidden.shape[1]) if want_objectives else new(0),
        new(k, 2) if want_objectives else new(0),
        *wanted.fake_gradients(a.hidden, a.weight, a.bias, weight_grad_dtype),
    )


def _forward(
    arguments: LossArguments,
    wanted: Wanted,
    config: PolicyLossConfig,
    weight_grad_dtype: torch.dtype,
    impl: str,
) -> tuple[PolicyLossOutput, Swept]:
    """Everything that is returned, and the wanted gradients of the loss."""
    arguments.check_values()
    arguments = replace(arguments, objective_weights=_weights_or_nan(arguments))
    head = make_head(
        arguments.hidden,
        arguments.weight,
        arguments.bias,
        arguments.targets,
        config.temperature,
        config.logit_softcap,
        config.logits_dtype,
        weight_grad_dtype,
    )
    # Ratios of whole sequences need all log-probs before any gradient.
    if impl == "triton" and config.ratio_level == "token":
        return _forward_in_kernel(arguments, head, wanted, config)
    return _forward_in_torch(arguments, head, wanted, config, impl)


def _weights_or_nan(arguments: LossArguments) -> Tensor | None:
    """lambda [K]; NaN, and with it the loss, where a token's objective does not exist."""
    exist = arguments.objectives_exist()
    weights = arguments.objective_weights
    if exist is None:
        return weights
    if weights is None:
        weights = exist.new_ones(arguments.num_objectives, dtype=torch.float32)
    if not weights.is_floating_point():
        weights = weights.float()
    return weights.where(exist, torch.nan)


MAX_REWARDS_IN_KERNEL = 1 << 14
"""S * K. Every row of the kernel scans the rewards of all sequences for its group: 64 KiB at most,
a fifth of a row of logits. Beyond that it reads advantages that were computed once."""


def _forward_in_kernel(
    arguments: LossArguments, head: Head, wanted: Wanted, config: PolicyLossConfig
) -> tuple[PolicyLossOutput, Swept]:
    """One kernel a chunk does everything between the GEMMs."""
    from recap_fast.ops.triton_rows import PolicyRows

    advantages, present = _advantage_table(arguments, "triton")
    table, group_ids = advantages.masked_fill(~present, torch.nan), None
    if arguments.rewards is not None and table.numel() <= MAX_REWARDS_IN_KERNEL:
        table, group_ids = arguments.rewards.float(), arguments.group_ids
    scales = count(arguments, present, config, torch.float32)
    stage = PolicyRows(arguments, table, group_ids, scales, config)
    swept = sweep(head, wanted, stage, arguments.weight_grad)
    losses, clip_fraction = stage.losses()
    weights = arguments.objective_weights
    loss = (losses if weights is None else losses * weights.float()).sum() / losses.shape[0]
    output = PolicyLossOutput(
        loss=loss if stage.penalty is None else loss + stage.penalty.sum(),
        objective_losses=losses,
        logprobs=swept.logprobs,
        entropy=swept.entropy,
        kl=stage.kl,
        clip_fraction=clip_fraction,
        advantages=advantages,
        importance_weights=stage.rollout_weight,
        importance_bounded=stage.is_bounded,
    )
    return output, swept


def _forward_in_torch(
    arguments: LossArguments, head: Head, wanted: Wanted, config: PolicyLossConfig, impl: str
) -> tuple[PolicyLossOutput, Swept]:
    advantages, present = _advantage_table(arguments, impl)
    tokens = tabulate(arguments, advantages, present, config)
    stage: type[HeadStage] = TorchRows
    if impl == "triton":
        from recap_fast.ops.triton_rows import LogprobsRows

        stage = LogprobsRows
    row_gradient = None
    if wanted.any():
        row_gradient = _row_gradient(head, tokens, config, stage, arguments.loss_scale)
    swept = sweep(head, wanted, stage(head, row_gradient), arguments.weight_grad)
    losses, clip_fraction = objective.objective_losses(tokens, swept.logprobs, config)
    kl = None
    if tokens.ref is not None:
        kl, _ = objective.kl_estimate(tokens, swept.logprobs, config)
    weight, is_bounded = objective.rollout_weight(tokens, swept.logprobs, config)
    output = PolicyLossOutput(
        loss=objective.total_loss(tokens, losses, swept.entropy, kl, config),
        objective_losses=losses,
        logprobs=swept.logprobs,
        entropy=swept.entropy,
        kl=kl,
        clip_fraction=clip_fraction,
        advantages=advantages,
        importance_weights=weight,
        importance_bounded=is_bounded,
    )
    return output, swept


def _objective_gradients(
    arguments: LossArguments, output: PolicyLossOutput, swept: Swept, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    given = arguments.advantages if arguments.rewards is None else arguments.rewards
    assert given is not None
    assert swept.d_hidden is not None
    tokens = tabulate(arguments, output.advantages, ~given.isnan(), config)
    return objective.objective_gradients(
        tokens, swept.logprobs, swept.d_hidden, config, arguments.loss_scale
    )


def _advantage_table(arguments: LossArguments, impl: str) -> tuple[Tensor, Tensor]:
    """Advantages [S, K], 0 where absent, and presence [S, K] bool."""
    full = statistics_dtype(arguments.hidden.dtype)
    if arguments.rewards is not None:
        assert arguments.group_ids is not None
        rewards = arguments.rewards.detach()
        if impl == "triton":
            rewards = rewards.float()
        table = normalized_advantages(rewards, arguments.group_ids, impl=impl)
        return table.to(full), ~rewards.isnan()
    assert arguments.advantages is not None
    given = arguments.advantages.detach().to(full)
    present = ~given.isnan()
    return given.where(present, 0.0), present


def _row_gradient(
    head: Head,
    tokens: TokenTable,
    config: PolicyLossConfig,
    stage: type[HeadStage],
    loss_scale: Tensor | None,
) -> RowGradient:
    """How the loss, times `loss_scale` [], depends on each token's log-prob and entropy.

    Known at once when nothing is compared with the log-probs; from all log-probs (one more GEMM)
    for ratios of whole sequences; else row by row, as the log-probs come.
    """
    by_entropy = objective.entropy_gradient(tokens, config)
    if by_entropy is not None and loss_scale is not None:
        by_entropy = by_entropy * loss_scale
    by_logprob = None
    if objective.is_constant(tokens, config):
        by_logprob = objective.logprob_gradient(
            tokens, torch.zeros_like(tokens.regulariser_share), config
        )
    elif config.ratio_level == "sequence":
        logprobs = sweep(head, Wanted(), stage(head)).logprobs
        by_logprob = objective.logprob_gradient(tokens, logprobs, config)

    def row_gradient(
        rows: slice, logprobs: Tensor, entropy: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        known = by_logprob[rows] if by_logprob is not None else None
        if known is None:
            known = objective.logprob_gradient(tokens.rows(rows), logprobs, config)
        if loss_scale is not None:
            known = known * loss_scale
        return known, None if by_entropy is None else by_entropy[rows]

    return row_gradient
