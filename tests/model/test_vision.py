"""Rows with images, packed, against transformers' own forward pass over one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recap_fast.model.attention_choice import choose_attention, choose_vision_attention
from recap_fast.model.policy import Policy
from recap_fast.model.vision import MODEL_TYPES, VisionError
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.training.packing import MAX_OVERFILL, PackedUpdate, pack_update
from recap_fast.types import ImageInput, Prompt, Rollout, SupervisedRow
from tests.no_sync import ForbidHostSync
from tests.tiny import (
    VISION_TOKENS,
    VOCAB,
    image_tokens,
    packed_vision_model,
    tiny_image,
    tiny_llama,
    tiny_vision_model,
)

WORDS = VOCAB - len(VISION_TOKENS)
IMAGE = VISION_TOKENS["image_token_id"]


def words(random: np.random.Generator, low: int, high: int) -> list[int]:
    return random.integers(0, WORDS, random.integers(low, high)).tolist()


def draw_prompt(
    random: np.random.Generator, count: int
) -> tuple[list[int], tuple[ImageInput, ...]]:
    """Text and images in turn. Sizes are odd and even, and up to 2.5 windows a side."""
    ids, images = words(random, 1, 5), []
    for _ in range(count):
        image = tiny_image(random, *random.integers(1, 6, 2))
        images.append(image)
        ids += image_tokens(image) + words(random, 0, 4)
    return ids + words(random, 1, 3), tuple(images)


def draw_rows(
    seed: int, groups: int, size: int, supervised: int, images: tuple[int, int] = (0, 3)
) -> tuple[list[Rollout], np.ndarray, list[SupervisedRow]]:
    random = np.random.default_rng(seed)
    rollouts, rows = [], []
    for group in range(groups):
        ids, pictures = draw_prompt(random, int(random.integers(*images, endpoint=True)))
        prompt = Prompt("pictures", group, ids, "", None, {}, pictures)
        for _ in range(size):
            completion = words(random, 1, 9)
            logprobs = random.normal(size=len(completion)).tolist()
            rollouts.append(Rollout(prompt, group, completion, logprobs, "stop", ""))
    for row in range(supervised):
        ids, pictures = draw_prompt(random, int(random.integers(*images, endpoint=True)))
        target = words(random, 1, 9)
        rows.append(SupervisedRow("captions", row, ids + target, len(ids), pictures))
    advantages = np.full((len(rollouts), 3), np.nan, np.float32)
    advantages[:, :2] = random.normal(size=(len(rollouts), 2))
    return rollouts, advantages, rows


def pack(rows: Any, policy: Policy, **options: Any) -> PackedUpdate:
    rollouts, advantages, supervised = rows
    return pack_update(
        rollouts, advantages, supervised, [2] * len(supervised), config=PolicyLossConfig(),
        **{"max_tokens": 10_000, "vision": policy.vision} | options,
    )  # fmt: skip


def packed_logprobs(policy: Policy, update: PackedUpdate) -> Tensor:
    hidden = torch.cat([policy.hidden(batch) for batch in update.batches])
    targets = torch.cat([batch.targets for batch in update.batches])
    logits = torch.nn.functional.linear(hidden, policy.head.weight)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def alone(model: Any, token_ids: list[int], start: int, images: tuple[ImageInput, ...]) -> Tensor:
    """Log-probs of the tokens from `start` on, with positions by the model itself."""
    ids = torch.tensor([token_ids])
    arguments = {}
    if images:
        arguments = {
            "pixel_values": torch.cat([image.patches for image in images]),
            "image_grid_thw": torch.tensor([image.grid for image in images]),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    logprobs = model(input_ids=ids, use_cache=False, **arguments).logits[0, start - 1 : -1]
    return logprobs.log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]


def logprobs_alone(model: Any, rows: Any) -> Tensor:
    rollouts, _, supervised = rows
    each = [
        alone(model, r.prompt.token_ids + r.token_ids, len(r.prompt.token_ids), r.prompt.images)
        for r in rollouts
    ]
    each += [alone(model, r.token_ids, r.num_prompt_tokens, r.images) for r in supervised]
    return torch.cat(each)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def original(kind: str) -> Any:
    """As transformers makes it, with none of our attention or adapters."""
    return tiny_vision_model(kind)


@pytest.fixture(scope="module")
def policy(kind: str) -> Policy:
    return Policy(packed_vision_model(kind), torch.float32)


@pytest.mark.parametrize("share_prefixes", [True, False])
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(0, 3),
    size=st.integers(1, 3),
    supervised=st.integers(0, 2),
    max_tokens=st.sampled_from([110, 200, 10_000]),
)
def test_packed_equals_one_at_a_time(
    share_prefixes, original, policy, seed, groups, size, supervised, max_tokens
):
    rows = draw_rows(seed, groups, size, supervised)
    if not rows[0] and not rows[2]:
        return
    update = pack(rows, policy, max_tokens=max_tokens, share_prefixes=share_prefixes)
    with torch.no_grad():
        expected = logprobs_alone(original, rows)
        packed = packed_logprobs(policy, update)
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)
    longest = max(len(batch.input_ids) for batch in update.batches)
    assert longest <= max_tokens * MAX_OVERFILL


@pytest.mark.thinned(3)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train_vision", [False, True])
def test_gradients_equal_one_at_a_time(kind, train_vision, checkpointing):
    rows = draw_rows(3, 2, 3, 2)
    ours = Policy(packed_vision_model(kind), torch.float32)
    original = tiny_vision_model(kind)
    ours.vision.tower.requires_grad_(train_vision)
    if checkpointing:
        ours.model.gradient_checkpointing_enable({"use_reentrant": False})
        ours.model.train()
    packed = packed_logprobs(ours, pack(rows, ours))
    expected = logprobs_alone(original, rows)
    weights = torch.linspace(-1, 1, len(packed))
    (packed * weights).sum().backward()
    (expected * weights).sum().backward()
    wanted = {name: p.grad for name, p in original.named_parameters()}
    for name, parameter in ours.model.named_parameters():
        if "visual" in name and not train_vision:
            assert parameter.grad is None
            continue
        scale = wanted[name].abs().max().clamp(min=1)
        torch.testing.assert_close(
            parameter.grad / scale, wanted[name] / scale, atol=1e-5, rtol=1e-5, msg=name
        )


def test_images_of_a_group_are_encoded_once(policy):
    rollouts, advantages, _ = rows = draw_rows(5, 2, 4, 0, images=(2, 3))
    patches = [len(image.patches) for r in rollouts[::4] for image in r.prompt.images]
    (batch,) = pack(rows, policy).batches
    assert len(patches) > 2
    assert [len(image) for image in batch.images.patches] == patches
    assert batch.images.grids.tolist() == [
        list(image.grid) for r in rollouts[::4] for image in r.prompt.images
    ]
    apart = pack(rows, policy, share_prefixes=False).batches[0]
    assert len(apart.images.patches) == 4 * len(patches)


def test_image_tokens_never_reach_the_head(policy):
    rows = draw_rows(5, 3, 2, 3, images=(1, 3))
    (batch,) = pack(rows, policy).batches
    assert (batch.input_ids == IMAGE).sum() == len(batch.images.token_index) > 20
    assert (batch.input_ids[batch.images.token_index] == IMAGE).all()
    assert not set(batch.hidden_index.tolist()) & set(batch.images.token_index.tolist())
    assert policy.hidden(batch).shape[0] == len(batch.targets) < (batch.input_ids == IMAGE).sum()


def test_a_sampled_image_token_is_a_token_like_others(policy):
    """A completion may hold one, by chance; no image belongs to it."""
    rollouts, advantages, _ = draw_rows(5, 1, 2, 0, images=(1, 1))
    odd = Rollout(rollouts[0].prompt, 0, [4, IMAGE, 9], [0.0] * 3, "length", "")
    update = pack(([odd, rollouts[1]], advantages, []), policy)
    plain = Rollout(rollouts[0].prompt, 0, [4, 7, 9], [0.0] * 3, "length", "")
    expected = pack(([plain, rollouts[1]], advantages, []), policy)
    ours, theirs = (update.batches[0], expected.batches[0])
    assert torch.equal(ours.position_ids, theirs.position_ids)
    assert torch.equal(ours.images.token_index, theirs.images.token_index)
    assert policy.hidden(ours).isfinite().all()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["trained", "reference"])
def test_bfloat16_stays_close(kind, policy, weights):
    """Under autocast, as models are trained, and with weights in bfloat16, as references are."""
    rows = draw_rows(5, 2, 2, 2, images=(1, 3))
    rounded = Policy(packed_vision_model(kind).to(weights), torch.bfloat16)
    update = pack(rows, rounded)
    with torch.no_grad():
        assert rounded.hidden(update.batches[0]).dtype == torch.bfloat16
        rounded.model.lm_head.to(torch.bfloat16)
        difference = packed_logprobs(rounded, update) - packed_logprobs(policy, update)
    assert 1e-4 < difference.abs().mean() < 0.05


def test_nothing_waits_for_the_device(kind):
    ours = Policy(packed_vision_model(kind), torch.float32)
    update = pack(draw_rows(5, 2, 2, 2, images=(1, 3)), ours)
    with ForbidHostSync():
        packed_logprobs(ours, update).sum().backward()
    assert ours.vision.tower.patch_embed.proj.weight.grad.abs().max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_nothing_waits_for_a_gpu(kind, backend):
    """With the kernels that a model gets there, and as close to float32 as bfloat16 comes."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    sizes = {"hidden_size": 128, "head_dim": 32, "rope_parameters": rope}
    exact = Policy(packed_vision_model(kind, **sizes), torch.float32)
    rows = draw_rows(5, 2, 2, 2, images=(1, 3))
    with torch.no_grad():
        expected = packed_logprobs(exact, pack(rows, exact))
    model = packed_vision_model(kind, **sizes).cuda()
    backends = [
        choose(backend, kind, model, torch.bfloat16)
        for choose in (choose_attention, choose_vision_attention)
    ]
    ours = Policy(model, torch.bfloat16, *backends)
    update = pack(rows, ours, attention=ours.attention).to(torch.device("cuda"))
    packed_logprobs(ours, update)  # compiles and allocates
    with ForbidHostSync("cuda"):
        logprobs = packed_logprobs(ours, update)
        logprobs.sum().backward()
    assert (logprobs.cpu() - expected).abs().mean() < 0.05


