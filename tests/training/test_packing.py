from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.training_step import WORKLOADS, make_config, make_update
from recap_fast.model.vision import VisionAdapter, make_adapter
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.training.packing import MAX_OVERFILL, PackedUpdate, pack_update
from recap_fast.types import Prompt, Rollout, SupervisedRow
from tests.tiny import VOCAB, image_tokens, packed_vision_model, tiny_image, tiny_policy


def make_rows(seed: int, groups: int, size: int, supervised: int, longest: int = 17):
    rng = np.random.default_rng(seed)

    def tokens(low: int = 1) -> list[int]:
        return rng.integers(0, VOCAB, rng.integers(low, longest)).tolist()

    rollouts = []
    for group in range(groups):
        prompt = Prompt("source", group, tokens(), "", None, {})
        for _ in range(size):
            ids = tokens()
            logprobs = rng.normal(size=len(ids)).astype(np.float32).tolist()
            rollouts.append(Rollout(prompt, group, ids, logprobs, "stop", ""))
    rows = []
    for row in range(supervised):
        ids = tokens(low=2)
        rows.append(SupervisedRow("replay", row, ids, int(rng.integers(1, len(ids)))))
    advantages = rng.normal(size=(len(rollouts), 2)).astype(np.float32)
    table = np.full((len(rollouts), 3), np.nan, np.float32)
    table[:, :2] = advantages
    return rollouts, table, rows


def one_at_a_time(policy, rollouts, rows):
    """Hidden states [N, H] and targets, each sequence run alone through plain sdpa attention."""
    policy.model.set_attn_implementation("sdpa")
    hidden, targets = [], []
    sequences = [(r.prompt.token_ids, r.token_ids) for r in rollouts]
    sequences += [
        (r.token_ids[: r.num_prompt_tokens], r.token_ids[r.num_prompt_tokens :]) for r in rows
    ]
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion])
        states = policy.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        hidden.append(states[len(prompt) - 1 : -1])
        targets += completion
    policy.model.set_attn_implementation("recap_packed")
    return torch.cat(hidden), torch.tensor(targets)


def run_packed(policy, update):
    hidden = torch.cat([policy.hidden(batch) for batch in update.batches])
    targets = torch.cat([batch.targets for batch in update.batches])
    return hidden, targets


@pytest.mark.parametrize("share_prefixes", [True, False])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(0, 3),
    size=st.integers(1, 4),
    supervised=st.integers(0, 3),
    max_tokens=st.sampled_from([40, 90, 1000]),
)
def test_packed_equals_one_at_a_time(share_prefixes, seed, groups, size, supervised, max_tokens):
    rollouts, advantages, rows = make_rows(seed, groups, size, supervised)
    if not rollouts and not rows:
        return
    policy = tiny_policy(seed=seed % 3)
    update = pack_update(
        rollouts, advantages, rows, [2] * len(rows),
        config=PolicyLossConfig(), max_tokens=max_tokens, share_prefixes=share_prefixes,
    )  # fmt: skip
    expected, expected_targets = one_at_a_time(policy, rollouts, rows)
    packed, targets = run_packed(policy, update)
    assert torch.equal(targets, expected_targets)
    torch.testing.assert_close(packed, expected, atol=2e-5, rtol=1e-5)
    assert all(len(batch.input_ids) <= max_tokens * MAX_OVERFILL for batch in update.batches)


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_packed_gradients_equal_one_at_a_time(share_prefixes):
    rollouts, advantages, rows = make_rows(7, 2, 3, 2)
    policy = tiny_policy()
    update = pack_update(
        rollouts, advantages, rows, [2, 2],
        config=PolicyLossConfig(), max_tokens=1000, share_prefixes=share_prefixes,
    )  # fmt: skip
    gradients = []
    for run in (
        lambda: one_at_a_time(policy, rollouts, rows)[0],
        lambda: run_packed(policy, update)[0],
    ):
        policy.model.zero_grad()
        hidden = run()
        weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
        (hidden * weights).sum().backward()
        gradients.append([p.grad.clone() for p in policy.model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for expected, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-4)


def passes_of(update: PackedUpdate) -> list[int]:
    return [len(batch.input_ids) for batch in update.batches]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(0, 3),
    size=st.integers(1, 3),
    supervised=st.integers(0, 2),
    longest=st.integers(3, 40),
    room=st.floats(1, 4),
    share_prefixes=st.booleans(),
)
def test_passes_are_few_and_of_equal_size(
    seed, groups, size, supervised, longest, room, share_prefixes
):
    rollouts, advantages, rows = make_rows(seed, groups, size, supervised, longest)
    if not rollouts and not rows:
        return

    def pack(start: int, stop: int, max_tokens: int) -> PackedUpdate:
        """Of the sequences from `start` to `stop`, rollouts before supervised rows."""
        mine = rows[max(0, start - len(rollouts)) : max(0, stop - len(rollouts))]
        return pack_update(
            rollouts[start:stop], advantages[start:stop], mine, [2] * len(mine),
            config=PolicyLossConfig(), max_tokens=max_tokens, share_prefixes=share_prefixes,
        )  # fmt: skip

    count = len(rollouts) + len(rows)
    largest = max(passes_of(pack(i, i + 1, 1000))[0] for i in range(count))
    max_tokens = int(room * largest)
    sizes = passes_of(pack(0, count, max_tokens))
    assert max(sizes) <= max_tokens * MAX_OVERFILL
    assert max(sizes) - min(sizes) <= 2 * largest
    # The fewest runs of consecutive sequences, by trying them all.
    fewest = [0] * (count + 1)
    for start in reversed(range(count)):
        stops = range(start + 1, count + 1)
        fits = [b for b in stops if passes_of(pack(start, b, 1000))[0] <= max_tokens * MAX_OVERFILL]
        fewest[start] = 1 + min(fewest[stop] for stop in fits)
    assert len(sizes) == fewest[0]


