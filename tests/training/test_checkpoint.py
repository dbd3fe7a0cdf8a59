from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recap_fast.training.checkpoint import (
    CheckpointError,
    TrainerState,
    check_savable,
    latest_checkpoint,
    list_checkpoints,
    load_state,
    save_checkpoint,
)
from tests.tiny import tiny_llama
from tests.tiny_tokenizer import tiny_tokenizer


def state(step: int) -> TrainerState:
    tensors = {"optimizer/exp_avg/x": torch.arange(4.0), "step": torch.tensor(2.0)}
    return TrainerState(step, {"sums": {"drawn": 3}}, tensors)


def test_is_a_hugging_face_model(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    folder = save_checkpoint(tmp_path, state(3), model, tokenizer, keep=2)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
    assert (folder / "model.safetensors").exists()
    # transformers without this package must not be asked for our attention.
    assert "recap_packed" not in (folder / "config.json").read_text()
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt"))


def test_state_round_trip(tmp_path):
    saved = state(3)
    folder = save_checkpoint(tmp_path, saved, tiny_llama(), tiny_tokenizer(), keep=1)
    loaded = load_state(folder)
    assert (loaded.step, loaded.data) == (3, saved.data)
    assert loaded.tensors.keys() == saved.tensors.keys()
    for key, tensor in saved.tensors.items():
        assert torch.equal(loaded.tensors[key], tensor)


def test_keeps_the_newest(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, state(step), model, tokenizer, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000010", "step-000011"]
    assert latest_checkpoint(tmp_path).name == "step-000011"
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupted_write_is_no_checkpoint(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    save_checkpoint(tmp_path, state(1), model, tokenizer, keep=2)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recap_fast.training.checkpoint.save_file", die)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, state(2), model, tokenizer, keep=2)
    assert latest_checkpoint(tmp_path).name == "step-000001"
    save_checkpoint(tmp_path, state(2), model, tokenizer, keep=2)
    assert latest_checkpoint(tmp_path).name == "step-000002"
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_a_step_again_never_removes_it(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    first = save_checkpoint(tmp_path, state(2), model, tokenizer, keep=1)
    monkeypatch.setattr("recap_fast.training.checkpoint.shutil.rmtree", None)
    assert save_checkpoint(tmp_path, state(2), model, tokenizer, keep=1) == first


def test_none_to_resume_from(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["trainer_state.json", "trainer_state.safetensors"])
def test_damaged_state_is_reported(tmp_path, name):
    folder = save_checkpoint(tmp_path, state(1), tiny_llama(), tiny_tokenizer(), keep=1)
    (folder / name).write_bytes(b"{broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(folder)


def test_a_trial_finds_what_could_not_be_saved_and_leaves_nothing(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    folder = tmp_path / "checkpoints"
    check_savable(folder, model, tokenizer)
    assert list(folder.iterdir()) == []

    model.generation_config.temperature = 0.5
    with pytest.raises(CheckpointError, match="cannot be written: .*temperature"):
        check_savable(folder, model, tokenizer)
    model.generation_config.temperature = None
    model.config.helper = object()
    with pytest.raises(CheckpointError, match="cannot be written: .*not JSON serializable"):
        check_savable(folder, model, tokenizer)
    del model.config.helper
    tokenizer.init_kwargs["helper"] = object()
    with pytest.raises(CheckpointError, match="cannot be written: .*not JSON serializable"):
        check_savable(folder, model, tokenizer)
    assert list(folder.iterdir()) == []

    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/trial: cannot be written"):
        check_savable(tmp_path / "file", model, tiny_tokenizer())


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt2"])
def test_a_trial_needs_no_tensors_of_models_that_are_saved_under_other_names(tmp_path, kind):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    check_savable(tmp_path, model, tiny_tokenizer())


def test_a_failed_write_keeps_the_last_and_leaves_nothing(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    save_checkpoint(tmp_path, state(1), model, tokenizer, keep=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("recap_fast.training.checkpoint.save_file", full)
        with pytest.raises(CheckpointError, match="step-000002: cannot be written: .*No space"):
            save_checkpoint(tmp_path, state(2), model, tokenizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
