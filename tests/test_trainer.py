from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from recap_fast.config import ConfigError, load_config
from recap_fast.model.errors import ModelError
from recap_fast.ops import combined_advantages, group_advantages
from recap_fast.report.metrics import read_metrics
from recap_fast.report.page import write_report
from recap_fast.rollout.protocol import SamplingStoppedError
from recap_fast.trainer import Trainer
from recap_fast.training.checkpoint import CheckpointError, list_checkpoints
from recap_fast.training.rollout_source import sampling_of
from recap_fast.training.run_folder import lock_folder
from recap_fast.types import UserError, WeightSyncError
from tests.tiny import save_tiny_model, tiny_config
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def train(config, **kwargs):
    trainer = Trainer(config, **kwargs)
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer


def without_times(rows):
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for row in rows
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(folder, model, "evaluation.every=2")
    return config, train(config)


def test_metrics_have_every_documented_key(finished):
    config, _ = finished
    rows = read_metrics(Path(config.run))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    rewards, objectives = ["length", "vowels"], ["length", "vowels", "ntp"]
    expected = {f"{kind}/{name}" for kind in ("reward", "zero_std_fraction") for name in rewards}
    expected |= {
        f"{kind}/{name}"
        for kind in ("weight", "rate", "instability", "loss")
        for name in objectives
    }
    expected |= {f"time/{part}" for part in ("rollout", "reward", "train", "sync", "total")}
    expected |= {
        "tokens_per_second", "rollout/logprob_diff_mean", "rollout/logprob_diff_max",
        "grad_norm", "lr",
    }  # fmt: skip
    for row in rows[1:]:
        assert expected <= row.keys()
        assert row["time/total"] >= row["time/rollout"] + row["time/train"]
        assert row["rollout/logprob_diff_mean"] < 1e-4
        assert row["skipped_updates"] == 0
        mean = np.mean([row[f"weight/{name}"] for name in objectives])
        assert mean == pytest.approx(1, abs=1e-5)
    evaluated = [row["step"] for row in rows if "eval/sums/length" in row]
    assert evaluated == [0, 2, 4]
    assert rows[0]["eval/words/loss"] == pytest.approx(math.log(100), abs=2)
    assert 0 <= rows[0]["eval/words/token_accuracy"] <= 1


def test_weights_move_and_supervised_losses_lag_by_one_step(finished):
    """With W = 1 an objective is ready at its second value: rewards at step 2, the supervised
    loss, whose value of step t is known in step t + 1, at step 3."""
    rows = read_metrics(Path(finished[0].run))
    assert rows[1]["weight/length"] == 1
    assert rows[2]["rate/ntp"] is None
    assert rows[2]["rate/length"] is not None
    assert rows[2]["weight/length"] != 1
    assert rows[3]["rate/ntp"] == pytest.approx(rows[1]["loss/ntp"] / rows[2]["loss/ntp"], rel=1e-4)


def test_learning_happens(tmp_path, model):
    """The supervised loss falls within a few steps."""
    config = tiny_config(tmp_path, model, "training.steps=12", "optimizer.learning_rate=1e-2",
                         "rollout.max_logprob_diff=null")  # fmt: skip
    train(config)
    losses = [row["loss/ntp"] for row in read_metrics(tmp_path / "run")[1:]]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5


def test_checkpoint_holds_the_trained_weights(finished):
    config, trainer = finished
    newest = list_checkpoints(Path(config.run) / "checkpoints")[-1]
    assert newest.name == "step-000004"
    loaded = AutoModelForCausalLM.from_pretrained(newest)
    for name, tensor in trainer.policy.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_run_folder_is_complete(finished):
    config, _ = finished
    run = Path(config.run)
    assert load_config(run / "config.yaml") == config
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {1, 2, 3, 4}


_KILLED = """
import os, sys
from recap_fast.config import load_config
from recap_fast.model.errors import ModelError
from recap_fast.training.run_folder import lock_folder
from recap_fast.trainer import Trainer
from recap_fast.types import UserError, WeightSyncError
trainer = Trainer(load_config(sys.argv[1]))
start = trainer.scorer.start
def start_or_die(*args):
    if trainer.step == 5:
        os.kill(os.getpid(), 9)
    return start(*args)
trainer.scorer.start = start_or_die
trainer.train()
"""


