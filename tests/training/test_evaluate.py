from __future__ import annotations

import pytest
import torch

from recap_fast.data.mix import DataStream
from recap_fast.model.policy import load_policy, load_tokenizer
from recap_fast.rewards.scorer import RewardScorer
from recap_fast.training.evaluate import Evaluator
from recap_fast.types import Rollout
from tests.tiny import save_tiny_model, tiny_config


class EchoEngine:
    """Answers with what it is told, so that the scores are known. Greedy and alone is asserted."""

    def __init__(self, completion: str) -> None:
        self.completion = completion

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
