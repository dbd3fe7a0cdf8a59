"""The fused loss in a loop of your own over several processes, with DDP or FSDP2.

Three rules make every gradient that of one process over all rows, however unequal the shares:
- The loss is made in the forward of the module that is wrapped, and where the head is an FSDP unit
  of its own, in a forward method of the head. Elsewhere its weight is a shard; the `full_tensor()`
  of that gives the head a gradient of the own rank's rows only, silently.
- Denominators are counts over all processes.
- DDP and FSDP average gradients over processes, so the loss is multiplied by their number.

The objectives here are worked sums, differences and products, reweighted by RECAP from their mean
losses over all processes.

    torchrun --nproc-per-node 2 examples/fsdp2.py              # SmolLM2-135M; MODEL for any other
"""

import json
import sys
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import AutoModelForCausalLM, AutoTokenizer

from recap_fast import PolicyLossConfig, fused_linear_policy_loss, make_reweighter
from recap_fast.model.model_path import resolve_model
from recap_fast.model.policy import head_of

OBJECTIVES = ("plus", "minus", "times")


class WithLoss(nn.Module):
    """A causal LM whose forward ends in the loss: what DDP, FSDP2 and torch.compile wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = PolicyLossConfig(logit_softcap=head_of(model).softcap)
        head = model.get_output_embeddings()
        head.policy_loss = MethodType(head_loss, head)

    def forward(self, input_ids, targets, **arguments):
        """Both [rows, length]; targets are those that each place predicts."""
        hidden = self.model.get_decoder()(input_ids=input_ids).last_hidden_state
        head = self.model.get_output_embeddings()
        arguments = {"config": self.config} | arguments
        return head.policy_loss(hidden.flatten(0, 1), targets.flatten(), **arguments)


def head_loss(head, hidden, targets, **arguments):
    """`fused_linear_policy_loss` as a method of the head, where its weight is whole."""
    return fused_linear_policy_loss(hidden, head.weight, targets, bias=head.bias, **arguments)


def shard(policy):
    """FSDP2 with each layer a unit, and the head one where it is not tied to the embedding."""
    for layer in policy.model.get_decoder().layers:
        fully_shard(layer)
    head = policy.model.get_output_embeddings()
    if head.weight is not policy.model.get_input_embeddings().weight:
        fully_shard(head)
        register_fsdp_forward_method(head, "policy_loss")
    return fully_shard(policy)


def supervised(policy, input_ids, targets, objectives, weights):
    """The output of one step's rows, each of one objective; its loss is ready for backward."""
    rows, length = targets.shape
    counts = torch.zeros(len(OBJECTIVES), device=targets.device)
    counts.index_add_(0, objectives, (targets != -100).sum(1).float())
    dist.all_reduce(counts)
    output = policy(
        input_ids,
        targets,
        sequence_ids=torch.arange(rows, device=targets.device).repeat_interleave(length),
        token_objectives=objectives.repeat_interleave(length),
        advantages=torch.zeros(rows, len(OBJECTIVES), device=targets.device),  # no RL tokens
        objective_weights=weights,
        denominators=counts,
    )
    return output.loss * dist.get_world_size(), output.objective_losses, counts


def read_rows(tokenizer, lines):
    """input_ids and targets [rows, length] of question and answer, and objectives [rows]."""
    ids, labels, objectives = [], [], []
    for row in map(json.loads, lines):
        prompt = tokenizer(row["question"] + "\n", add_special_tokens=False).input_ids
        answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * (len(prompt) - 1) + [*answer, -100]))
        (objective,) = (k for k, word in enumerate(OBJECTIVES) if word in row["question"])
        objectives.append(objective)
    # Padding behind a causal model's tokens changes nothing of them.
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return padded, targets, torch.tensor(objectives)


def main(path="smollm2-135m-instruct", steps=8, rows=4, learning_rate=2e-5):
    dist.init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    path = resolve_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    policy = WithLoss(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device))
    policy = shard(policy)  # or nn.parallel.DistributedDataParallel(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, fused=True)
    reweighter = make_reweighter("recap", len(OBJECTIVES), window=2, device=device)
    lines = (Path(__file__).parent / "worked_sums.jsonl").read_text().splitlines()
    for step in range(steps):
        first = (step * world + rank) * rows
        batch = (x.to(device) for x in read_rows(tokenizer, lines[first : first + rows]))
        loss, losses, counts = supervised(policy, *batch, reweighter.weights.clone())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(losses)  # each rank has its part of every mean
        # An objective that the step had no rows of leaves the windows as they are.
        losses = losses.where(counts > 0, torch.nan)
        weights = reweighter.update(losses)
        if rank == 0:
            shown = zip(OBJECTIVES, losses.tolist(), weights.tolist(), strict=True)
            print(f"step {step + 1}", *(f"  {n} {v:.3f} (weight {w:.2f})" for n, v, w in shown))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
