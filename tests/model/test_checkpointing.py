"""Activation checkpointing: the same gradients in every mode, and what is computed again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama import modeling_llama

from recap_fast.config import ConfigError, LoraConfig, load_config
from recap_fast.model import checkpointing
from recap_fast.model.checkpointing import LayerModes, checkpoint_layers
from recap_fast.model.lora import add_adapters
from recap_fast.model.policy import Policy
from recap_fast.model.train_mode import enter_train_mode
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.training.packing import PackedUpdate, pack_update
from tests.model.test_vision import draw_rows
from tests.tiny import packed_vision_model, tiny_llama, tiny_settings

KINDS = ["llama", "adapters", "images"]
MIXED = LayerModes(1, 1, 1)


def make_policy(kind: str, dtype: torch.dtype = torch.float32) -> Policy:
    """Of three layers; with a trained tower where it takes images."""
    if kind == "images":
        policy = Policy(packed_vision_model("qwen2_5_vl"), dtype)
    else:
        policy = Policy(tiny_llama(layers=3), dtype)
    if kind == "adapters":
        add_adapters(policy.model, LoraConfig(rank=4), "base")
        for name, parameter in policy.model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    enter_train_mode(policy.model)
    return policy


def make_update(policy: Policy) -> PackedUpdate:
    rollouts, advantages, rows = draw_rows(0, 2, 3, 2, (1, 2) if policy.vision else (0, 0))
    return pack_update(
        rollouts, advantages, rows, [2] * len(rows),
        config=PolicyLossConfig(), max_tokens=1000, vision=policy.vision,
    )  # fmt: skip


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls[operator._schema.name.partition("::")[2]] += 1
        return operator(*args, **(kwargs or {}))


def backward(policy: Policy) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Gradients by name, and the operators of the backward pass."""
    (batch,) = make_update(policy).batches
    hidden = policy.hidden(batch)
    with Counted() as counted:
        (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    named = policy.model.named_parameters()
    return {n: p.grad for n, p in named if p.grad is not None}, counted.calls


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "modes", [LayerModes.uniform("selective", 3), LayerModes.uniform("full", 3), MIXED],
    ids=["selective", "full", "mixed"],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_to_the_bit(
    kind: str, modes: LayerModes, dtype: torch.dtype
) -> None:
    wanted, _ = backward(make_policy(kind, dtype))
    policy = make_policy(kind, dtype)
    checkpoint_layers(policy.model, modes)
    got, _ = backward(policy)
    assert got.keys() == wanted.keys()
    assert len(got) > 10
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


def test_a_rotary_embedding_that_overwrites_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Liger's does, on the device alone, in the storage of outputs that are kept."""
    plain = modeling_llama.apply_rotary_pos_emb

    def rotate(q: torch.Tensor, k: torch.Tensor, *others: Any) -> Any:
        for given, rotated in zip((q, k), plain(q.detach(), k.detach(), *others), strict=True):
            given.data.copy_(rotated)  # no version counts it
        return _Rotated.apply(q, k, *others)

    class _Rotated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
            ctx.save_for_backward(cos, sin)
            return q.view_as(q), k.view_as(k)

        @staticmethod
        def backward(ctx: Any, dq: Any, dk: Any) -> Any:
            cos, sin = ctx.saved_tensors
            return (*plain(dq, dk, cos, -sin), None, None)

    liger = pytest.importorskip("liger_kernel.transformers")
    rotate.__module__ = liger.liger_rotary_pos_emb.__module__
    wanted, _ = backward(make_policy("llama"))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
    for spare in (True, False):
        if not spare:
            monkeypatch.setattr(checkpointing, "spare_rotary_inputs", lambda layer: None)
            monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)
        policy = make_policy("llama")
        checkpoint_layers(policy.model, LayerModes.uniform("selective", 3))
        got, _ = backward(policy)
        off = max((got[n] - g).norm() / g.norm() for n, g in wanted.items())
        assert (off < 1e-5) == spare


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("kind", ["llama", "adapters"])
def test_what_is_computed_again(kind: str) -> None:
    """Selective: no attention and no product but those of adapters' second factors; full: both, but
    for the last product, whose output nothing needs."""
    calls = {}
    for mode in ("none", "selective", "full"):
        policy = make_policy(kind)
        checkpoint_layers(policy.model, LayerModes.uniform(mode, 3))  # type: ignore[arg-type]
        calls[mode] = backward(policy)[1]
    attention = {mode: counts[ATTENTION] / 3 for mode, counts in calls.items()}
    assert attention == {"none": 0, "selective": 0, "full": 5}  # a call for each length
    extra = {mode: (counts["mm"] - calls["none"]["mm"]) / 3 for mode, counts in calls.items()}
    if kind == "llama":
        assert extra == {"none": 0, "selective": 0, "full": 6}
    else:  # each of 7 layers has a product with its weight and two with the adapter's
        assert extra == {"none": 0, "selective": 6, "full": 20}
    assert calls["selective"]["silu"] == 3
    assert calls["none"]["silu"] == 0


def test_modes_come_in_the_order_of_what_they_compute_again() -> None:
    choices = LayerModes.by_cost(3)
    assert choices[0] == LayerModes.uniform("none", 3)
    assert choices[3] == LayerModes.uniform("selective", 3)
    assert choices[-1] == LayerModes.uniform("full", 3)
    assert len(choices) == len(set(choices)) == 7
    assert LayerModes(1, 2, 0).in_order() == ["full", "selective", "selective"]
    assert LayerModes(1, 2, 0).describe() == "1 full + 2 selective checkpointing"
    assert choices[0].describe() == "no checkpointing"


def test_layers_that_cannot_be_checkpointed_are_refused() -> None:
    model: Any = tiny_llama()
    with pytest.raises(ValueError, match="wanted modes of 2 layers, got 3"):
        checkpoint_layers(model, LayerModes.uniform("full", 3))
    model.model.layers[0] = torch.nn.Identity()
    with pytest.raises(ValueError, match="layers of type Identity cannot be checkpointed"):
        checkpoint_layers(model, LayerModes.uniform("full", 2))
    checkpoint_layers(model, LayerModes.uniform("none", 2))


@pytest.mark.parametrize(
    ("given", "read"),
    [("true", "full"), ("false", "none"), ("none", "none"), ("selective", "selective"),
     ("auto", "auto")],
)  # fmt: skip
def test_the_setting(tmp_path: Path, given: str, read: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(tmp_path, tmp_path)))
    config = load_config(path, [f"model.gradient_checkpointing={given}"])
    assert config.model.gradient_checkpointing == read
    with pytest.raises(ConfigError, match=r"model\.gradient_checkpointing"):
        load_config(path, ["model.gradient_checkpointing=some"])
