"""Memory and time of a training step with all weights trained, and with LoRA on a frozen base.

The step is that of benchmarks/training_step.py, on random weights: SmolLM2-135M's shape on a CPU,
the text decoder of Qwen2.5-VL-3B on a GPU. "held" is what lies there between steps: weights,
gradients and optimizer state; the peak is what a step needs beyond them, and them.

    python -m benchmarks.bench_lora [--shapes cpu] [--rank 16] [--rounds 5]
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.measuring import (
    cuda_growth,
    in_fresh_process,
    median_seconds,
    pick_device,
    provenance,
    resident_growth,
)
from benchmarks.training_step import WORKLOADS, make_update, recap_optimizer
from recap_fast.config import LoraConfig

MIB = 2**20


def measure(shapes: str, rank: int | None, rounds: int) -> dict[str, float]:
    """One variant, in a process that has done nothing else; `rank` None trains all weights."""
    workload, device = WORKLOADS[shapes], pick_device()
    lora = None if rank is None else LoraConfig(rank=rank, alpha=2 * rank)
    optimizer, policy, config = recap_optimizer(workload, device, lora=lora)
    update = make_update(workload, config, device, policy.attention)
    weights = torch.ones(1, device=device)

    def step() -> object:
        return optimizer.step(update, weights, 1e-6)

    step()
    grown = cuda_growth(step, device) if device.type == "cuda" else resident_growth(step)
    parameters = list(policy.model.parameters())
    held = sum(p.nbytes for p in parameters)
    held += sum(p.grad.nbytes for p in parameters if p.grad is not None)
    held += sum(tensor.nbytes for _, tensor in optimizer.named_state())
    return {
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "held": held / MIB,
        "peak": (held + grown) / MIB,
        "seconds": median_seconds(step, device, rounds) if rounds else float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=list(WORKLOADS), default="cpu")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="0: memory only")
    options = parser.parse_args()
    command = f"python -m benchmarks.bench_lora --shapes {options.shapes} --rank {options.rank}"
    print(provenance(pick_device(), command))
    for name, rank in (("all weights", None), (f"LoRA, rank {options.rank}", options.rank)):
        found = in_fresh_process(measure, options.shapes, rank, options.rounds)
        print(
            f"{name:16} {found['trained'] / 1e6:9.2f} M trained, held {found['held']:8.0f} MiB, "
            f"peak {found['peak']:8.0f} MiB, {found['seconds']:.3f} s a step"
        )


if __name__ == "__main__":
    main()
