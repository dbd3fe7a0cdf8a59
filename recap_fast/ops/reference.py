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
from recap_fast.ops.output import PolicyLossOutput


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


def selective_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and entropies [N] of logits [N, V]."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
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
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
    if bfloat16_logits:
        logits = logits.bfloat16()
    return selective_logprobs(logits, targets, temperature, softcap)


def policy_loss(arguments: LossArguments, config: PolicyLossConfig) -> PolicyLossOutput:
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
    if c.rollout_is_cap is not None and a.rollout_logprobs is not None:
        gap = _clamp((old - a.rollout_logprobs.to(dtype)).masked_fill(~policy, 0))
        is_weight = gap.exp().clamp(max=c.rollout_is_cap).detach()

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
    )


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
