"""One engine behind every source of rollouts: runs in turns are the same, to the bit.

The engine is transformers with weights of its own, asked for one prompt at a time: in the trainer's
thread, or in another one as servers are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recap_fast import trainer as trainer_module
from recap_fast.config import TrainConfig
from recap_fast.model.policy import load_policy
from recap_fast.report.metrics import read_metrics
from recap_fast.rollout.embedded import DetachedEngine
from recap_fast.trainer import Trainer
from recap_fast.training.checkpoint import list_checkpoints
from recap_fast.training.rollout_source import AsynchronousRollouts, SynchronousRollouts
from recap_fast.types import Prompt, Rollout, SamplingSpec
from tests.tiny import save_tiny_model, tiny_config

STEPS = 4
EVEN = (
    "data.sources.0.rewards={even: 'tests.tiny_rewards:even_only', v: 'tests.tiny_rewards:vowels'}"
)
DYNAMIC = "rollout.dynamic_sampling={max_refills: 3}"
FOLLOWING = (
    "data.batch_size=8", "data.mixing=adaptive",
    "data.review={rewards: [even], after: 1, share: 0.5, threshold: 0.9}",
)  # fmt: skip


class InProcess(DetachedEngine):
    """Samples prompt by prompt, whose batches are then the same wherever they are sampled.

    Attributes:
        events: ("weights", version) and ("sample", version) in their order.
    """

    def __init__(self, config: TrainConfig, path: str, tokenizer: Any) -> None:
        super().__init__(
            config.rollout,
            model=load_policy(config.model, path, trainable=False).model,
            tokenizer=tokenizer,
            max_model_len=config.max_rollout_tokens,
        )
        self.events: list[tuple[str, int | None]] = []
        self._version: int | None = None

    def sync_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int = 0
    ) -> None:
        super().sync_weights(named_tensors, policy_version)
        self._version = policy_version
        self.events.append(("weights", policy_version))

    def one(self, prompt: Prompt, sampling: SamplingSpec, index: int) -> list[Rollout]:
        self.events.append(("sample", self._version))
        alone = replace(sampling, groups=(sampling.group(index),))
        found = super().generate([prompt], alone)
        return [replace(one, versions=[self._version or 0] * len(one.token_ids)) for one in found]

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSpec, on_group: Any = None
    ) -> list[Rollout]:
        groups = [self.one(prompt, sampling, index) for index, prompt in enumerate(prompts)]
        for group in groups:
            if on_group is not None:
                on_group(group)
        return [rollout for group in groups for rollout in group]


class Served(InProcess):
    """As servers are asked, and from another thread."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._thread = ThreadPoolExecutor(1)

    def submit(
        self, prompt: Prompt, sampling: SamplingSpec, index: int, priority: int = 0
    ) -> Future[list[Rollout]]:
        return self._thread.submit(self.one, prompt, sampling, index)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingSpec, on_group: Any = None
    ) -> list[Rollout]:
        futures = [self.submit(prompt, sampling, index) for index, prompt in enumerate(prompts)]
        for future in futures:
            if on_group is not None:
                on_group(future.result())
        return [rollout for future in futures for rollout in future.result()]

    def take_metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._thread.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    def build(
        folder: Path, engine: type[InProcess], source: Any, *overrides: str, **options: Any
    ) -> Trainer:
        folder.mkdir(exist_ok=True)
        config = tiny_config(
            folder, model, f"training.steps={STEPS}", "rollout.engine=vllm_server",
            "loss.rollout_is_cap=2.0", "optimizer.learning_rate=0.01",
            "optimizer.warmup_fraction=0", "evaluation.before=false", "evaluation.after=false",
            "logging.rollouts_per_step=1000", "checkpoint.every=1", *overrides,
        )  # fmt: skip

        def start(config: TrainConfig, policy: Any, path: str, tokenizer: Any, *_: Any, **__: Any):
            return engine(config, path, tokenizer)

        monkeypatch.setattr(trainer_module, "start_engine", start)
        monkeypatch.setattr(trainer_module, "make_source", source)
        return Trainer(config, **options)

    return build


