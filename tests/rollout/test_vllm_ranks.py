"""Real vLLM in several processes: an engine for each, or one for all."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from recap_fast.config import TrainConfig, save_config
from recap_fast.report.metrics import read_metrics
from recap_fast.rollout.vllm import why_unavailable
from recap_fast.training.checkpoint import list_checkpoints
from recap_fast.training.distributed import ALONE
from tests.processes import run_ranks
from tests.rollout.conftest import random_llama
from tests.tiny import tiny_config
from tests.tiny_tokenizer import tiny_tokenizer
from tests.training.test_launch import ENDLESS, finished, output_of, started

SETTINGS = (
    "rollout.engine=vllm", "rollout.dtype=float32", "rollout.cpu_kv_cache_gib=0.05",
    "rollout.max_logprob_diff=1e-3", "rollout.group_size=3", "logging.rollouts_per_step=100",
    "data.batch_size=5", "data.mixing={sums: 4, words: 1}", "optimizer.learning_rate=1e-2",
    "training.steps=2", "checkpoint.every=0", "data.max_prompt_tokens=160",
    "data.max_supervised_tokens=160",
)  # fmt: skip
"""So large a rate that an engine with the weights of the step before would show."""
TENSORS = 21


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = why_unavailable(ALONE.device)
    if reason is not None:
        pytest.skip(f"vLLM cannot run here: {reason}")
    folder = tmp_path_factory.mktemp("model")
    random_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(folder: Path, model: Path, processes: int, *overrides: str) -> dict[str, Any]:
    folder.mkdir()
    config = tiny_config(folder, model, *SETTINGS, *overrides)
    save_config(config, folder / "full.yaml")
    script = Path(__file__).with_name("vllm_ranks.py")
    file = str(folder / "full.yaml")
    reports = run_ranks(script, processes, folder, file, timeout=600, vllm=True)
    rows = read_metrics(Path(config.run))
    return {"rows": rows, "reports": reports, "samples": samples(config)}


def samples(config: TrainConfig) -> list[Any]:
    lines = (Path(config.run) / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("alone") / "1", model, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "sharing"),
    [
        (2, 1),
        pytest.param(2, 2, marks=pytest.mark.variant),
        (4, 2),
        pytest.param(4, 4, marks=pytest.mark.variant),
    ],
    ids=["an engine each", "one engine", "two engines of two", "more processes than KV heads"],
)
def test_processes_sample_what_one_samples(
    tmp_path: Path, model: Path, alone: dict[str, Any], processes: int, sharing: int
) -> None:
    several = run(tmp_path / "run", model, processes, f"rollout.tensor_parallel_size={sharing}")
    assert len(alone["samples"]) == 2 * 4 * 3
    assert several["samples"] == alone["samples"]
    for ours, wanted in zip(several["rows"], alone["rows"], strict=True):
        if "rollout/logprob_diff_mean" in wanted:
            assert ours["rollout/logprob_diff_mean"] < 1e-4
            assert ours["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    for report in [*several["reports"], *alone["reports"]]:
        assert report["children"] == [], "an engine has no processes of its own"
        assert report["compared"] == TENSORS
        assert report["stale"] == [TENSORS, []]
        assert report["means"][0] > 1e-2
        assert report["means"][1] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "sharing"),
    [*(pytest.param(*c, marks=pytest.mark.variant) for c in ((1, 1), (2, 1))), (2, 2)],
)
def test_a_stop_of_the_whole_process_group_saves(
    tmp_path: Path, model: Path, processes: int, sharing: int
) -> None:
    """What `timeout`, a terminal and schedulers send: every process of the group gets it."""
    settings = (*SETTINGS, *ENDLESS, f"rollout.tensor_parallel_size={sharing}")
    config = tiny_config(tmp_path, model, *settings, "checkpoint.every=0")
    with started(config, processes) as process:
        os.killpg(process.pid, signal.SIGTERM)
    output = output_of(config)
    step = read_metrics(Path(config.run))[-1]["step"]
    assert f"stopped after step {step}, checkpoint saved" in output.replace("\n", " "), output
    saved = list_checkpoints(Path(config.run) / "checkpoints")
    assert [path.name for path in saved] == [f"step-{step:06d}"]
    assert (process.returncode == 0) == (processes == 1)  # torchrun fails of a signal


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("rollout.tensor_parallel_size=3", "which does not divide the 2 processes"),
        pytest.param(
            "distributed.replicas=1",
            "does not divide the model's 1 attention heads",
            marks=pytest.mark.variant,
        ),
    ],
)
def test_an_engine_that_cannot_be_shared_ends_all(
    tmp_path: Path, model: Path, settings: str, message: str
) -> None:
    if "heads" in message:
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in model.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        fields = json.loads((broken / "config.json").read_text())
        fields |= {"num_attention_heads": 1, "num_key_value_heads": 1}
        (broken / "config.json").write_text(json.dumps(fields))
        model = broken
    config = tiny_config(tmp_path, model, *SETTINGS, "rollout.tensor_parallel_size=2", settings)
    done = finished(config)
    said = (done.stdout + done.stderr).replace("\n", " ")
    assert done.returncode != 0
    assert "exitcode  : 2" in done.stderr
    assert message in " ".join(said.split())
