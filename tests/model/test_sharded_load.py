"""Models that are sharded before they have weights, against `from_pretrained` to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from recap_fast.config import LoraConfig, ModelConfig
from recap_fast.model.errors import ModelError
from recap_fast.model.hub import model_folder
from recap_fast.model.lora import ADAPTERS_FILE, save_settings, saved_adapters
from recap_fast.model.policy import find_class, load_policy
from recap_fast.model.sharded_load import fill, make_empty, refuse_quantised
from recap_fast.model.weight_files import find_weight_files, match_names
from tests.processes import run_ranks
from tests.tiny import tiny_vision_model

SIZES: dict[str, Any] = {
    "vocab_size": 331, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    # With 5 rows each, which leave the last of 4 ranks none.
    "narrow": lambda: LlamaConfig(**SIZES | {"intermediate_size": 5}),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=12, tie_word_embeddings=True),
}


def save(
    folder: Path, kind: str, *, max_shard_size: str = "50GB", dtype: torch.dtype = torch.float32
) -> Path:
    path = folder / kind
    torch.manual_seed(0)
    if kind in CONFIGS:
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    else:
        model = tiny_vision_model(kind, tied=kind == "qwen2_5_vl")
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def check(results: list[dict[str, Any]], tied: set[str] = frozenset()) -> None:  # type: ignore
    for rank in results:
        for case, found in rank.items():
            assert found["differences"] == [], case
            assert found["same settings"], case
            assert found["device"] == "cpu", case
            assert found["sharded"] > 0, case
            assert found["tied"] == [any(kind in case for kind in tied)] * 2, case


def save_adapters(folder: Path, base: Path) -> Path:
    """As a run leaves them."""
    config = ModelConfig(path=str(base), dtype="bfloat16", device="cpu", lora=LORA)
    policy = load_policy(config, str(base))
    saved = {name: torch.randn(t.shape) for name, t in saved_adapters(policy.model).items()}
    save_settings(policy.model, folder)
    save_file(saved, folder / ADAPTERS_FILE)
    return folder


LORA = LoraConfig(rank=4)
RANKS = Path(__file__).with_name("sharded_load_ranks.py")


@pytest.mark.slow
def test_two_processes_have_what_from_pretrained_makes(tmp_path: Path) -> None:
    kinds = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]
    folders = [save(tmp_path, kind, max_shard_size="100KB") for kind in kinds]
    assert all(len(list(folder.glob("*.safetensors"))) > 1 for folder in folders)
    cases: list[Any] = [[str(folder), {}] for folder in folders]
    towers = [save(tmp_path, kind) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")]
    for folder in towers:
        cases.append([str(folder), {"gradient_checkpointing": True}])
    cases.append([str(towers[1]), {"train_vision": True}])
    cases.append([str(towers[2]), {"trainable": False}])
    narrow = save(tmp_path / "bfloat16", "qwen3", dtype=torch.bfloat16)
    for base in (folders[0], narrow, towers[1]):
        cases.append([str(base), {"lora": LORA.model_dump()}])
    cases.append([str(save_adapters(tmp_path / "adapters", folders[0])), {}])
    results = run_ranks(RANKS, 2, tmp_path, json.dumps([[2]]), json.dumps(cases))
    check(results, tied={"qwen2 ", "qwen2_5_vl", "gemma"})
    for rank in results:
        assert len(rank) == len(cases)
        for case, found in rank.items():
            frozen = "vl" in case and "train_vision" not in case
            assert (found["whole"] > 0) == frozen, case


@pytest.mark.slow
def test_four_processes_alone_and_in_replicas(tmp_path: Path) -> None:
    folders = [save(tmp_path, kind) for kind in ("narrow", "qwen2_5_vl")]
    cases = [[str(folder), {}] for folder in folders]
    results = run_ranks(RANKS, 4, tmp_path, json.dumps([[4], [2, 2]]), json.dumps(cases))
    check(results, tied={"qwen2_5_vl"})
    alone = [rank["[4] narrow {}"] for rank in results]
    assert [found["empty"] for found in alone] == [0, 0, 0, 4]  # gate and up of two layers
    replicas = [rank["[2, 2] narrow {}"]["local"] for rank in results]
    assert replicas[:2] == replicas[2:]
    assert sum(found["local"] for found in alone) == sum(replicas[:2])


@pytest.mark.slow
def test_a_process_takes_up_its_share_of_memory_and_reads_it_alone(tmp_path: Path) -> None:
    """A model of SmolLM2's shapes, 134.5 million weights, stored in bfloat16 as published."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path / "smol")
    size = sum(parameter.numel() for parameter in model.parameters())
    del model
    script = Path(__file__).with_name("sharded_load_memory.py")
    small = str(save(tmp_path, "llama"))
    ranks = run_ranks(script, 4, tmp_path, str(tmp_path / "smol"), small)
    read = [rank["read"] for rank in ranks]
    assert sum(read) == 2 * size
    for rank in ranks:
        assert rank["weights"] == pytest.approx(size / 4, rel=0.01)
        assert rank["read"] == 2 * rank["weights"]
        share = 4 * rank["weights"]  # in float32
        assert 0.9 * share < rank["anonymous"] < 1.15 * share
        # With the mapped pages, and what the kernel maps around them unasked.
        assert rank["sharded"] < share + 2 * size
    assert ranks[0]["whole"] > 4 * size > 3 * ranks[0]["anonymous"]
    assert ranks[0]["whole"] > 2 * ranks[0]["sharded"]


