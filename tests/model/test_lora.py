from __future__ import annotations

import sys
import weakref

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from recap_fast.config import LoraConfig, ModelConfig
from recap_fast.model.errors import ModelError
from recap_fast.model.lora import (
    ADAPTERS_FILE,
    LoraError,
    add_adapters,
    base_of,
    is_adapter,
    load_adapters,
    merged_weights,
    save_settings,
    saved_adapters,
    without_adapters,
)
from recap_fast.model.model_path import resolve_model
from recap_fast.model.policy import load_policy, make_policy
from recap_fast.model.reference import BasePolicy
from recap_fast.rollout.protocol import iter_weights
from tests.tiny import packed_vision_model, save_tiny_model, tiny_llama

IDS = torch.arange(24).reshape(2, 12) * 5 % 97


def adapted(model=None, *, spread=0.3, **settings):
    """A model whose adapters already do something."""
    model = tiny_llama() if model is None else model
    add_adapters(model, LoraConfig(**{"rank": 4, "alpha": 6} | settings), "base", seed=3)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=spread)
    return model


def save_adapters(model, folder):
    save_settings(model, folder)
    save_file(saved_adapters(model), folder / ADAPTERS_FILE)


def logits(model):
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(input_ids=IDS).logits


# -- what is trained


def test_adapters_alone_are_trained_in_float32():
    model = tiny_llama().bfloat16()
    add_adapters(model, LoraConfig(rank=4), "base")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # two layers, seven linear layers in each, A and B
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_new_adapters_change_nothing_and_follow_from_the_seed():
    expected = logits(tiny_llama())
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + len(models))
        state = torch.get_rng_state()
        model = tiny_llama()
        torch.set_rng_state(state)
        add_adapters(model, LoraConfig(rank=4), "base", seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(logits(model), expected)
        models.append({n: p for n, p in model.named_parameters() if "lora_A" in n})
    for name, first in models[0].items():
        assert torch.equal(first, models[1][name])
        assert not torch.equal(first, models[2][name])


@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16])
def test_the_base_is_kept_in_the_compute_dtype_where_that_is_exact(published, tmp_path):
    save_tiny_model(tmp_path)
    weights = {}
    if published == torch.bfloat16:
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=published).save_pretrained(tmp_path)
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        weights[name] = tensor
    # Float32 weights stay what they are under either dtype that "auto" may come to.
    dtype = "auto" if published == torch.float32 else "bfloat16"
    config = ModelConfig(path=str(tmp_path), dtype=dtype, device="cpu", lora=LoraConfig(rank=4))
    policy = load_policy(config, str(tmp_path))
    kept = {p.dtype for p in policy.model.parameters() if not p.requires_grad}
    assert kept == {published}
    for name, tensor in iter_weights(policy.model):
        assert torch.equal(tensor.float(), weights[name].float()), name


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    save_tiny_model(tmp_path)
    gradients = []
    for checkpointing in (False, True):
        config = ModelConfig(
            path=str(tmp_path), dtype="float32", device="cpu", lora=LoraConfig(rank=4),
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        model = load_policy(config, str(tmp_path), seed=5).model
        model.set_attn_implementation("sdpa")
        model(input_ids=IDS).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert any(gradient.any() for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


# -- the weights that leave


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_those_of_the_model(tied):
    """Against float64, and by what a plain model computes with them."""
    model = adapted(tiny_llama(tied=tied))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = logits(model)
    plain = tiny_llama(tied=tied, seed=1)
    weights = dict(iter_weights(model))
    assert weights.keys() == dict(iter_weights(plain)).keys()
    for name, tensor in weights.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.base_layer.weight" not in before:
            continue
        a, b, w = (
            before[f"{layer}.{part}.weight"].double()
            for part in ("lora_A.default", "lora_B.default", "base_layer")
        )
        torch.testing.assert_close(tensor.double(), w + 6 / 4 * b @ a, rtol=1e-6, atol=1e-6)
    plain.load_state_dict(weights)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # nothing was merged in place


def test_merging_a_bfloat16_base_rounds_once():
    model = adapted(tiny_llama().bfloat16(), spread=0.02)
    state = model.state_dict()
    for name, tensor in merged_weights(model):
        layer = name.removesuffix(".weight")
        if f"{layer}.base_layer.weight" in state:
            assert tensor.dtype == torch.float32
            a, b, w = (
                state[f"{layer}.{part}.weight"].double()
                for part in ("lora_A.default", "lora_B.default", "base_layer")
            )
            exact = w + 6 / 4 * b @ a
            torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7)
            assert not torch.equal(tensor.bfloat16(), w.bfloat16())


def test_merged_weights_are_made_one_at_a_time():
    model = adapted()
    made = []
    for name, tensor in merged_weights(model):
        if "_proj" in name:
            made.append(weakref.ref(tensor))
            assert sum(reference() is not None for reference in made) <= 2
    assert len(made) == 14


@pytest.mark.parametrize("train_vision", [False, True])
def test_a_vision_tower_has_adapters_where_it_is_trained(train_vision):
    model = packed_vision_model("qwen2_5_vl")
    plain = dict(iter_weights(packed_vision_model("qwen2_5_vl")))
    config = ModelConfig(
        path="m", dtype="float32", device="cpu", lora=LoraConfig(rank=4), train_vision=train_vision
    )
    policy = make_policy(model, config, "m")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("visual" in name for name in trained) == train_vision
    assert any("language_model" in name for name in trained)
    assert all(".lora_" in name for name in trained)
    assert policy.vision is not None
    weights = dict(iter_weights(model))
    assert list(weights) == list(plain)
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items())