@pytest.mark.slow
def test_resume_after_kill_equals_an_unbroken_run(tmp_path, model):
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    settings = ["training.steps=10", "checkpoint.every=5", "reweighting.parameters.window=2"]
    for folder in (broken, unbroken):
        folder.mkdir()
        tiny_config(folder, model, *settings)
    config = tiny_config(unbroken, model, *settings)
    train(config)

    config = tiny_config(broken, model, *settings)
    file = broken / "full.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(file)], cwd=ROOT, capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert read_metrics(broken / "run")[-1]["step"] == 5
    trainer = train(config, resume=True)
    assert trainer.step == 10
    resumed, expected = (without_times(read_metrics(f / "run")) for f in (broken, unbroken))
    assert resumed == expected


def test_balanced_weights_are_those_of_the_pulls_before_and_survive_a_stop(tmp_path, model):
    settings = ["reweighting.balance=gradient", "reweighting.measure_gradients_every=2",
                "training.steps=4"]  # fmt: skip
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    for folder in (whole, parts):
        folder.mkdir()
    train(tiny_config(whole, model, *settings))
    expected = without_times(read_metrics(whole / "run"))
    names = ["length", "vowels", "ntp"]
    assert [expected[1][f"balance/{name}"] for name in names] == pytest.approx([0.95, 1, 1.05])
    pulls = np.array([expected[1][f"gradient_norm/{name}"] for name in names])
    factors = np.array([expected[2][f"balance/{name}"] for name in names])
    assert (pulls > 0).all()  # or the factors below would not follow from them alone
    inverse = 1 / pulls
    np.testing.assert_allclose(factors / factors.mean(), inverse / inverse.mean(), rtol=1e-4)
    for row in expected[1:]:  # lambda, as it enters the loss
        for name in names:
            product = row[f"unbalanced_weight/{name}"] * row[f"balance/{name}"]
            assert row[f"weight/{name}"] == pytest.approx(product)
        assert sum(row[f"weight/{name}"] for name in names) == pytest.approx(3)
    measured = ["parameter_gradient_norm/ntp" in row for row in expected[1:]]
    assert measured == [True, False, True, False]

    # The learning rate's schedule is that of the whole run in both.
    config = tiny_config(parts, model, *settings, "checkpoint.every=2")
    trainer = Trainer(config)
    save = trainer._start_saving
    trainer._start_saving = lambda: None if trainer.step > 2 else save()
    trainer.train()
    trainer.close()
    train(config, resume=True)
    assert without_times(read_metrics(parts / "run")) == expected


def test_a_parameter_of_the_method_is_refused_before_the_model_is_loaded(
    tmp_path, model, monkeypatch
):
    monkeypatch.setattr("recap_fast.trainer.load_sharded_policy", None)
    config = tiny_config(tmp_path, model, "reweighting.parameters={retention: -1}")
    with pytest.raises(ConfigError, match="reweighting: retention must be .* got -1"):
        Trainer(config)


def test_rows_after_the_checkpoint_are_dropped_on_resume(tmp_path, model):
    config = tiny_config(tmp_path, model, "training.steps=3", "checkpoint.every=2")
    trainer = Trainer(config)
    start = trainer._start_saving
    trainer._start_saving = lambda: None if trainer.step == 3 else start()
    trainer.train()
    trainer.close()
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3
    before = without_times(read_metrics(tmp_path / "run"))
    train(config, resume=True)
    assert without_times(read_metrics(tmp_path / "run")) == before