def test_no_pass_is_left_with_a_tail():
    """8 prompts of 64 tokens, 8 rollouts of 512 each, 16384 tokens a pass: filling one pass after
    the other makes 16097, 16161 and 1086."""
    workload, device = WORKLOADS["gpu"], torch.device("cpu")
    update = make_update(workload, make_config(workload, device), device)
    assert passes_of(update) == [16608, 16608]


def test_a_pass_is_larger_than_asked_only_where_that_saves_one():
    def sizes(lengths: list[int]) -> list[int]:
        rows = [SupervisedRow("s", i, [1] * (n + 1), 1) for i, n in enumerate(lengths)]
        update = pack_update(
            [], np.empty((0, 1), np.float32), rows, [0] * len(rows),
            config=PolicyLossConfig(), max_tokens=100,
        )  # fmt: skip
        return passes_of(update)

    assert sizes([52, 53]) == [105]
    assert sizes([53, 53]) == [53, 53]
    assert sizes([52, 53, 60]) == [105, 60]
    assert sizes([40, 40, 20, 40, 40]) == [80, 100]


def test_groups_with_long_prompts_stay_together():
    rollouts = []
    for group in range(4):
        prompt = Prompt("source", group, [1] * 50, "", None, {})
        rollouts += [Rollout(prompt, group, [1] * 11, [0.0] * 11, "stop", "")] * 3
    advantages = np.ones((12, 1), np.float32)
    update = pack_update(rollouts, advantages, [], [], config=PolicyLossConfig(), max_tokens=250)
    assert passes_of(update) == [160, 160]  # 2 groups each: 2 * (50 + 3 * 10)


def test_no_leak_between_sequences():
    """Changing one rollout's tokens leaves every other sequence's states bit for bit alone."""
    rollouts, advantages, rows = make_rows(3, 2, 2, 1)
    policy = tiny_policy()

    def states(changed):
        update = pack_update(
            changed, advantages, rows, [2], config=PolicyLossConfig(), max_tokens=1000
        )
        return policy.hidden(update.batches[0]), update.batches[0].sequence_ids

    before, ids = states(rollouts)
    victim = rollouts[1]
    other = [(token + 1) % VOCAB for token in victim.token_ids]
    changed = [*rollouts]
    changed[1] = Rollout(victim.prompt, victim.group, other, victim.logprobs, "stop", "")
    after, _ = states(changed)
    assert torch.equal(before[ids != 1], after[ids != 1])
    assert len(other) < 2 or not torch.equal(before[ids == 1], after[ids == 1])


def test_shared_prefix_is_packed_once():
    rollouts, advantages, _ = make_rows(1, 1, 4, 0)
    config = PolicyLossConfig()
    shared = pack_update(rollouts, advantages, [], [], config=config, max_tokens=1000)
    apart = pack_update(
        rollouts, advantages, [], [], config=config, max_tokens=1000, share_prefixes=False
    )
    prompt = len(rollouts[0].prompt.token_ids)
    assert apart.num_packed_tokens - shared.num_packed_tokens == 3 * prompt


