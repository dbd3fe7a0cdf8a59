"""The benchmark of a step with images counts what is done, and does what it says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training_step
from benchmarks.vision_step import WORKLOADS, build_model, make_rows, model_flops, vision_step
from recap_fast.model.policy import Policy
from recap_fast.model.vision import MODEL_TYPES

CPU = torch.device("cpu")
WORKLOAD = WORKLOADS["small"]


@pytest.mark.parametrize("train_vision", [False, True])
def test_flops_are_counted_as_they_are_done(train_vision):
    _, update = vision_step(WORKLOAD, CPU)
    policy = Policy(build_model(WORKLOAD, CPU), torch.bfloat16)
    policy.vision.tower.requires_grad_(train_vision)
    products = 0
    for batch in update.batches:
        with FlopCounterMode(display=False) as counter:
            policy.hidden(batch).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        products += sum(n for op, n in counts.items() if "mm" in str(op))
    # Attention by its definition: query, key and value products of every visible pair.
    rollouts, _, rows = make_rows(WORKLOAD)
    pairs, seen = 0, set()
    for rollout in rollouts:
        prompt, own = len(rollout.prompt.token_ids), len(rollout.token_ids) - 1
        start = prompt if rollout.group in seen else 0
        seen.add(rollout.group)
        pairs += sum(position + 1 for position in range(start, prompt + own))
    pairs += sum(n * (n + 1) // 2 for n in (len(row.token_ids) - 1 for row in rows))
    attention = 3 * 4 * WORKLOAD.text.layers * WORKLOAD.text.hidden * pairs
    tower = WORKLOAD.tower
    side, window = tower.side // 2, tower.window
    windows = Counter((y // window, x // window) for y in range(side) for x in range(side))
    visible = sum((4 * count) ** 2 for count in windows.values())
    visible += tower.side**4  # the other layer sees the whole image
    images = WORKLOAD.prompts + WORKLOAD.supervised
    attention += images * 4 * tower.hidden * visible * (3 if train_vision else 1)
    predicted = sum(len(batch.targets) for batch in update.batches)
    head = 6 * predicted * WORKLOAD.text.hidden * WORKLOAD.text.vocab
    counted = model_flops(WORKLOAD, update, train_vision=train_vision)
    assert counted == products + attention + head


def test_a_step_trains_all_three_objectives():
    step, update = vision_step(WORKLOAD, CPU)
    patches = [len(image) for batch in update.batches for image in batch.images.patches]
    assert patches == (WORKLOAD.prompts + WORKLOAD.supervised) * [WORKLOAD.tower.side**2]
    first, second = step(), step()
    assert first.objective_losses.isfinite().all()
    assert first.grad_norm > 0
    assert second.objective_losses[2] < first.objective_losses[2]


def test_shapes_have_the_same_words_as_the_text_steps():
    assert set(WORKLOADS) == set(training_step.WORKLOADS)
    assert WORKLOADS["gpu"].text == training_step.WORKLOADS["gpu"].model
    assert WORKLOADS["gpu"].rollouts == training_step.WORKLOADS["gpu"].rollouts == 64
    assert build_model(WORKLOAD, torch.device("meta")).config.model_type in MODEL_TYPES
