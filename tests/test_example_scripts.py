"""The examples that are programs: each runs, and does what its docstring says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from recap_fast.model.errors import ModelError
from tests.example_modules import example
from tests.processes import ROOT, report, run_ranks
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


def test_own_loop(capsys: pytest.CaptureFixture[str]) -> None:
    by_class, ink, odd = example("own_loop").main().tolist()
    assert by_class < 0.3  # log(10) = 2.3 before
    assert ink < 0.01
    assert odd > 0.8  # a guess is right half the time
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step  30   class")
    weights = [float(part.split(")")[0]) for part in last.split("(weight ")[1:]]
    assert sum(weights) == pytest.approx(3, abs=0.02)
    assert weights != [1.0, 1.0, 1.0]


STEPS = 6  # two more than the window of 2 + 2 takes to fill


def trained(model: Path, folder: Path, rows: int, accumulation: int, **more: Any) -> Any:
    """The Trainer of the example after a few steps of `rows * accumulation` rows a process."""
    trainer = example("hf_trainer").make_trainer(
        model,
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.05,
        optim="sgd",  # AdamW would make much of rounding
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
    trainer.train()
    return trainer


KEYS = [f"{key}/{name}" for key in ("loss", "weight") for name in ("sums", "reversal")]


def logged(trainer: Any) -> list[list[float]]:
    return [[row[key] for key in ("loss", *KEYS)] for row in trainer.state.log_history[:STEPS]]


def weights_of(trainer: Any) -> Tensor:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process, one batch of 6 rows a step."""
    return trained(tiny_model, tmp_path_factory.mktemp("whole"), 6, 1)


def test_hf_trainer_starts_from_the_plain_losses(whole: Any, tiny_model: Path) -> None:
    """The first step's losses are means of transformers' cross-entropy over each source's tokens,
    of the rows that the step had."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(whole.args.seed)
    trainer = example("hf_trainer").make_trainer(
        tiny_model, str(whole.args.output_dir), per_device_train_batch_size=6, use_cpu=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    by_token = cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    ).view(6, -1)
    counted = batch["labels"][:, 1:] != -100
    assert set(batch["source"].tolist()) == {0, 1}
    expected = [
        (by_token[batch["source"] == k].sum() / counted[batch["source"] == k].sum()).item()
        for k in range(2)
    ]
    loss, *losses = logged(whole)[0][:3]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-3)  # the Trainer's own is rounded


def test_hf_trainer_logs_the_weights(whole: Any) -> None:
    rows = torch.tensor(logged(whole))
    weights = rows[:, 3:]
    torch.testing.assert_close(weights.sum(1), torch.full((STEPS,), 2.0))
    assert weights[:3].eq(1).all()  # not yet 2 W values
    assert weights[3:].ne(1).all()


def test_hf_trainer_accumulates_gradients_exactly(
    whole: Any, tiny_model: Path, tmp_path: Path
) -> None:
    parts = trained(tiny_model, tmp_path, 3, 2)
    torch.testing.assert_close(torch.tensor(logged(parts)), torch.tensor(logged(whole)))
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # three more starts of transformers
@pytest.mark.variant
def test_hf_trainer_in_two_processes_equals_one(
    whole: Any, tiny_model: Path, tmp_path: Path
) -> None:
    reports = run_ranks(Path(__file__), 2, tmp_path, str(tiny_model), str(tmp_path / "out"))
    for got in reports:
        torch.testing.assert_close(torch.tensor(got["logged"]), torch.tensor(logged(whole)))
        torch.testing.assert_close(
            torch.tensor(got["weights"]), weights_of(whole), rtol=1e-4, atol=1e-6
        )


def test_hf_trainer_as_it_is_called(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example("hf_trainer").main(str(tiny_model), str(tmp_path))
    lines = [line for line in capsys.readouterr().out.splitlines() if "'weight/sums'" in line]
    assert len(lines) == 10


def test_hf_trainer_evaluates_unweighted(whole: Any) -> None:
    rows = example("hf_trainer").make_rows(whole.data_collator.tokenizer, 8)
    loss = whole.evaluate(rows)["eval_loss"]
    assert 0 < loss < 20


@pytest.fixture
def adapted(tiny_model: Path) -> Any:
    """A model with adapters that are not zero, as after some steps."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(base, config)


