from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from recap_fast.cli import app
from recap_fast.config import ConfigError, save_config
from recap_fast.data.mix import DataStream
from recap_fast.model.policy import load_policy, load_tokenizer
from recap_fast.rewards.scorer import RewardScorer
from recap_fast.training.evaluate import Evaluator, evaluate_model
from recap_fast.types import Rollout
from tests.processes import ROOT
from tests.tiny import save_tiny_model, tiny_config


class EchoEngine:
    """Answers with what it is told, so that the scores are known. Greedy and alone is asserted."""

    ranks = 1

    def __init__(self, completion: str) -> None:
        self.completion = completion

    def any_rank(self, here: bool) -> bool:
        return here

    def generate(self, prompts, sampling, on_group):
        assert (sampling.n, sampling.temperature) == (1, 0.0)
        count = len(self.completion)
        rollouts = [
            Rollout(prompt, group, [7] * count, [0.0] * count, "length", self.completion)
            for group, prompt in enumerate(prompts)
        ]
        for rollout in rollouts:
            on_group([rollout])
        return rollouts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    model = save_tiny_model(folder / "model")
    config = tiny_config(folder, model)
    stream = DataStream(config.data, load_tokenizer(str(model)), config.seed)
    policy = load_policy(config.model, str(model))
    with RewardScorer(config.data.sources, config.objectives, config.rewards) as scorer:
        yield config, policy, scorer, stream


def test_scores_of_known_completions(parts):
    config, policy, scorer, stream = parts
    metrics = Evaluator(config, policy, EchoEngine("aaab"), scorer, stream).run()
    assert metrics["eval/sums/vowels"] == pytest.approx(3 / 8)
    assert metrics["eval/sums/length"] == pytest.approx(2 / 10)
    assert metrics["eval/sums/completion_tokens"] == 4
    assert "eval/words/vowels" not in metrics


def test_supervised_loss_equals_one_row_at_a_time(parts):
    config, policy, scorer, stream = parts
    metrics = Evaluator(config, policy, EchoEngine("a"), scorer, stream).run()
    loss, hits, count = 0.0, 0, 0
    policy.model.set_attn_implementation("sdpa")
    for row in stream.held_out("words"):
        ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            logits = policy.model(ids).logits[0, row.num_prompt_tokens - 1 : -1]
        targets = ids[0, row.num_prompt_tokens :]
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        hits += (logits.argmax(-1) == targets).sum().item()
        count += len(targets)
    policy.model.set_attn_implementation("recap_packed")
    assert metrics["eval/words/loss"] == pytest.approx(loss / count, rel=1e-4)
    assert metrics["eval/words/token_accuracy"] == pytest.approx(hits / count)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path, parts):
    """And say it once."""
    config = parts[0]
    save_config(config, tmp_path / "full.yaml")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "recap_fast", "eval", str(tmp_path / "full.yaml"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("eval/")]
    wanted = evaluate_model(config, config.model.path)
    assert [name for name, _ in lines] == list(wanted)
    for name, value in lines:
        assert float(value) == pytest.approx(wanted[name], abs=1e-4)


def test_what_one_process_cannot_evaluate(tmp_path, parts, monkeypatch):
    config = parts[0]
    save_config(config, tmp_path / "full.yaml")
    sharing = ("rollout.engine=vllm", "rollout.tensor_parallel_size=2")
    alone = tiny_config(tmp_path, config.model.path, *sharing)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, .* not divide the 1 process"):
        evaluate_model(alone, config.model.path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = CliRunner().invoke(app, ["eval", str(tmp_path / "full.yaml"), "--task", "gsm8k"])
    assert isinstance(found.exception, ConfigError)
    assert "without torchrun" in str(found.exception)
