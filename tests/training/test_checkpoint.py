from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recap_fast.config import TrainConfig, load_config
from recap_fast.model.folder import is_checkpoint
from recap_fast.model.model_path import resolve_model
from recap_fast.rollout.vllm import why_unavailable
from recap_fast.rollout.vllm_process import process_state_kept
from recap_fast.trainer import Trainer
from recap_fast.training import safetensors_writer
from recap_fast.training.checkpoint import (
    CheckpointError,
    TrainerState,
    latest_checkpoint,
    list_checkpoints,
    load_state,
    small_files,
)
from recap_fast.training.evaluate import evaluate_model
from recap_fast.training.export import export_model
from recap_fast.training.harness import evaluate_tasks
from recap_fast.training.sharded_checkpoint import CheckpointSaver
from recap_fast.types import UserError
from tests.rollout.conftest import random_llama
from tests.tiny import tiny_config, tiny_llama
from tests.tiny_tokenizer import tiny_tokenizer


def state(step: int) -> TrainerState:
    tensors = {"optimizer/exp_avg/x": torch.arange(4.0), "step": torch.tensor(2.0)}
    return TrainerState(step, {"sums": {"drawn": 3}}, tensors)


def save_checkpoint(folder, state, model, tokenizer, keep):
    return CheckpointSaver(folder, model, tokenizer, keep=keep).start(state)