def test_rollouts_without_signal_are_left_out_but_counted():
    rollouts, advantages, rows = make_rows(5, 2, 2, 1)
    advantages[0, :2] = 0.0
    advantages[1, :2] = np.nan
    lengths = [len(r.token_ids) for r in rollouts]
    update = pack_update(
        rollouts, advantages, rows, [2], config=PolicyLossConfig(), max_tokens=1000
    )
    assert set(update.batches[0].sequence_ids.tolist()) == {2, 3, 4}
    replayed = len(rows[0].token_ids) - rows[0].num_prompt_tokens
    counted = float(sum(lengths) - lengths[1])
    assert update.denominators.tolist() == [counted, counted, replayed]
    assert update.kl_denominator.item() == sum(lengths)
    assert update.num_policy_tokens == lengths[2] + lengths[3]

    with_kl = pack_update(
        rollouts, advantages, rows, [2], config=PolicyLossConfig(kl_coef=0.1), max_tokens=1000
    )
    assert set(with_kl.batches[0].sequence_ids.tolist()) == {0, 1, 2, 3, 4}


def test_sequence_denominators():
    rollouts, advantages, rows = make_rows(5, 2, 3, 2)
    advantages[0, 1] = np.nan
    config = PolicyLossConfig(aggregation="sequence")
    update = pack_update(rollouts, advantages, rows, [2, 2], config=config, max_tokens=1000)
    assert update.denominators.tolist() == [6, 5, 2]
    assert update.kl_denominator.item() == 6


def test_nothing_to_train_gives_no_batches_and_denominators_of_one():
    rollouts, advantages, _ = make_rows(5, 1, 2, 0)
    update = pack_update(
        rollouts, np.full_like(advantages, np.nan), [], [],
        config=PolicyLossConfig(), max_tokens=1000,
    )  # fmt: skip
    assert update.batches == []
    assert update.denominators.tolist() == [1, 1, 1]


def test_sequence_longer_than_a_batch_is_an_error():
    rollouts, advantages, rows = make_rows(5, 2, 2, 1)
    with pytest.raises(ValueError, match="training.max_tokens is 4"):
        pack_update(rollouts, advantages, rows, [2], config=PolicyLossConfig(), max_tokens=4)


def test_gradient_checkpointing_gives_the_same_gradients():
    rollouts, advantages, rows = make_rows(7, 2, 3, 1)
    update = pack_update(
        rollouts, advantages, rows, [2], config=PolicyLossConfig(), max_tokens=1000
    )
    gradients = []
    for enabled in (False, True):
        policy = tiny_policy()
        if enabled:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.train()
        policy.hidden(update.batches[0]).square().sum().backward()
        gradients.append([p.grad for p in policy.model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_ranks_share_what_images_cost(trained: bool) -> None:
    """Rows of equal length, half of them mostly images: dealt by tokens alone, one rank would have
    all of the tower's work."""
    model = packed_vision_model("qwen2_5_vl")
    vision = make_adapter(model)
    vision.tower.requires_grad_(trained)
    # By hand: 4 patches a token, of blocks as large as they are; a frozen tower is run once, the
    # text model three times.
    blocks, merger, text = (
        sum(p.numel() for p in part.parameters())
        for part in (vision.tower.blocks, vision.tower, model.model.language_model.layers)
    )
    cost = (4 * blocks + merger - blocks) / text / (1 if trained else 3)
    assert vision.token_cost == pytest.approx(cost)
    random = np.random.default_rng(0)
    rows = []
    for row in range(12):
        images = (tiny_image(random, 6, 6),) if row < 6 else ()
        ids = [5, *(token for image in images for token in image_tokens(image))]
        rows.append(SupervisedRow("s", row, ids + [7] * (60 - len(ids)), 50, images))

    def costs(vision: VisionAdapter, size: int) -> list[float]:
        updates = [
            pack_update(
                [], np.empty((0, 1), np.float32), rows, [0] * len(rows), config=PolicyLossConfig(),
                max_tokens=1000, vision=vision, rank=rank, size=size,
            )
            for rank in range(size)
        ]  # fmt: skip
        batches = [batch for update in updates for batch in update.batches]
        assert len(batches) == size
        assert sum(len(batch.input_ids) for batch in batches) == 12 * 59
        return [
            len(batch.input_ids) + cost * (len(batch.images.token_index) if batch.images else 0)
            for batch in batches
        ]

    heaviest = 59 + 36 * cost
    for size in (2, 3):
        dealt = costs(vision, size)
        assert max(dealt) - min(dealt) <= heaviest