def test_rows_that_do_not_fit_are_named(policy):
    rollouts, advantages, _ = draw_rows(5, 1, 1, 0, images=(1, 1))
    prompt = rollouts[0].prompt
    ids, count = prompt.token_ids, prompt.token_ids.count(IMAGE)
    place = ids.index(IMAGE)
    changed = {
        rf"its 1 images make {count} image tokens, but among its {len(ids) + 1} tokens stand "
        rf"{count + 1} image tokens": ([*ids[:place], IMAGE, *ids[place:]], prompt.images),
        rf"stand {2 * count} image tokens \({count} \+ {count}\)": (ids + ids, prompt.images),
        # Two images side by side: where one ends cannot be seen.
        rf"its 2 images make {2 * count} image tokens \({count} \+ {count}\), but .* stand "
        rf"{2 * count} image tokens$": (
            [*ids[:place], *[IMAGE] * count, *ids[place:]], prompt.images * 2,
        ),
    }  # fmt: skip
    for message, (tokens, images) in changed.items():
        wrong = Prompt("pictures", 7, tokens, "", None, {}, images)
        rollout = Rollout(wrong, 0, [1, 2], [0.0, 0.0], "stop", "")
        with pytest.raises(VisionError, match=f"row pictures:7: .*{message}"):
            pack(([rollout], advantages, []), policy)
    text = Policy(tiny_llama(), torch.float32)
    with pytest.raises(VisionError, match=r"row pictures:0 has images, but the model takes none"):
        pack((rollouts, advantages, []), text)