def load(folder: Path, **changes: Any) -> PreTrainedModel:
    """On one process, without shards: all but the reading of parts."""
    config = ModelConfig(path=str(folder), dtype="bfloat16", device="cpu")
    auto_class, model_config = find_class(config, str(folder), torch.device("cpu"), True)
    for name, value in changes.items():
        setattr(model_config, name, value)
    weights = find_weight_files(folder)
    model = make_empty(auto_class, model_config, str(folder), torch.float32)
    fill(model, weights, match_names(model, weights), torch.device("cpu"))
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def test_names_of_older_checkpoints(tmp_path: Path) -> None:
    """Of Qwen2.5-VL as published, before its text model moved, and of a backbone alone."""
    folder = save(tmp_path, "qwen2_5_vl")
    keys = set(load_file(folder / "model.safetensors"))
    assert {key.split(".")[0] for key in keys} == {"model", "visual"}  # as published
    new = load(folder)
    assert {name.split(".")[1] for name in new.state_dict()} == {
        "visual",
        "language_model",
        "weight",
    }
    renamed = rewrite(
        save(tmp_path / "new", "qwen2_5_vl"),
        lambda _: {
            name: t.clone() for name, t in new.state_dict().items() if "lm_head" not in name
        },
    )
    assert_equal(load(renamed), AutoModelForImageTextToText.from_pretrained(renamed))
    backbone = rewrite(
        save(tmp_path, "qwen2"),
        lambda all: {key.removeprefix("model."): tensor for key, tensor in all.items()},
    )
    assert_equal(load(backbone), AutoModelForCausalLM.from_pretrained(backbone))


def assert_equal(ours: PreTrainedModel, wanted: PreTrainedModel) -> None:
    assert ours.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_either_of_two_tied_weights_will_do(tmp_path: Path) -> None:
    wanted = AutoModelForCausalLM.from_pretrained(save(tmp_path, "qwen2"))
    key = "model.embed_tokens.weight"

    def head_alone(all: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"lm_head.weight" if name == key else name: t for name, t in all.items()}

    def both(all: dict[str, Tensor]) -> dict[str, Tensor]:
        return all | {"lm_head.weight": all[key].clone()}

    def differing(all: dict[str, Tensor]) -> dict[str, Tensor]:
        return all | {"lm_head.weight": all[key] + 1}

    for change in (head_alone, both):
        model = load(rewrite(save(tmp_path / change.__name__, "qwen2"), change))
        assert_equal(model, wanted)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ModelError, match="lm_head.weight than in model.embed_tokens.weight, which"):
        load(rewrite(save(tmp_path / "differing", "qwen2"), differing))


def test_weights_that_are_missing_or_too_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    less = rewrite(save(tmp_path / "less", "qwen3"), lambda all: all | {norm: all.pop(norm)[:0]})
    with pytest.raises(ModelError, match=rf"{norm} of .* has the shape \[0\]; .* wants \[48\]"):
        load(less)
    rewrite(less, lambda all: {name: t for name, t in all.items() if name != norm})
    with pytest.raises(ModelError, match=f"lacks 1 of the model's weights, such as {norm}"):
        load(less)
    # Rotary frequencies, which old files have, are no news.
    more = {
        "extra.weight": torch.ones(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }
    load(rewrite(save(tmp_path / "more", "qwen3"), lambda all: all | more))
    assert "has 1 weights that the model has not, such as extra.weight: they" in caplog.text


def test_weights_that_are_stored_in_parts(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SIZES, head_dim=12, num_experts=2, moe_intermediate_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"such as model.layers.0.mlp.experts.0\..*, are"):
        load(tmp_path)


def test_other_formats_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read: .*"):
        load(folder)
    file.unlink()
    with pytest.raises(ModelError, match="has neither model.safetensors nor model.safetens"):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="weights in pytorch_model.bin, .* with save_pretrained"):
        load(folder)


def test_an_index_that_does_not_fit_its_files(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"lacks 1 of the files that .* such as {second.name}"):
        load(folder)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=f"{second.name} cannot be read: .* does not contain"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match="index.json cannot be read: KeyError"):
        load(folder)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelError, match=r"is quantised \(awq\), which is not supported on more"):
        refuse_quantised(config, str(tmp_path))


def test_a_buffer_that_nothing_gives_a_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, "llama")
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(ModelError, match="nothing gives its buffer model.rotary_emb.inv_freq "):
        load(folder)


def test_names_that_only_the_hub_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, "llama")
    assert model_folder(str(folder)) == str(folder)
    # A cache as the hub's client writes it; no test has a network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"hf download some/model\) into the cache that HF_HOME"):
        model_folder("some/model")
    cached = tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / ("0" * 40))
    assert Path(model_folder("some/model")) == cached / "snapshots" / ("0" * 40)