def trained(trainer: Trainer) -> dict[str, Any]:
    trainer.train()
    weights = {name: t.clone() for name, t in trainer.policy.model.state_dict().items()}
    trainer.close()
    run = Path(trainer.config.run)
    rows = [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for row in read_metrics(run)
    ]
    return {"weights": weights, "rows": rows, "samples": (run / "samples.jsonl").read_text()}


@pytest.mark.parametrize("dynamic", [False, True])
def test_runs_in_turns_are_equal_to_the_bit(
    dynamic: bool, tmp_path: Path, make: Callable[..., Trainer]
) -> None:
    """Metrics, samples and parameters: in process, served, and by the source that samples ahead,
    by no step at all."""
    more = (EVEN, DYNAMIC, *FOLLOWING) if dynamic else ()
    runs = [
        trained(make(tmp_path / str(place), engine, source, *more))
        for place, (engine, source) in enumerate(
            [
                (InProcess, SynchronousRollouts),
                (Served, SynchronousRollouts),
                (Served, AsynchronousRollouts),
            ]
        )
    ]
    first = runs[0]
    assert len(first["rows"]) == STEPS
    assert all(row["grad_norm"] > 0 for row in first["rows"])
    assert len({row["grad_norm"] for row in first["rows"]}) == STEPS, "the model moves"
    if dynamic:
        assert sum(row["groups/dropped"] for row in first["rows"]) > 0
        assert sum(row["review/sums"] for row in first["rows"]) > 0
        assert len({row["mixing/words"] for row in first["rows"]}) > 1
    for other in runs[1:]:
        assert other["rows"] == first["rows"]
        assert other["samples"] == first["samples"]
        assert other["weights"].keys() == first["weights"].keys()
        for name, tensor in other["weights"].items():
            assert torch.equal(tensor, first["weights"][name]), name


def test_a_resumed_run_has_the_prompts_whose_mix_was_told(
    tmp_path: Path, make: Callable[..., Trainer]
) -> None:
    settings = (
        Served, AsynchronousRollouts, EVEN, *FOLLOWING, "rollout.async.depth=2",
        "optimizer.learning_rate=0.0001", "training.steps=7", "checkpoint.keep=9",
    )  # fmt: skip
    whole = trained(make(tmp_path, *settings))
    assert sum(row["review/sums"] for row in whole["rows"]) > 0
    assert len({row["mixing/words"] for row in whole["rows"]}) > 4
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")[4:]:
        shutil.rmtree(checkpoint)
    resumed = make(tmp_path, *settings, resume=True)
    assert resumed.step == 4
    again = trained(resumed)
    # What was in flight is sampled anew, from other weights: the mix of step 8 would follow that.
    assert prompts(again) == prompts(whole)
    assert again["rows"][:4] == whole["rows"][:4]


def prompts(run: dict[str, Any]) -> list[tuple[int, int]]:
    samples = map(json.loads, run["samples"].splitlines())
    return [(one["step"], one["row"]) for one in samples]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_resumed_run_gives_its_weights_before_it_samples(
    depth: int, tmp_path: Path, make: Callable[..., Trainer]
) -> None:
    source = AsynchronousRollouts if depth else SynchronousRollouts
    # Of a small rate: tokens of older weights would stop the run at a mismatch otherwise.
    slow = "optimizer.learning_rate=0.0001"
    settings = (Served, source, f"rollout.async.depth={depth}", slow)
    trainer = make(tmp_path, *settings, "training.steps=3")
    trained(trainer)
    assert trainer.engine.events[0] == ("weights", 0)

    resumed = make(tmp_path, *settings, "training.steps=5", resume=True)
    assert resumed.step == 3
    trained(resumed)
    events = resumed.engine.events
    assert events[0] == ("weights", 3)
    sampled = [version for kind, version in events if kind == "sample"]
    assert min(sampled) == 3, "nothing is sampled from what the engine started with"
    assert depth or set(sampled) == {3, 4}