def test_is_a_hugging_face_model(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    folder = save_checkpoint(tmp_path, state(3), model, tokenizer, keep=2)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
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
        assert torch.equal(loaded.tensors[key][...], tensor)


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
        patch.setattr("recap_fast.training.safetensors_writer.write_at", die)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, state(2), model, tokenizer, keep=2)
    assert latest_checkpoint(tmp_path).name == "step-000001"
    save_checkpoint(tmp_path, state(2), model, tokenizer, keep=2)
    assert latest_checkpoint(tmp_path).name == "step-000002"
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_a_step_again_never_removes_it(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    first = save_checkpoint(tmp_path, state(2), model, tokenizer, keep=1)
    inode = first.stat().st_ino
    assert save_checkpoint(tmp_path, state(2), model, tokenizer, keep=1) == first
    assert first.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [first]


def test_none_to_resume_from(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["trainer/state.json", "trainer/state.safetensors"])
def test_damaged_state_is_reported(tmp_path, name):
    folder = save_checkpoint(tmp_path, state(1), tiny_llama(), tiny_tokenizer(), keep=1)
    (folder / name).write_bytes(b"{broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(folder)


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def remember(handle):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr("os.fsync", remember)
    folder = save_checkpoint(tmp_path, state(1), tiny_llama(), tiny_tokenizer(), keep=1)
    written = {path.relative_to(folder) for path in folder.rglob("*")}
    staging = tmp_path / ".step-000001.tmp"
    assert {path.relative_to(staging) for path in flushed if path.is_relative_to(staging)} == (
        written | {Path()}
    )
    assert flushed[-1] == tmp_path


def as_of_old(folder: Path) -> Path:
    """Puts a checkpoint's state to where earlier releases wrote it."""
    (folder / "trainer" / "state.json").rename(folder / "trainer_state.json")
    (folder / "trainer" / "state.safetensors").rename(folder / "trainer_state.safetensors")
    (folder / "trainer").rmdir()
    return folder


@pytest.fixture
def old(tmp_path):
    return as_of_old(save_checkpoint(tmp_path, state(3), tiny_llama(), tiny_tokenizer(), keep=9))


def test_old_checkpoints_count_and_are_resumed_from(old):
    assert list_checkpoints(old.parent) == [old]
    assert save_checkpoint(old.parent, state(3), tiny_llama(), tiny_tokenizer(), keep=9) == old
    assert latest_checkpoint(old.parent) == old
    loaded = load_state(old)
    assert loaded.step == 3
    assert loaded.tensors.keys() == state(3).tensors.keys()
    assert not list(old.glob("trainer_state*"))


@pytest.mark.parametrize("moved", [0, 1], ids=["before the first", "between the two"])
def test_a_move_that_was_cut_short_goes_on(old, moved):
    (old / "trainer").mkdir()
    if moved:
        (old / "trainer_state.safetensors").rename(old / "trainer" / "state.safetensors")
    assert list_checkpoints(old.parent) == [old]
    assert load_state(old).step == 3
    assert not list(old.glob("trainer_state*"))


def test_a_model_named_in_a_configuration_is_put_in_order(old):
    assert resolve_model(str(old)) == str(old)
    assert [path.name for path in old.glob("*.safetensors")] == ["model.safetensors"]
    assert load_state(old).step == 3


def test_what_another_trainer_wrote_is_left_alone(tmp_path):
    """transformers' own has a trainer_state.json too, which it needs where it is."""
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    resolve_model(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "trainer_state.json"]


def test_an_old_checkpoint_that_cannot_be_written_says_what_to_do(old, monkeypatch):
    def refuse(*paths):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("recap_fast.model.folder.os.replace", refuse)
    with pytest.raises(UserError, match="step-000003: .*Permission denied.*copy"):
        resolve_model(str(old))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a real run on the transformers engine, with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    model = folder / "model"
    random_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    steps = ["training.steps=2", "checkpoint.every=1", "checkpoint.keep=2"]
    train(
        tiny_config(
            folder, model, "data.max_prompt_tokens=100", "data.max_supervised_tokens=100", *steps
        )
    )
    return folder / "run"


@pytest.fixture
def newest(trained):
    return latest_checkpoint(trained / "checkpoints")


def train(config: TrainConfig) -> Trainer:
    trainer = Trainer(config)
    try:
        assert trainer.train()
    finally:
        trainer.close()
    return trainer


def greedy(folder: Path, texts: list[str], count: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    outputs = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = model.generate(
            ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        outputs.append(tokens[0, ids.shape[1] :].tolist())
    return outputs


def needs_vllm() -> None:
    if reason := why_unavailable(torch.device("cpu")):
        pytest.skip(f"vLLM cannot run here: {reason}")


def test_lm_eval_opens_a_checkpoint(newest, trained, task_folder, own_tasks_only):
    config = load_config(trained / "config.yaml")
    scores = evaluate_tasks(config, str(newest), ["capitals"], task_folder=task_folder)
    assert scores["eval/capitals/acc"] in [hits / 6 for hits in range(7)]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("what", ["checkpoint", "export"])
def test_vllm_opens_a_checkpoint(newest, what, tmp_path, monkeypatch):
    """vLLM as anyone starts it, on the folder as it is, and on an export in several files: its
    tokens are the trained model's."""
    needs_vllm()  # after which it runs in this process
    import vllm
    from vllm.distributed import parallel_state

    folder = newest
    if what == "export":
        monkeypatch.setattr(safetensors_writer, "FILE_BYTES", 100_000)
        folder = export_model(newest, tmp_path / "export")
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    texts = ["1+1=", "spell cat backwards"]
    with process_state_kept():  # the tests after this one share the process
        llm = vllm.LLM(
            str(folder), dtype="float32", max_model_len=64, enforce_eager=True,
            kv_cache_memory_bytes=2**24, disable_log_stats=True,
        )  # fmt: skip
    try:
        settings = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        outputs = llm.generate(texts, settings, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
    found = [list(output.outputs[0].token_ids) for output in outputs]
    assert found == greedy(newest, texts, 8)


def on_default_engine(folder: Path, model: Path) -> TrainConfig:
    quick = ["rollout.dtype=float32", "rollout.cpu_kv_cache_gib=0.05", "training.steps=1"]
    return tiny_config(
        folder,
        model,
        "rollout.engine=auto",
        "data.max_prompt_tokens=100",
        "data.max_supervised_tokens=100",
        *quick,
    )


def test_a_checkpoint_is_trained_on_with_the_default_engine(trained, tmp_path):
    needs_vllm()
    config = on_default_engine(tmp_path, trained / "checkpoints" / "step-000001")
    assert train(config).engine.name == "vllm"
    assert is_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))


@pytest.mark.slow
def test_an_old_checkpoint_is_evaluated_with_the_default_engine(trained, tmp_path):
    needs_vllm()
    start = as_of_old(shutil.copytree(trained / "checkpoints" / "step-000001", tmp_path / "start"))
    scores = evaluate_model(on_default_engine(tmp_path, start), str(start))
    assert {"eval/sums/length", "eval/words/loss"} <= scores.keys()


def test_a_trial_finds_what_could_not_be_saved_and_leaves_nothing(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    folder = tmp_path / "checkpoints"
    small_files(folder, model, tokenizer)
    assert list(folder.iterdir()) == []

    model.generation_config.temperature = 0.5
    with pytest.raises(CheckpointError, match="cannot be written: .*temperature"):
        small_files(folder, model, tokenizer)
    model.generation_config.temperature = None
    model.config.helper = object()
    with pytest.raises(CheckpointError, match="cannot be written: .*not JSON serializable"):
        small_files(folder, model, tokenizer)
    del model.config.helper
    tokenizer.init_kwargs["helper"] = object()
    with pytest.raises(CheckpointError, match="cannot be written: .*not JSON serializable"):
        small_files(folder, model, tokenizer)
    assert list(folder.iterdir()) == []

    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/trial: cannot be written"):
        small_files(tmp_path / "file", model, tiny_tokenizer())


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt2"])
def test_a_trial_needs_no_tensors_of_models_that_are_saved_under_other_names(tmp_path, kind):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    small_files(tmp_path, model, tiny_tokenizer())


def test_a_failed_write_keeps_the_last_and_leaves_nothing(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    save_checkpoint(tmp_path, state(1), model, tokenizer, keep=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("recap_fast.training.safetensors_writer.write_at", full)
        with pytest.raises(CheckpointError, match="step-000002: cannot be written: .*No space"):
            save_checkpoint(tmp_path, state(2), model, tokenizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
