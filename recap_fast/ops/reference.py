"""Eager oracle: the formulas written out, differentiated by autograd. Slow, holds [N, V].

Shares no code with the fast path, so that the two can be compared. Runs in the dtype of its
operands, statistics in float32; all in float64 for float64 operands.

Shapes: N tokens, H hidden, V vocabulary, S sequences, K objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recap_fast.ops.arguments import LossArguments
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.ops.output import PolicyLossOutput, TokenStatistics


def group_advantages(
    rewards: Tensor, group_ids: Tensor, normalize: str = "std", eps: float = 1e-4
) -> Tensor:
    """`ops.group_advantages`, one group and one objective at a time. [S, K]."""
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        for k in range(rewards.shape[1]):
            members = (group_ids == group) & ~torch.isnan(rewards[:, k])
            r = rewards[members, k]
            if len(r) < 2 or bool((r == r[0]).all()):
                continue
            if normalize == "std":
                a = (r - r.mean()) / (r.std(unbiased=True) + eps)
            elif normalize == "none":
                a = r - r.mean()
            else:
                a = r - (r.sum() - r) / (len(r) - 1)
            advantages[members, k] = a
    return advantages


def combined_advantages(
    rewards: Tensor, group_ids: Tensor, weights: Tensor, method: str, eps: float = 1e-4
) -> Tensor:
    """`ops.combined_advantages` as published, one rollout at a time. [S, K]."""
    alone = group_advantages(rewards, group_ids, "std", eps)
    advantages = torch.zeros_like(rewards)
    combined: dict[int, Tensor] = {}  # by rollout
    kept_of: dict[int, list[bool]] = {}  # by group
    scored = [s for s in range(len(rewards)) if not bool(rewards[s].isnan().all())]
    for s in scored:
        has = ~rewards[s].isnan()
        parts = (weights * alone[s])[has]
        if method == "dvao":
            members = rewards[group_ids == group_ids[s]][:, has]
            spread = [column[~column.isnan()] for column in members.T]
            sigma = torch.stack([r.std() if len(r) > 1 else r.sum() * 0 for r in spread])
            share = weights[has] * sigma
            advantages[s, has] = (share * alone[s, has]).sum() / share.sum() if parts.any() else 0.0
            continue
        signs = {int(a.sign()) for a in alone[s, has & (weights > 0)] if abs(a) > 1e-5}
        kept = method == "gdpo" or signs != {-1, 1}
        kept_of.setdefault(int(group_ids[s]), []).append(kept)
        if kept:
            combined[s] = parts.sum()
    for s in combined:
        kept_in_group = kept_of[int(group_ids[s])]
        combined[s] = combined[s] * sum(kept_in_group) / len(kept_in_group)
    if len(combined) > 1:
        whole = torch.stack([*combined.values()])
        for s, value in combined.items():
            whitened = (value - whole.mean()) / (whole.std() + eps)
            advantages[s, ~rewards[s].isnan()] = whitened
    return advantages


def selective_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and entropies [N] of logits [N, V]."""
    log_p = torch.log_softmax(_scaled(logits, temperature, softcap), dim=-1)
    ignored = targets == -100
    picked = log_p.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    surprise = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)
    return picked.masked_fill(ignored, 0), -surprise.sum(-1).masked_fill(ignored, 0)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    bfloat16_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and entropies [N] of the logits hidden @ weight.T + bias."""
    logits = _logits(hidden, weight, bias)
    if bfloat16_logits:
        logits = logits.bfloat16()
    return selective_logprobs(logits, targets, temperature, softcap)


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenStatistics:
    """`ops.linear_token_statistics`."""
    logits = _logits(hidden, weight, bias)
    logprobs, entropy = selective_logprobs(logits, targets, temperature, softcap)
    ignored = targets == -100
    z = _scaled(logits.detach(), temperature, softcap)
    return TokenStatistics(
        logprobs=logprobs,
        entropy=entropy,
        log_sum_sq_probs=z.softmax(-1).square().sum(-1).log().masked_fill(ignored, 0),
        mean_logits=z.mean(-1).masked_fill(ignored, 0),
        is_top1=(z.argmax(-1) == targets) & ~logprobs.isnan(),
    )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(hidden.dtype)
    return torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias)


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def policy_loss(
    arguments: LossArguments, config: PolicyLossConfig, objective_gradients: bool = False
) -> PolicyLossOutput:
    """`ops.fused_linear_policy_loss`."""
    a, c = arguments, config
    logp, entropy = linear_logprobs(
        a.hidden,
        a.weight,
        a.targets,
        bias=a.bias,
        temperature=c.temperature,
        softcap=c.logit_softcap,
        bfloat16_logits=c.logits_dtype == "bfloat16" and a.hidden.dtype != torch.float64,
    )
    dtype = logp.dtype
    if a.rewards is not None:
        assert a.group_ids is not None
        present = ~torch.isnan(a.rewards)
        table = group_advantages(a.rewards, a.group_ids).to(dtype)
    else:
        assert a.advantages is not None
        present = ~torch.isnan(a.advantages)
        table = a.advantages.detach().to(dtype).masked_fill(~present, 0)
    s, k = table.shape

    counted = a.targets != -100
    kind = torch.full_like(a.targets, -1) if a.token_objectives is None else a.token_objectives
    policy = counted & (kind == -1)
    sequence = a.sequence_ids.long().masked_fill(~counted, 0)
    member = (sequence == torch.arange(s, device=logp.device)[:, None]) & counted  # [S, N]
    scale = _token_scale(member, sequence, c).to(dtype)

    old = logp.detach() if a.old_logprobs is None else a.old_logprobs.to(dtype)
    ratio = _ratio(logp, old, policy, member, c)
    is_weight = torch.ones_like(logp)
    rollout_is_weight = bounded = None
    if c.rollout_is_cap is not None and a.rollout_logprobs is not None:
        gap = _clamp((old - a.rollout_logprobs.to(dtype)).masked_fill(~policy, 0))
        is_weight, bounded = _bounded(gap.exp().detach(), c.rollout_is_cap, c)
        rollout_is_weight, bounded = is_weight.masked_fill(~policy, 0), bounded & policy
    if a.importance_weights is not None:
        is_weight = a.importance_weights.detach().to(dtype).masked_fill(~policy, 0)

    losses, clip_fraction = [], []
    for j in range(k):
        on_policy = policy & present[sequence, j]
        supervised = counted & (kind == j)
        denominator = _denominator(on_policy | supervised, member, a.denominators, j, c)
        advantage = table[sequence, j]
        gain, clipped = _gain(ratio, advantage, logp, c)
        terms = torch.where(on_policy, is_weight * gain, torch.zeros_like(logp))
        terms = terms + torch.where(supervised, logp, torch.zeros_like(logp))
        losses.append(-(scale * terms).sum() / denominator)
        clip_fraction.append((clipped & on_policy).sum(dtype=dtype) / on_policy.sum().clamp(min=1))
    objective_losses = torch.stack(losses)
    by_objective = squares = None
    if objective_gradients:
        by_objective = torch.stack([_summed_gradient(value, a.hidden) for value in losses])
        whole = torch.stack([_summed_square(value, logp) for value in losses])
        squares = torch.stack([torch.zeros_like(whole), whole], dim=1)  # nothing is left out
    loss = (_lambda(a, k).to(dtype) * objective_losses).sum() / k

    given = None
    if a.kl_denominator is not None:
        given = torch.as_tensor(a.kl_denominator, dtype=dtype, device=logp.device).reshape(1)
    denominator = _denominator(policy, member, given, 0, c)
    kl = None
    if a.ref_logprobs is not None:
        kl = _kl(logp, a.ref_logprobs.to(dtype), policy, c)
        loss = loss + c.kl_coef * (scale * kl).sum() / denominator
    if c.entropy_coef != 0:
        bonus = (scale * entropy).masked_fill(~policy, 0).sum() / denominator
        loss = loss - c.entropy_coef * bonus
    return PolicyLossOutput(
        loss=loss,
        objective_losses=objective_losses.detach(),
        logprobs=logp.detach(),
        entropy=entropy.detach(),
        kl=None if kl is None else kl.detach(),
        clip_fraction=torch.stack(clip_fraction),
        advantages=table,
        importance_weights=rollout_is_weight,
        importance_bounded=bounded,
        objective_gradients=by_objective,
        objective_squares=squares,
    )


def _summed_gradient(loss: Tensor, hidden: Tensor) -> Tensor:
    """Sum over tokens of d loss / d hidden, [H]; loss [] may not depend on hidden."""
    if not loss.requires_grad:
        return loss.new_zeros(hidden.shape[1])
    (found,) = torch.autograd.grad(loss, hidden, retain_graph=True, materialize_grads=True)
    return found.sum(0).to(loss.dtype)


def _summed_square(loss: Tensor, logprobs: Tensor) -> Tensor:
    """Sum over tokens of (d loss / d logprob)^2, []."""
    if not loss.requires_grad:
        return loss.new_zeros(())
    (found,) = torch.autograd.grad(loss, logprobs, retain_graph=True, materialize_grads=True)
    return found.square().sum()


def _bounded(weight: Tensor, cap: float, c: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """w_t [N] of exp(old - rollout) [N], and where that is out of bounds [N] bool."""
    low = 0.0 if c.rollout_is_min is None else c.rollout_is_min
    outside = (weight < low) | (weight > cap)
    if c.rollout_is_mode == "mask":
        return weight.masked_fill(outside, 0), outside
    return weight.clamp(min=low, max=cap), outside


def _lambda(a: LossArguments, k: int) -> Tensor:
    """lambda [K]; NaN where a token is of an objective that there is not."""
    weights = a.objective_weights
    if weights is None:
        weights = a.targets.new_ones(k, dtype=torch.float32)
    if a.token_objectives is None:
        return weights.detach()
    kind = a.token_objectives[a.targets != -100]
    exists = ((kind >= -1) & (kind < k)).all()
    return torch.where(exists, weights.detach(), torch.nan)


def _clamp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-20.0, 20.0)


def _token_scale(member: Tensor, sequence: Tensor, c: PolicyLossConfig) -> Tensor:
    """a_t [N]; member [S, N] bool."""
    if c.aggregation == "sequence":
        return 1.0 / member.sum(1).clamp(min=1).double()[sequence]
    scale = 1.0
    if c.aggregation == "constant" and c.max_completion_length is not None:
        scale = 1.0 / c.max_completion_length
    return torch.full(sequence.shape, scale, dtype=torch.float64, device=sequence.device)


def _denominator(
    counts: Tensor, member: Tensor, given: Tensor | None, index: int, c: PolicyLossConfig
) -> Tensor:
    """d [] for the tokens of `counts` [N] bool."""
    if given is not None:
        return given[index].clamp(min=1)
    sequences = (member & counts).any(1)
    return (counts if c.aggregation == "token" else sequences).sum().clamp(min=1)


def _ratio(
    logp: Tensor, old: Tensor, policy: Tensor, member: Tensor, c: PolicyLossConfig
) -> Tensor:
    """r_t [N]; 1 off policy tokens."""
    log_ratio = torch.where(policy, logp - old, torch.zeros_like(logp))
    if c.ratio_level == "sequence":
        inside = (member & policy).to(logp.dtype)  # [S, N]
        means = (inside @ log_ratio) / inside.sum(1).clamp(min=1)
        log_ratio = inside.T @ means
    return _clamp(log_ratio).exp()


def _gain(
    ratio: Tensor, advantage: Tensor, logp: Tensor, c: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """The surrogate [N], and whether the clip decides it [N] bool."""
    if c.loss_type == "cispo":
        bounded = ratio.clamp(max=1 + c.clip_high).detach()
        finite = logp.masked_fill(advantage == 0, 0)
        return bounded * advantage * finite, ratio > 1 + c.clip_high
    free = ratio if c.clip_delta is None else ratio.clamp(max=c.clip_delta)
    clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
    decides = clipped * advantage < free * advantage
    return torch.minimum(free * advantage, clipped * advantage), decides


def _kl(logp: Tensor, ref: Tensor, policy: Tensor, c: PolicyLossConfig) -> Tensor:
    """KL estimate [N]; 0 off policy tokens. k1 has the value -d and the gradient of k2."""
    d = torch.where(policy, ref - logp, torch.zeros_like(logp))
    k2 = d * d / 2
    if c.kl_estimator == "k1":
        return -d.detach() + (k2 - k2.detach())
    if c.kl_estimator == "k2":
        return k2
    d = _clamp(d)
    return d.exp() - d - 1


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter and moments after AdamW's step number `step`, from 1; nothing is rounded."""
    m = betas[0] * exp_avg + (1 - betas[0]) * gradient
    v = betas[1] * exp_avg_sq + (1 - betas[1]) * gradient**2
    corrected_m, corrected_v = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    decayed = parameter * (1 - lr * weight_decay)
    return decayed - lr * corrected_m / (corrected_v**0.5 + eps), m, v
