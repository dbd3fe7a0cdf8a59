"""Our head and loss in the place of TRL's, Liger's and verl's: both measured in turns, in one run.

`TWO_HEADS` has what runs on one model, one set of weights and the same rollouts with either head:

- "trl_step": the training part of TRL's GRPOTrainer (loss, backward, clipping, AdamW);
- "trl_head": the call that the trainer makes, forward and backward, on a model without layers.

Liger's loss and verl's head take operands; both are `Implementation`s, of `benchmarks.peers`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.inputs import Shape
from benchmarks.measuring import (
    CLEAR_REFS,
    cuda_growth,
    free_memory,
    in_fresh_process,
    peak_mib,
    resident_growth,
    seconds_in_turns,
)
from benchmarks.training_step import WORKLOADS, ModelShape, Workload, build_model, trl_step

if TYPE_CHECKING:
    from benchmarks.peers import Implementation

THEIRS, OURS = "TRL's head", "recap-fast's head"
HEADS = (THEIRS, OURS)

OUTPUTS = ("log_probs", "entropy")
"""What GRPOTrainer asks its head for."""


@dataclass(frozen=True)
class Case:
    """One size of a comparison inside TRL."""

    workload: Workload
    autocast: bool  # bfloat16 over float32 weights; else float32 throughout

    def __str__(self) -> str:
        work = self.workload
        lengths = f"{work.prompt_tokens} + {work.completion_tokens}"
        dtype = "bf16 autocast" if self.autocast else "float32"
        return f"{work.name}, {work.rollouts} rollouts of {lengths} tokens, {dtype}"


def _cases(word: str, *lengths: tuple[int, int, int], **changes: Any) -> tuple[Case, ...]:
    """A case for each (group, prompt, completion) and dtype; on a GPU in bfloat16 alone."""
    base = replace(WORKLOADS[word], **changes)
    return tuple(
        Case(replace(base, group=group, prompt_tokens=prompt, completion_tokens=own), autocast)
        for group, prompt, own in lengths
        for autocast in ((True,) if word == "gpu" else (False, True))
    )


CASES = {
    "small": _cases("small", (4, 8, 16)),
    "cpu": _cases("cpu", (8, 32, 32), (4, 256, 64)),
    "gpu": _cases(
        "gpu", (8, 64, 256), (8, 1024, 256),
        name="Qwen2.5-1.5B", model=ModelShape(1536, 28, 12, 2, 8960, 151936), prompts=4,
    ),
}  # fmt: skip
"""By the word given to --shapes."""


@dataclass(frozen=True)
class Measured:
    """What was found for one implementation of a comparison."""

    seconds: list[float]
    peak_mib: float | None
    percent_of_floor: float | None = None
    errors: dict[str, float] = field(default_factory=dict)  # against float64
    more: dict[str, float] = field(default_factory=dict)  # column title -> number


class HeadSwitch:
    """Both heads on one model, which has TRL's already: its forward uses the one in `chosen`."""

    def __init__(self, model: Any, temperature: float = 1.0) -> None:
        from recap_fast.integrations.trl import use_recap_fast_head

        forwards = {THEIRS: model.forward}
        use_recap_fast_head(model, temperature=temperature, outputs=OUTPUTS)
        forwards[OURS] = model.forward
        self.chosen = THEIRS
        model.forward = lambda *args, **kwargs: forwards[self.chosen](*args, **kwargs)