# -- names


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_prj"], "no linear layer is called 'q_prj'; did you mean q_proj"),
        (["q_proj", "xyz"], "'xyz'; there are down_proj, gate_proj, k_proj, o_proj"),
        (["lm_head"], "'lm_head' names lm_head, the head"),
        (["embed_tokens"], "names model.embed_tokens, the Embedding"),
        (["model.layers.9.self_attn.q_proj"], "did you mean q_proj"),
    ],
)
def test_unknown_names_are_refused(targets, words):
    with pytest.raises(LoraError, match="model.lora.target_modules") as found:
        add_adapters(tiny_llama(), LoraConfig(target_modules=targets), "base")
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_a_frozen_tower_is_named_where_a_name_is_only_there():
    model = packed_vision_model("qwen2_5_vl")
    settings = LoraConfig(target_modules=["qkv"])
    config = ModelConfig(path="m", dtype="float32", device="cpu", lora=settings)
    with pytest.raises(LoraError, match=r"'qkv' \(model.visual is frozen: model.train_vision\)"):
        make_policy(model, config, "m")


def test_one_layer_by_its_full_name():
    name = "model.layers.1.mlp.down_proj"
    model = adapted(target_modules=[name])
    assert {n.partition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        name
    }


# -- the reference


def test_base_policy_scores_without_adapters():
    plain = tiny_llama()
    model = adapted()
    with without_adapters(model):
        assert torch.equal(logits(model), logits(plain))
        assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    assert not torch.allclose(logits(model), logits(plain))


def test_adapters_act_again_after_an_error():
    config = ModelConfig(path="m", dtype="float32", device="cpu", lora=LoraConfig(rank=4))
    model = tiny_llama()
    policy = make_policy(model, config, "m")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = logits(model)
    with pytest.raises(AttributeError):
        BasePolicy(policy).score(None, lambda hidden: hidden)
    assert torch.equal(logits(model), expected)


# -- files


def test_peft_and_transformers_load_what_is_saved(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    config = ModelConfig(path=str(base), dtype="float32", device="cpu", lora=LoraConfig(rank=4))
    model = load_policy(config, str(base)).model
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapters(model, tmp_path / "adapters")
    assert {path.name for path in (tmp_path / "adapters").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert is_adapter(tmp_path / "adapters")
    assert base_of(str(tmp_path / "adapters")) == str(base)
    expected = logits(model)
    by_peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapters"
    )
    torch.testing.assert_close(logits(by_peft.base_model.model), expected)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapters")), expected
    )
    ours = load_policy(config, str(tmp_path / "adapters"), seed=9).model
    assert torch.equal(logits(ours), expected)
    assert all(".lora_" in name for name, p in ours.named_parameters() if p.requires_grad)


def test_damaged_and_foreign_files(tmp_path):
    model = adapted()
    save_adapters(model, tmp_path / "a")
    other = tiny_llama()
    other.model.layers = other.model.layers[:1]
    with pytest.raises(LoraError, match="has what the model has not"):
        load_adapters(other, str(tmp_path / "a"))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(LoraError, match="cannot be read"):
        load_adapters(tiny_llama(), str(tmp_path / "a"))
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraError, match=r"adapter_config.json cannot be read|wanted the adapters"):
        base_of(str(tmp_path / "a"))


def test_adapters_are_no_model_path(tmp_path):
    save_adapters(adapted(), tmp_path)
    with pytest.raises(ModelError, match="holds LoRA adapters of base: wanted a whole model"):
        resolve_model(str(tmp_path))


def test_peft_is_missed_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LoraError, match="LoRA needs peft"):
        add_adapters(tiny_llama(), LoraConfig(), "base")
