"""Two ranks with verl's FSDP2: a tiny model with our head, its gradients against one process's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers import monkey_patch
from verl.utils.fsdp_utils import apply_fsdp2

import recap_fast.integrations.verl  # noqa: F401  adds the backend
from recap_fast.integrations.verl_head import FusedLinearForPPO
from tests.processes import report

ROWS = torch.randint(301, (2, 2, 3, 9), generator=torch.Generator().manual_seed(1))


def make_model(tied: bool, backend: str = "recap_fast") -> Any:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=301, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    )  # fmt: skip
    monkey_patch.patch_forward_with_backends(model, True, backend)
    return model


def backward(model: Any, ids: torch.Tensor) -> None:
    output = model(input_ids=ids, return_dict=True, use_cache=False, temperature=0.8)
    (output.log_probs.mean() - 0.1 * output.entropy.mean()).backward()


def compare(tied: bool, mesh: Any) -> tuple[bool, float, float]:
    """Two backward passes without a step between: each rank its rows, one process all of them."""
    alone, sharded = make_model(tied), make_model(tied)
    apply_fsdp2(sharded, {"mesh": mesh}, {})
    for micro_batch in ROWS:
        for rows in micro_batch:
            backward(alone, rows)
        backward(sharded, micro_batch[dist.get_rank()])
    wanted = {name: parameter.grad / 2 for name, parameter in alone.named_parameters()}
    given = {name: parameter.grad.full_tensor() for name, parameter in sharded.named_parameters()}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    error = max(float((given[name] - wanted[name]).abs().max()) for name in wanted)
    return isinstance(sharded.lm_head, FSDPModule), error, float(given[head].abs().max())


def message(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    results = {name: compare(name == "tied", mesh) for name in ("untied", "tied")}
    shard = distribute_tensor(torch.randn(301, 32), mesh)
    theirs = make_model(tied=False, backend="torch")
    apply_fsdp2(theirs, {"mesh": mesh}, {})
    report(
        separate_units={name: separate for name, (separate, _, _) in results.items()},
        errors={name: error for name, (_, error, _) in results.items()},
        gradients={name: gradient for name, (_, _, gradient) in results.items()},
        refused=message(FusedLinearForPPO(), torch.randn(3, 32), shard, ROWS[0, 0, 0, :3]),
        theirs=message(backward, theirs, ROWS[0, 0]),
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