def test_adaptive_shares_and_reviews_go_on_to_the_bit(tmp_path, model):
    settings = ["training.steps=8", "checkpoint.every=4", "data.batch_size=8",
                "data.mixing=adaptive", "data.adaptive.most=4.0",
                "data.review={rewards: [vowels], after: 1, share: 0.5, threshold: 0.12}",
                "evaluation.before=false", "evaluation.after=false"]  # fmt: skip
    config = tiny_config(tmp_path, model, *settings)
    train(config)
    rows = without_times(read_metrics(tmp_path / "run"))
    for row, before in zip(rows[1:], rows, strict=False):
        assert row["mixing/sums"] + row["mixing/words"] == pytest.approx(1)
        moved = row["mixing/words"] - before["mixing/words"]
        pull = (row["weight/length"] + row["weight/vowels"]) / 2
        assert moved * (row["weight/ntp"] - pull) >= 0 or abs(moved) < 0.01, "up with its weight"
    assert len({row["mixing/words"] for row in rows}) > 4
    assert sum(row["review/sums"] for row in rows) >= 4
    assert {row["review_solved/sums"] for row in rows} > {None}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000008")
    samples = (tmp_path / "run" / "samples.jsonl").read_text()
    assert train(config, resume=True).step == 8
    assert without_times(read_metrics(tmp_path / "run")) == rows
    assert (tmp_path / "run" / "samples.jsonl").read_text() == samples


def test_resuming_a_finished_run_is_refused_unless_more_is_asked_for(finished, tmp_path):
    config, _ = finished
    with pytest.raises(CheckpointError, match="finished: 4 of 4"):
        Trainer(config, resume=True)


def test_more_steps_continue_a_finished_run(tmp_path, model):
    train(tiny_config(tmp_path, model, "training.steps=2"))
    trainer = train(tiny_config(tmp_path, model, "training.steps=3"), resume=True)
    assert trainer.step == 3
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_folder_of_another_run_is_not_overwritten(finished):
    with pytest.raises(ConfigError, match="--overwrite"):
        Trainer(finished[0])


def test_two_processes_do_not_train_in_one_folder(tmp_path, model):
    config = tiny_config(tmp_path, model)
    folder = Path(config.run)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder), pytest.raises(ConfigError, match="another process is training in"):
        Trainer(config)
    Trainer(config).close()


def test_resume_without_a_run(tmp_path, model):
    with pytest.raises(CheckpointError, match="no run to resume"):
        Trainer(tiny_config(tmp_path, model), resume=True)


def test_resume_with_other_objectives_is_refused(tmp_path, model):
    train(tiny_config(tmp_path, model, "training.steps=2"))
    other = tiny_config(tmp_path, model, "training.steps=4", "data.sources.1.objective=other")
    with pytest.raises(ConfigError, match="other"):
        Trainer(other, resume=True)