def test_lora_changes_the_adapters_alone(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = example("lora").main(str(tiny_model), steps=4, num_prompts=2)
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    learned = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            learned += "lora_B" in name and bool(parameter.any())  # zero before
        else:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[plain]), name
    assert learned > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("accuracy")[0] for line in lines] == [f"step  {n}   " for n in range(1, 5)]


def test_lora_learns_what_the_unfused_loss_teaches(
    adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("lora")
    ids = torch.randint(5, 40, (16, 9))
    mask = torch.ones_like(ids)
    mask[3, :2] = 0  # padded on the left
    targets = torch.full_like(ids, -100)
    targets[:, 4:8] = ids[:, 5:9]
    targets[2, 6:] = -100
    rewards, weights = torch.rand(16, 2), torch.tensor([0.6, 1.4])

    def no_weight_gradient(*_: Any) -> None:
        raise AssertionError("the frozen head got a gradient")

    monkeypatch.setattr("recap_fast.ops.chunked._accumulate_weight", no_weight_gradient)
    output = module.policy_loss(adapted, ids, mask, targets, rewards, weights)
    output.loss.backward()
    got = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}

    logits = adapted(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits
    counted = targets != -100
    logprobs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    groups = rewards.view(2, 8, 2)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    by_sequence = (advantages.view(16, 2) * weights).mean(1)
    plain = -((logprobs - logprobs.detach()).exp() * by_sequence[:, None])[counted].sum()
    loss = plain / counted.sum()
    expected = torch.autograd.grad(loss, [adapted.get_parameter(name) for name in got])
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(output.logprobs.view(16, 9)[counted], logprobs[counted])
    for name, gradient in zip(got, expected, strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.any()
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    "where", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=list
)
def test_lora_on_the_head_is_refused(tiny_model: Path, where: dict[str, list[str]]) -> None:
    """peft's wrapped head shows the weight below its adapter."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**({"target_modules": ["q_proj"]} | where)))
    ids = torch.ones(8, 3, dtype=torch.int64)
    with pytest.raises(ModelError, match="a linear layer, without LoRA"):
        example("lora").policy_loss(model, ids, ids, ids, torch.rand(8, 2), torch.ones(2))


@pytest.mark.slow  # tests/ops/test_wrappers.py has its parts, at less than a start of two processes
def test_fsdp2_as_it_is_called(tiny_model: Path, tmp_path: Path) -> None:
    """Two processes, and one with all rows, print the same losses and weights."""
    printed = []
    for processes, rows in ((2, 4), (1, 8)):
        code = "from tests.example_modules import example\nexample('fsdp2').main("
        code += f"{str(tiny_model)!r}, steps=6, rows={rows}, learning_rate=3e-3)"
        script = tmp_path / "run.py"
        script.write_text(code, encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), str(script)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        assert len(lines) == 6
        printed.append([float(x) for x in re.findall(r"nan|\d+\.\d+", " ".join(lines))])
    assert printed[0] == pytest.approx(printed[1], abs=0.011, nan_ok=True)
    first, last = torch.tensor(printed[0]).view(6, 3, 2)[[0, -1]]  # loss and weight by objective
    assert (last[:, 0] < first[:, 0] - 0.2).all()
    assert first[:, 1].eq(1).all()
    assert last[:, 1].ne(1).any()


if __name__ == "__main__":
    finished = trained(Path(sys.argv[1]), Path(sys.argv[2]), 3, 1)
    report(logged=logged(finished), weights=weights_of(finished).tolist())
