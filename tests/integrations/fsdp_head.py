"""A rank: the head's gradient under FSDP2, by TRL's head and by ours, beside one process."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from trl.trainer.utils import add_fused_lm_head

from recap_fast.integrations.trl import use_recap_fast_head
from tests.processes import report
from tests.tiny import VOCAB, tiny_llama

ROWS, LENGTH, PROMPT = 4, 12, 5


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCAB, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    labels[0, 8:] = -100  # unequal work: rank 0 has fewer tokens
    labels[1] = -100
    return ids, labels


def loss_of(model, ids, labels):
    """A sum, so that ranks add up; the ramp gives every token another gradient."""
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    ramp = torch.linspace(0.5, 1.5, output.log_probs.numel()).view_as(output.log_probs)
    return -(output.log_probs * ramp).sum() - 0.1 * output.entropy.sum()


def tiny_model(tied: bool):
    model = tiny_llama(tied=tied)
    model.set_attn_implementation("sdpa")  # the model as TRL's users load it
    return model


def gradients(patch, tied: bool, own_unit: bool) -> dict[str, torch.Tensor]:
    rank, share = dist.get_rank(), ROWS // dist.get_world_size()
    model = tiny_model(tied)
    patch(model, temperature=0.9, outputs=("log_probs", "entropy"))
    for layer in model.model.layers:
        fully_shard(layer)
    if own_unit:
        fully_shard(model.lm_head)
    fully_shard(model)
    ids, labels = batch()
    mine = slice(rank * share, (rank + 1) * share)
    loss_of(model, ids[mine], labels[mine]).backward()
    # FSDP averages over the ranks.
    return {
        name: parameter.grad.full_tensor() * dist.get_world_size()
        for name, parameter in model.named_parameters()
    }


def expected(tied: bool) -> dict[str, torch.Tensor]:
    model = tiny_model(tied)
    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    ids, labels = batch()
    share = ROWS // dist.get_world_size()
    for mine in (slice(start, start + share) for start in range(0, ROWS, share)):
        loss_of(model, ids[mine], labels[mine]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    assert set(found) == set(wanted)
    return {
        name: float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted
    }


def main() -> None:
    dist.init_process_group("gloo")
    errors = {}
    heads = {"theirs": add_fused_lm_head, "ours": use_recap_fast_head}
    for name, tied, own_unit in (
        ("theirs", False, True),
        ("ours", False, True),
        ("ours", False, False),
        ("ours", True, False),
    ):
        found = gradients(heads[name], tied, own_unit)
        errors[f"{name}, tied={tied}, own_unit={own_unit}"] = worst(found, expected(tied))
    report(errors=errors)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