@pytest.mark.slow
def test_sigterm_saves_and_exits_0(tmp_path, model):
    tiny_config(tmp_path, model)
    command = [sys.executable, "-m", "recap_fast.cli", "train", str(tmp_path / "tiny.yaml"),
               "--set", "training.steps=10000", "--set", "checkpoint.every=0"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 90
    while time.time() < deadline and not (
        metrics.exists() and len(metrics.read_text().splitlines()) > 3
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "checkpoint saved" in output
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{last:06d}"
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("when", ["while rollouts are generated", "while they are scored"])
def test_interrupted_step_gives_its_rows_back(tmp_path, model, when):
    """A signal before the update leaves no trace of the step."""
    config = tiny_config(tmp_path, model, "training.steps=3")
    trainer = Trainer(config)
    start = trainer.scorer.start
    completed = []

    def interrupt(*args):
        scoring = start(*args)
        if trainer.step == 1 and when == "while rollouts are generated":
            os.kill(os.getpid(), signal.SIGTERM)
        elif trainer.step == 1:
            table = scoring.table
            scoring.table = lambda: (os.kill(os.getpid(), signal.SIGTERM), table())[1]
        scoring.table = partial(recorded, scoring.table)
        return scoring

    def recorded(table):
        completed.append(trainer.step)
        return table()

    trainer.scorer.start = interrupt
    assert trainer.train() is False
    trainer.close()
    assert trainer.step == 1
    assert completed.count(1) == (when == "while they are scored")
    resumed = train(config, resume=True)
    other = tmp_path / "unbroken"
    other.mkdir()
    train(tiny_config(other, model, "training.steps=3"))
    assert resumed.step == 3
    assert without_times(read_metrics(tmp_path / "run")) == without_times(
        read_metrics(other / "run")
    )


@pytest.mark.parametrize("last", [2, 3])
def test_a_stop_that_leaves_the_engine_without_weights_saves_the_step(tmp_path, model, last):
    """Its servers are gone: neither the step nor, after the last one, an evaluation waits."""
    config = tiny_config(tmp_path, model, "training.steps=3", "evaluation.before=false",
                         "evaluation.after=true", "evaluation.every=0")  # fmt: skip
    trainer = Trainer(config)
    heeded = []
    sync = trainer.engine.sync_weights

    def give_up(*_, **__):
        raise SamplingStoppedError("no server is there")

    def sync_weights(weights, version):
        if version < last:
            return sync(weights, version)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heeded[-1] == [signal.SIGTERM]
        trainer.engine.generate = give_up
        return give_up()

    trainer.engine.heed = heeded.append
    trainer.engine.sync_weights = sync_weights
    assert trainer.train() is (last == 3)
    trainer.close()
    assert trainer.step == last
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints[-1].name == f"step-{last:06d}"
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["step"] == last
    assert not any(name.startswith("eval/") for name in rows[-1])
    if last < 3:
        assert train(config, resume=True).step == 3


def test_a_step_whose_weights_do_not_reach_the_engine_is_not_trained_again(tmp_path, model):
    config = tiny_config(tmp_path, model, "training.steps=3")
    trainer = Trainer(config)
    sync = trainer.engine.sync_weights

    def sync_weights(weights, version):
        if version == 2:
            raise WeightSyncError("no server is left")
        sync(weights, version)

    trainer.engine.sync_weights = sync_weights
    with pytest.raises(WeightSyncError, match="no server is left"):
        trainer.train()
    trainer.close()
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-000002"
    train(config, resume=True)
    other = tmp_path / "unbroken"
    other.mkdir()
    train(tiny_config(other, model, "training.steps=3"))
    assert without_times(read_metrics(tmp_path / "run")) == without_times(
        read_metrics(other / "run")
    )


def test_absent_objectives_push_nothing(tmp_path, model):
    """Every other step has no rollouts, the rest no supervised rows: windows see real values."""
    config = tiny_config(tmp_path, model, "data.batch_size=1", "training.steps=6",
                         "evaluation.before=false", "evaluation.after=false")  # fmt: skip
    trainer = Trainer(config)
    pushed = []
    update = trainer.reweighter.update

    def record(values, *args, **kwargs):
        pushed.append(values.tolist())
        return update(values, *args, **kwargs)

    trainer.reweighter.update = record
    trainer.train()
    trainer.close()
    rows = read_metrics(tmp_path / "run")
    had_rollouts = [row["reward/length"] is not None for row in rows]
    assert sorted(set(had_rollouts)) == [False, True]
    for step, values in enumerate(pushed):
        for k, name in enumerate(["length", "vowels"]):
            expected = rows[step][f"reward/{name}"]
            assert math.isnan(values[k]) if expected is None else values[k] == expected
        before = rows[step - 1]["loss/ntp"] if step else None
        assert math.isnan(values[2]) if before is None else values[2] == pytest.approx(before)
    assert any(math.isnan(values[2]) for values in pushed[1:])


def test_losses_do_not_depend_on_how_rows_are_dealt(tmp_path, model):
    """Without learning, the supervised loss of a step is the same over 1, 2 and 4 updates."""
    losses, diffs = [], []
    for count in (1, 2, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        config = tiny_config(folder, model, f"training.updates_per_rollout={count}",
                             "optimizer.learning_rate=1e-12", "training.steps=1",
                             "evaluation.before=false", "evaluation.after=false")  # fmt: skip
        train(config)
        (row,) = read_metrics(folder / "run")
        losses.append(row["loss/ntp"])
        diffs.append(row["rollout/logprob_diff_max"])
        assert row["entropy"] > 1
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    assert diffs == pytest.approx([diffs[0]] * 3, rel=0.2, abs=1e-5)


def test_overwrite_removes_only_what_a_run_wrote_and_only_when_all_is_well(tmp_path, model):
    config = tiny_config(tmp_path, model, "training.steps=1", "evaluation.before=false")
    train(config)
    thesis = tmp_path / "run" / "thesis.txt"
    thesis.write_text("mine")
    broken = tiny_config(tmp_path, model, "model.path=/no/such/model")
    with pytest.raises(ModelError):
        Trainer(broken, overwrite=True)
    assert len(read_metrics(tmp_path / "run")) == 1
    with pytest.raises(ConfigError, match="one of them"):
        Trainer(config, overwrite=True, resume=True)
    config = tiny_config(tmp_path, model, "training.steps=2", "evaluation.before=false")
    train(config, overwrite=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    assert thesis.read_text() == "mine"


def test_failing_evaluation_loses_no_step(tmp_path, model):
    config = tiny_config(tmp_path, model, "training.steps=2", "evaluation.before=false",
                         "checkpoint.every=0")  # fmt: skip
    trainer = Trainer(config)

    def fail(*args):
        raise UserError("no evaluation today")

    monkey = pytest.MonkeyPatch()
    monkey.setattr("recap_fast.training.evaluate.Evaluator.run", fail)
    with pytest.raises(UserError, match="today"):
        trainer.train()
    monkey.undo()
    trainer.close()
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-000002"


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_checkpoint_that_fails_is_tried_again_at_the_next_step(
    tmp_path, model, monkeypatch, caplog
):
    config = tiny_config(tmp_path, model, "evaluation.before=false", "evaluation.after=false")
    trainer = Trainer(config)
    monkeypatch.setattr("recap_fast.training.safetensors_writer.write_at", full_disk)
    log = trainer._log

    def free_the_disk_at_step_3(view, row):
        log(view, row)
        if row["step"] == 3:
            monkeypatch.undo()

    trainer._log = free_the_disk_at_step_3
    assert trainer.train()
    trainer.close()
    names = [path.name for path in list_checkpoints(trainer.run_dir / "checkpoints")]
    assert names == ["step-000003", "step-000004"]
    assert sum("step-000002: cannot be written" in r.getMessage() for r in caplog.records) == 1


def test_a_run_whose_last_checkpoint_fails_is_no_success(tmp_path, model, monkeypatch):
    config = tiny_config(tmp_path, model, "training.steps=1", "evaluation.before=false",
                         "evaluation.after=false")  # fmt: skip
    trainer = Trainer(config)
    monkeypatch.setattr("recap_fast.training.safetensors_writer.write_at", full_disk)
    none = "step-000001: cannot be written: .*No space.*; there is no whole checkpoint, so"
    with pytest.raises(CheckpointError, match=none):
        trainer.train()
    trainer.close()


def test_an_error_is_not_hidden_by_a_checkpoint_that_fails_too(tmp_path, model, monkeypatch):
    config = tiny_config(tmp_path, model, "training.steps=2", "evaluation.before=false")
    trainer = Trainer(config)

    def fail(*args):
        raise UserError("no evaluation today")

    monkeypatch.setattr("recap_fast.training.evaluate.Evaluator.run", fail)
    monkeypatch.setattr("recap_fast.training.safetensors_writer.write_at", full_disk)
    with pytest.raises(UserError, match="today"):
        trainer.train()
    trainer.close()


def test_a_tokenizer_that_cannot_be_saved_is_found_before_training(tmp_path, model, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full_disk)
    with pytest.raises(CheckpointError, match="cannot be written: .*No space"):
        Trainer(tiny_config(tmp_path, model))


def test_a_model_with_dropout_and_sampling_settings(tmp_path):
    """Its pass is that of the sampler, to the rounding, and its checkpoint can be loaded."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=1024,
            bos_token_id=1, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
        )
    )  # fmt: skip
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.9, "top_p": 0.6}))
    config = tiny_config(
        tmp_path, tmp_path / "gpt2", "training.steps=1", "evaluation.before=false",
        "evaluation.after=false", "model.reference=initial", "loss.kl_coef=0.01",
        "model.gradient_checkpointing=true",
    )  # fmt: skip
    trainer = train(config)
    row = read_metrics(trainer.run_dir)[-1]
    assert abs(row["kl"]) < 1e-6
    assert row["rollout/logprob_diff_max"] < 1e-4
    saved = list_checkpoints(trainer.run_dir / "checkpoints")[-1]
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.generation_config.temperature in (None, 1.0)


@pytest.mark.parametrize("reward", ["constant", "none"])
def test_steps_without_a_signal_measure_nothing_and_say_so(tmp_path, model, caplog, reward):
    config = tiny_config(tmp_path, model, "training.steps=2", "evaluation.before=false",
                         "evaluation.after=false")  # fmt: skip
    (source, _) = config.data.sources
    rewards = {"constant": f"tests.tiny_rewards:{reward}"}
    only = source.model_copy(update={"rewards": rewards, "held_out": 0})
    data = config.data.model_copy(update={"sources": [only], "mixing": "uniform"})
    trainer = train(config.model_copy(update={"data": data}))
    for row in read_metrics(trainer.run_dir):
        for name in ("entropy", "kl", "grad_norm", "clip_fraction/constant",
                     "rollout/logprob_diff_mean", "rollout/logprob_diff_max"):  # fmt: skip
            assert row[name] is None, name
        assert row["train/packed_tokens"] == row["skipped_updates"] == 0
        assert row["rollout/completion_tokens"] > 0
    assert [r for r in caplog.records if "no step of 2 learnt anything" in r.getMessage()]
    page = write_report(trainer.run_dir).read_text()
    assert "steps that trained nothing" in page


def test_a_run_that_learns_is_not_said_to_have_learnt_nothing(tmp_path, model, caplog):
    config = tiny_config(tmp_path, model, "training.steps=1", "evaluation.before=false",
                         "evaluation.after=false")  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # the caller's, which is none of the trainer's business
    try:
        trainer = train(config)
    finally:
        torch.set_default_dtype(before)
    (row,) = read_metrics(trainer.run_dir)
    assert not [r for r in caplog.records if "learnt anything" in r.getMessage()]
    config = tiny_config(tmp_path, model, "training.steps=1", "evaluation.before=false",
                         "evaluation.after=false", f"run={tmp_path / 'again'}")  # fmt: skip
    (again,) = read_metrics(train(config).run_dir)
    assert without_times([row]) == without_times([again])


def test_run_that_cannot_be_a_folder(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run:"):
        Trainer(tiny_config(tmp_path, model, f"run={tmp_path / 'file' / 'run'}"))


@pytest.mark.parametrize(
    "change",
    ["reweighting.method=dwa", "reweighting.parameters.window=2", "reweighting.balance=gradient"],
    ids=str,
)
def test_resume_with_another_reweighting_is_refused(finished, model, tmp_path, change):
    run = f"run={finished[0].run}"
    more = ["evaluation.every=2", "training.steps=9", run]
    method = ["reweighting.parameters={}"] if "method" in change else []
    wanted = r"^reweighting\.(method|parameters|balance): .* was trained with .* does not fit"
    with pytest.raises(ConfigError, match=wanted):
        Trainer(tiny_config(tmp_path, model, *more, *method, change), resume=True)


def test_gradients_can_be_measured_from_a_resume_on(finished, model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0].run, run)
    more = [f"run={run}", "training.steps=9", "reweighting.measure_gradients_every=1"]
    before = load_config(run / "config.yaml")
    trainer = Trainer(tiny_config(tmp_path, model, "evaluation.every=2", *more), resume=True)
    try:
        assert before.reweighting.measure_gradients_every == 0
        assert trainer.config.reweighting.measure_gradients_every == 1
    finally:
        trainer.close()


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "settings",
    [
        ["training.updates_per_rollout=2"],
        ["training.updates_per_rollout=2", "loss.rollout_is_cap=2.0"],
        ["loss.kl_coef=0.05", "model.reference=initial"],
        ["loss.aggregation=sequence", "loss.loss_type=cispo", "loss.rollout_is_cap=2.0"],
        ["loss.ratio_level=sequence", "training.updates_per_rollout=2"],
        ["model.dtype=bfloat16", "rollout.dtype=float32", "rollout.max_logprob_diff=null"],
        ["model.gradient_checkpointing=true"],
        ["advantages.normalize=leave_one_out", "loss.entropy_coef=0.01"],
        ["reweighting={method: uniform, advantages: gdpo}", "training.updates_per_rollout=2"],
        ["data.mixing={sums: 1}"],
        ["data.mixing={words: 1}"],
        ["training.max_tokens=540", "data.batch_size=12", "data.max_prompt_tokens=500"],
    ],
    ids=lambda value: value[0],
)
def test_settings_train(tmp_path, model, settings):
    config = tiny_config(tmp_path, model, "training.steps=2", "evaluation.after=false",
                         "evaluation.before=false", *settings)  # fmt: skip
    trainer = train(config)
    rows = read_metrics(tmp_path / "run")
    assert trainer.step == len(rows) == 2
    assert rows[0]["grad_norm"] > 0
    assert rows[0]["skipped_updates"] == 0


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "method", ["uniform", "dwa", "rlw", "uw", "scale_invariant", "famo", "saw", "static"]
)
def test_every_reweighter_trains(tmp_path, model, method):
    settings = [f"reweighting.method={method}", "reweighting.parameters={}"]
    if method == "static":
        settings[1] = "reweighting.parameters={weights: {length: 1, vowels: 2, ntp: 3}}"
    config = tiny_config(tmp_path, model, "evaluation.after=false", "evaluation.before=false",
                         "training.steps=3", *settings)  # fmt: skip
    train(config)
    row = read_metrics(tmp_path / "run")[-1]
    weights = [row[f"weight/{name}"] for name in ("length", "vowels", "ntp")]
    assert np.mean(weights) == pytest.approx(1, abs=1e-5)
    if method == "static":
        assert weights == pytest.approx([0.5, 1.0, 1.5])


@pytest.mark.parametrize("combination", ["group", "gdpo", "gd2po", "dvao"])
def test_advantages_of_a_whole_step_are_combined(tmp_path, model, combination):
    """With the weights of the method, before the step's groups are dealt to its updates; the
    supervised objective has no part in it."""
    config = tiny_config(
        tmp_path, model, "training.updates_per_rollout=2", "reweighting.method=static",
        "reweighting.parameters={weights: {length: 1, vowels: 2, ntp: 3}}",
        f"reweighting.advantages={combination}",
    )  # fmt: skip
    trainer = Trainer(config)
    rows = trainer.stream.next_step()
    rollouts = trainer.engine.generate(rows.prompts, sampling_of(config, 0))
    rewards = np.random.default_rng(0).normal(size=(len(rollouts), 3)).astype(np.float32)
    rewards[:, 2] = rewards[0, 1] = np.nan
    groups = torch.tensor([rollout.group for rollout in rollouts])
    table = torch.from_numpy(rewards)
    if combination == "group":
        wanted = group_advantages(table, groups)
    else:
        weights = torch.tensor([0.5, 1.0, 1.5])
        wanted = combined_advantages(table, groups, weights, method=combination)
    got = trainer._advantages(rollouts, rewards)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(rewards))
    np.testing.assert_array_equal(got, np.where(np.isnan(rewards), np.nan, wanted.numpy()))
    updates = trainer._pack(rows.supervised, rollouts, got)
    dealt = torch.cat([update.advantages for update in updates])
    assert (~dealt.isnan()).any(1).sum() == len(rollouts)
    assert sorted(dealt[~dealt.isnan()].tolist()) == sorted(got[~np.isnan(got)].tolist())
    trainer.close()


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("reweighting.parameters={windw: 3}", "'window'"),
        ("reweighting.parameters={signals: loss}", "signals"),
        ("reweighting.parameters={window: 0}", "window"),
        (
            "reweighting={method: static, parameters: {weights: {length: a, vowels: 1, ntp: 1}}}",
            "reweighting",
        ),
    ],
)
def test_wrong_reweighting_parameters(tmp_path, model, setting, word):
    with pytest.raises(ConfigError, match=word):
        Trainer(tiny_config(tmp_path, model, setting))


def test_static_weights_need_every_objective(tmp_path, model):
    config = tiny_config(tmp_path, model, "reweighting.method=static",
                         "reweighting.parameters={weights: {length: 1}}")  # fmt: skip
    with pytest.raises(ConfigError, match="vowels"):
        Trainer(config)