@dataclass(frozen=True)
class TwoHeads:
    """A computation that either head can serve."""

    model: Any
    switch: HeadSwitch
    backward: Callable[[], tuple[Tensor, Tensor]]
    """Leaves gradients in the model. Returns the loss and the gradient's norm."""
    step: Callable[[], object]  # what is measured
    small: Callable[[], object]  # the same on less: libraries and the optimizer allocate for good

    def with_head(self, name: str, what: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            self.switch.chosen = name
            return what()

        return run


@contextmanager
def two_heads_in_step(case: Case, device: torch.device) -> Iterator[TwoHeads]:
    """GRPOTrainer's training part, all rollouts in one pass, which is its fastest on a CPU.

    The rollouts have log-probs of an earlier policy, so that the loss depends on the model's.
    """
    found: list[HeadSwitch] = []
    with tempfile.TemporaryDirectory() as folder:
        step = trl_step(
            case.workload,
            device,
            folder,
            case.workload.rollouts,
            autocast=case.autocast,
            patch=lambda model: found.append(HeadSwitch(model)),
        )
        (batch,) = step.batches
        # About what a model with random weights gives every token.
        usual = -math.log(case.workload.model.vocab)
        batch["old_per_token_logps"] = torch.full_like(
            batch["completion_ids"], usual, dtype=torch.float32
        )
        small = replace(step, batches=[{name: tensor[:2] for name, tensor in batch.items()}])
        yield TwoHeads(step.model, found[0], step.backward, step, small)


@contextmanager
def two_heads_in_call(case: Case, device: torch.device) -> Iterator[TwoHeads]:
    """`model(..., labels=labels, fused_lm_head=True)` and its backward, without any layer."""
    from trl.trainer.utils import add_fused_lm_head

    work = case.workload
    model = build_model(replace(work.model, layers=0), device, packed=False)
    add_fused_lm_head(model, outputs=OUTPUTS)
    switch = HeadSwitch(model)
    generator = torch.Generator(device).manual_seed(0)
    size = (work.rollouts, work.prompt_tokens + work.completion_tokens)
    ids = torch.randint(work.model.vocab, size, generator=generator, device=device)
    labels = ids.clone()
    labels[:, : work.prompt_tokens] = -100
    advantages = torch.randn(work.rollouts, 1, generator=generator, device=device)

    def backward(count: int = work.rollouts) -> tuple[Tensor, Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=case.autocast):
            scored = model(input_ids=ids[:count], labels=labels[:count], fused_lm_head=True)
        loss = -(scored.log_probs * advantages[:count]).mean()
        loss.backward()
        return loss.detach(), torch.nn.utils.get_total_norm(_gradients(model))

    def step(count: int = work.rollouts) -> None:
        backward(count)
        model.zero_grad(set_to_none=True)

    yield TwoHeads(model, switch, backward, step, lambda: step(2))


TWO_HEADS: dict[str, Callable[[Case, torch.device], AbstractContextManager[TwoHeads]]] = {
    "trl_step": two_heads_in_step,
    "trl_head": two_heads_in_call,
}


def _gradients(model: Any) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def differences(heads: TwoHeads) -> dict[str, float]:
    """By how much our head's loss and gradients differ from theirs, relative, at equal weights."""
    found = []
    for name in HEADS:
        heads.switch.chosen = name
        loss, norm = heads.backward()
        found.append((loss.double(), norm.double(), _gradients(heads.model)))
        heads.model.zero_grad(set_to_none=True)
    (loss, norm, gradients), (our_loss, our_norm, our_gradients) = found
    assert len(gradients) == len(our_gradients) > 0
    pairs = list(zip(gradients, our_gradients, strict=True))
    off = torch.nn.utils.get_total_norm([(a - b).float() for a, b in pairs])
    return {
        "loss diff": float((our_loss - loss).abs() / loss.abs()),
        "norm diff": float((our_norm - norm).abs() / norm),
        "gradient diff": float(off / torch.nn.utils.get_total_norm(gradients)),
    }


def tolerance(case: Case) -> float:
    """Relative difference up to which two roundings of the same step may lie apart.

    Float32: sums over tokens and vocabulary in another order. Autocast: hidden states and logits'
    gradients are rounded to bfloat16, by each head at other places.
    """
    return 2.0**-6 if case.autocast else 1e-4


def measure_heads(suite: str, case: Case, device: torch.device, rounds: int) -> dict[str, Measured]:
    """Checks both heads against each other, then measures them in turns.

    Raises:
        ValueError: they do not compute the same.
    """
    with TWO_HEADS[suite](case, device) as heads:
        found = differences(heads)
        if not max(found.values()) <= tolerance(case):
            raise ValueError(f"wrong: {case} differs from TRL's: {found}")
        peaks = {name: _heads_peak(suite, case, device, name, heads) for name in HEADS}
        steps = {name: heads.with_head(name, heads.step) for name in HEADS}
        seconds = seconds_in_turns(steps, device, rounds)
    del heads, steps
    free_memory(device)
    return {
        name: Measured(seconds[name], peaks[name], more=found if name == OURS else {})
        for name in HEADS
    }


def _heads_peak(
    suite: str, case: Case, device: torch.device, name: str, heads: TwoHeads
) -> float | None:
    """MiB beyond the weights and, in a step, AdamW's moments; gradients included."""
    if device.type == "cuda":
        heads.with_head(name, heads.small)()
        return cuda_growth(heads.with_head(name, heads.step), device) / 2**20
    return (
        in_fresh_process(resident_peak_of_head, suite, case, name) if CLEAR_REFS.exists() else None
    )


def resident_peak_of_head(suite: str, case: Case, name: str) -> float:
    """`_heads_peak` of a process of its own, on a CPU."""
    with TWO_HEADS[suite](case, torch.device("cpu")) as heads:
        heads.with_head(name, heads.small)()
        return resident_growth(heads.with_head(name, heads.step)) / 2**20


def measure_implementations(
    suite: str,
    implementations: Sequence[Implementation],
    shape: Shape,
    device: torch.device,
    rounds: int,
) -> dict[str, Measured]:
    """Checks implementations against float64, then measures them in turns on the same operands."""
    from benchmarks.conftest import LossLab

    lab = LossLab(shape, device)
    floor = lab.floor_seconds(implementations[0].floor)
    errors, steps = {}, {}
    for implementation in implementations:
        step = lab.build(implementation)
        errors[implementation.name] = lab.check(implementation, step)
        steps[implementation.name] = _from_no_gradients(lab, step)
    lab.inputs.clear()
    peaks = {name: peak_mib(name, suite, shape, device) for name in steps}
    seconds = seconds_in_turns(steps, device, rounds)
    return {
        name: Measured(
            seconds[name],
            peaks[name],
            percent_of_floor=100 * floor / sorted(seconds[name])[len(seconds[name]) // 2],
            errors=errors[name],
        )
        for name in steps
    }


def _from_no_gradients(lab: Any, step: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        lab.inputs.clear()
        return step()

    return run


def describe(measured: Measured) -> Mapping[str, Any]:
    """What pytest-benchmark's JSON keeps beside the times."""
    return {
        **measured.errors,
        "peak_mib": measured.peak_mib,
        "percent_of_floor": measured.percent_of_floor,
        "more": measured.more,
    }
