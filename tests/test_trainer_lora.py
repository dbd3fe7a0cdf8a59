"""Runs that train adapters, from the first step to the evaluation of what came of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from recap_fast import cli
from recap_fast.config import ConfigError, load_config
from recap_fast.model.lora import merged_weights
from recap_fast.report.metrics import read_metrics
from recap_fast.rollout.vllm import why_unavailable
from recap_fast.rollout.vllm_process import process_state_kept
from recap_fast.trainer import Trainer
from recap_fast.training.checkpoint import list_checkpoints
from recap_fast.training.evaluate import evaluate_model
from recap_fast.training.export import export_model
from recap_fast.training.run_folder import find_evaluated
from recap_fast.types import UserError
from tests.processes import launched
from tests.rollout.conftest import random_llama
from tests.test_trainer import train, without_times
from tests.tiny import save_tiny_model, tiny_config
from tests.tiny_tokenizer import tiny_tokenizer

LORA = ["model.lora.rank=4", "model.lora.alpha=8", "optimizer.learning_rate=1e-2"]
KL = ["model.reference=initial", "loss.kl_coef=0.1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    config = tiny_config(tmp_path_factory.mktemp("lora"), model, *LORA, *KL)
    return config, train(config)


def test_only_adapters_learn(finished, model):
    """The base stays to the bit, and no step makes a gradient of the head."""
    _, trainer = finished
    base = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, parameter in trainer.policy.model.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None, name
        else:
            assert parameter.grad is None, name
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name
    moved = [p for n, p in trainer.policy.model.named_parameters() if "lora_B" in n and p.any()]
    assert len(moved) == 14
    assert all(".lora_" in name for name, _ in trainer.optimizer.named_state())


def test_the_base_is_the_reference(finished):
    config, trainer = finished
    rows = read_metrics(Path(config.run))[1:]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-7)  # the adapters start at nothing
    assert all(row["kl"] > 1e-6 for row in rows[1:])
    assert all(row["rollout/logprob_diff_mean"] < 1e-4 for row in rows)
    assert all(row["skipped_updates"] == 0 for row in rows)
    assert trainer.optimizer.reference.policy is trainer.policy  # not a second model


def test_the_reference_is_that_of_a_second_model(tmp_path, model, finished):
    """The same run with the initial model loaded beside the trained one."""
    config = tiny_config(
        tmp_path, model, *LORA, f"model.reference={model}", "loss.kl_coef=0.1"
    )  # fmt: skip
    train(config)
    rows, expected = (without_times(read_metrics(Path(c.run))) for c in (config, finished[0]))
    for row, other in zip(rows[1:], expected[1:], strict=True):
        assert row.get("kl") == pytest.approx(other.get("kl"), rel=1e-5, abs=1e-9)


def test_checkpoint_holds_the_adapters_alone(finished, model):
    config, trainer = finished
    newest = list_checkpoints(Path(config.run) / "checkpoints")[-1]
    weights = [path.name for path in newest.glob("*.safetensors")]
    assert weights == ["adapter_model.safetensors"]
    assert not (newest / "config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(newest)
    state = trainer.policy.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_resume_equals_an_unbroken_run(tmp_path, model, finished, monkeypatch):
    config = tiny_config(tmp_path, model, *LORA, *KL)
    trainer = Trainer(config)
    log = trainer._log

    def log_and_stop(view, row):
        log(view, row)
        if row["step"] == 2:
            trainer.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_log", log_and_stop)

    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.close()
    resumed = train(config, resume=True)
    rows, expected = (without_times(read_metrics(Path(c.run))) for c in (config, finished[0]))
    drop = "memory/peak_gib"
    assert [{k: v for k, v in r.items() if k != drop} for r in rows] == [
        {k: v for k, v in r.items() if k != drop} for r in expected
    ]
    state = finished[1].policy.model.state_dict()
    for name, tensor in resumed.policy.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_run_is_evaluated_with_its_adapters(finished, model):
    config, _ = finished
    file, checkpoint = find_evaluated(Path(config.run))
    found = evaluate_model(load_config(file), str(checkpoint))
    last = read_metrics(Path(config.run))[-1]
    assert found == {key: last[key] for key in found}
    assert found != evaluate_model(load_config(file), str(model))
    assert find_evaluated(checkpoint)[1] == checkpoint


def test_other_adapters_are_not_resumed(tmp_path, model, finished):
    config = load_config(
        Path(finished[0].run) / "config.yaml", ["model.lora.rank=2", "training.steps=9"]
    )
    with pytest.raises(ConfigError, match=r"model.lora: .* was trained with .*rank=4"):
        Trainer(config, resume=True)


def test_unknown_modules_end_the_command_with_status_2(tmp_path, model, monkeypatch, capsys):
    tiny_config(tmp_path, model)
    setting = "model.lora.target_modules=[q_prj]"
    monkeypatch.setattr(
        sys, "argv", ["recap-fast", "train", str(tmp_path / "tiny.yaml"), "--set", setting]
    )
    monkeypatch.setattr("recap_fast.rollout.preload.ensure_preload", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "no linear layer is called 'q_prj'; did you mean q_proj" in message


def test_bfloat16_base_with_the_engine_that_samples_from_it(tmp_path, model):
    """Adapters in float32 on a base in bfloat16: the engine and the packed pass agree."""
    base = tmp_path / "base"
    save_tiny_model(base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    config = tiny_config(tmp_path, base, *LORA, "model.dtype=bfloat16", "rollout.dtype=auto")
    trainer = train(config)
    kept = {p.dtype for p in trainer.policy.model.parameters() if not p.requires_grad}
    assert kept == {torch.bfloat16}
    assert trainer.engine.dtype == torch.bfloat16
    rows = read_metrics(tmp_path / "run")[1:]
    assert all(row["rollout/logprob_diff_mean"] < 0.1 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.slow
def test_vllm_takes_the_merged_weights(tmp_path):
    """With a base in bfloat16 and one in float32: the guards pass, weights are compared."""
    with process_state_kept():
        reason = why_unavailable(torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"vLLM cannot run here: {reason}")
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        random_llama().to(dtype).save_pretrained(folder / "base")
        tiny_tokenizer().save_pretrained(folder / "base")
        name = str(dtype).removeprefix("torch.")
        config = tiny_config(
            folder, folder / "base", *LORA, *KL, f"model.dtype={name}", f"rollout.dtype={name}",
            "rollout.engine=vllm", "rollout.cpu_kv_cache_gib=0.05", "data.max_prompt_tokens=120",
            "data.max_supervised_tokens=120",
        )  # fmt: skip
        trainer = train(config)
        assert trainer.engine.name == "vllm"
        rows = read_metrics(folder / "run")[1:]
        bound = 1e-3 if dtype == torch.float32 else 0.1
        assert all(row["rollout/logprob_diff_mean"] < bound for row in rows)
        file, checkpoint = find_evaluated(folder / "run")
        found = evaluate_model(load_config(file), str(checkpoint))
        assert found.keys() <= read_metrics(folder / "run")[-1].keys()


def test_export_adds_the_adapters_to_their_base(finished, tmp_path):
    config, trainer = finished
    output = export_model(Path(config.run), tmp_path / "merged")
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "trainer"}
    exported = AutoModelForCausalLM.from_pretrained(output)
    state = exported.state_dict()
    expected = dict(merged_weights(trainer.policy.model))
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(config.model.path).state_dict()
    moved = [name for name in state if not torch.equal(state[name], base[name])]
    assert len(moved) == 14


def test_export_rounds_the_sum_once(finished, tmp_path):
    config, trainer = finished
    output = export_model(Path(config.run), tmp_path / "narrow", "bfloat16")
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    state = AutoModelForCausalLM.from_pretrained(output).state_dict()
    wide = AutoModelForCausalLM.from_pretrained(export_model(Path(config.run), tmp_path / "wide"))
    for name, tensor in wide.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(state[name], tensor.bfloat16()), name


@pytest.mark.slow
def test_export_in_two_processes(finished, tmp_path):
    """The first one alone has work to do."""
    run, output = Path(finished[0].run), tmp_path / "out"
    done = launched(2, "-m", "recap_fast", "export", str(run), "--output", str(output))
    assert done.returncode == 0, done.stderr
    one = export_model(run, tmp_path / "one")
    for path in one.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list(output.iterdir())) == len(list(one.iterdir()))


def test_export_without_the_base(finished, tmp_path):
    """As where a run was copied to another machine."""
    newest = list_checkpoints(Path(finished[0].run) / "checkpoints")[-1]
    copy = tmp_path / newest.name
    shutil.copytree(newest, copy)
    settings = json.loads((copy / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="gone"):
        export_model(copy, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
