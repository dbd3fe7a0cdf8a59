"""How much of the weights a step changes, as servers see them, and what finding that out costs.

    python -m benchmarks.weight_changes [--model smollm2-135m-instruct]

AdamW steps of the default betas on the model's own weights with random gradients: the size of a
step is that of the learning rate, whatever the gradients' size, and largest where they agree, as in
the first step. Prints, for each learning rate, the share of bfloat16 values that a step changed,
the bytes of a patch (an int32 position and a value for each) beside those of all weights, and the
seconds of comparing with the version before and of copying everything, on the host.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM

from recap_fast.model.model_path import resolve_model
from recap_fast.rollout.weight_patch import differing

STEPS = 3
RATES = (1e-6, 3e-6, 1e-5)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    path = resolve_model(parser.parse_args().model)
    for rate in RATES:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        print(json.dumps({"learning_rate": rate, **_measure(model, rate)}), flush=True)


def _measure(model: torch.nn.Module, rate: float) -> dict[str, object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    before = _flat(model)
    shares, compared, copied = [], [], []
    target = torch.empty_like(before)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter).uniform_(-1, 1)
        optimizer.step()
        optimizer.zero_grad()
        after = _flat(model)
        start = time.perf_counter()
        changed = differing(before, after)
        compared.append(time.perf_counter() - start)
        start = time.perf_counter()
        target.copy_(after)
        copied.append(time.perf_counter() - start)
        # None: so many that the whole is sent, which says nothing of how many.
        count = int((before != after).sum()) if changed is None else len(changed)
        shares.append(count / len(after))
        before = after
    last = shares[-1]
    return {
        "changed_share_by_step": [round(share, 5) for share in shares],
        "patch_of_all_bytes": round(min(3 * last, 1.0), 4),
        "compare_seconds": round(min(compared), 3),
        "copy_seconds": round(min(copied), 3),
        "megabytes": round(before.nbytes / 1e6),
    }


def _flat(model: torch.nn.Module) -> torch.Tensor:
    """All weights as servers get them, to be compared to the bit: int16[n]."""
    with torch.no_grad():
        parts = [p.to(torch.bfloat16).flatten() for p in model.parameters()]
    return torch.cat(parts).view(torch.int16)


if __name__ == "__main__":
    main()
