"""A small model trained through torchrun by several processes of this machine, timed by stage.

`measure` starts them. What torchrun starts is this module, which trains as `recap-fast train` does
and also counts the seconds in which its main thread waits for a collective: that is what other
processes cost a step, the waiting for slower ones included.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.scaling_runs CONFIG
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import distributed as dist

from benchmarks.measuring import provenance
from recap_fast.config import load_config
from recap_fast.model.model_path import resolve_model
from recap_fast.report.metrics import read_metrics
from recap_fast.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
STEPS, UNTIMED = 6, 2
"""The first steps make optimizer state and buffers."""
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
"""A Llama with SmolLM2's vocabulary of 49,152: 7 million parameters."""
_TIMES = ("total", "rollout", "reward", "train", "sync")


def measure(processes: Sequence[int]) -> dict[str, Any]:
    """Trains the same steps with each number of processes, one thread each.

    Returns:
        Provenance, the work, and for each number its fastest timed step.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        runs = [_run(count, model, Path(folder) / f"run-{count}") for count in processes]
    return {
        "provenance": provenance(torch.device("cpu"), "python -m benchmarks.scaling --measure"),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),  # what else the machine did: over 1, 5 and 15 minutes
        "work": settings(Path("run"), Path("model")),
        "model": SMALL,
        "runs": runs,
    }


def make_model(folder: Path) -> Path:
    """Random weights, with the built-in model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m-instruct"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **SMALL,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(run: Path, model: Path) -> dict[str, Any]:
    """A configuration: 4 prompts x 4 rollouts x 16 tokens, and 4 supervised rows, a step."""
    return {
        "run": str(run),
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {
            "batch_size": 8,
            "mixing": {"sums": 1, "words": 1},
            "sources": [
                {"name": "sums", "kind": "rl", "reasoning_gym": "chain_sum", "held_out": 0,
                 "rewards": {"vowels": "tests.tiny_rewards:vowels"}},
                {"name": "words", "kind": "sft", "reasoning_gym": "spell_backward", "held_out": 0},
            ],
        },
        "rollout": {"engine": "transformers", "group_size": 4, "max_new_tokens": 16},
        "training": {"steps": STEPS},
        "evaluation": {"before": False, "after": False},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False, "rollouts_per_step": 0},
    }  # fmt: skip


def _run(processes: int, model: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings(folder / "run", model)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(processes), "-m", "benchmarks.scaling_runs", str(config),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(
            f"{processes} processes failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    ranks = [json.loads((folder / f"waited-{rank}.json").read_text()) for rank in range(processes)]
    return {"processes": processes} | summary(read_metrics(folder / "run"), ranks)


def summary(rows: Sequence[dict[str, Any]], ranks: Sequence[list[dict[str, float]]]) -> Any:
    """The fastest timed step: others' load on the machine makes steps slower, and none faster.

    Args:
        rows: metrics of each step.
        ranks: by rank and step, the seconds of the step and of the update in it, and of waiting.
    """
    fastest = min(range(UNTIMED, len(rows)), key=lambda index: rows[index]["time/total"])
    row, own = rows[fastest], [steps[fastest] for steps in ranks]
    return {
        "tokens_per_second": round(row["tokens_per_second"], 1),
        "seconds": {name: round(row[f"time/{name}"], 3) for name in _TIMES},
        "seconds_of_all_steps": [round(row["time/total"], 3) for row in rows],
        "waiting_share": {
            stage: round(statistics.mean(one[stage] / one[f"{stage}_seconds"] for one in own), 3)
            for stage in ("step", "update")
        },
    }


class _Waiting:
    """Seconds that this process's main thread has spent waiting for collectives."""

    def __init__(self) -> None:
        self.seconds = 0.0
        wait = dist.Work.wait

        def timed(work: Any, *arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return wait(work, *arguments)
            finally:
                self.seconds += time.perf_counter() - started

        dist.Work.wait = timed


class TimedTrainer(Trainer):
    """Notes for each step, and for the update in it, how long it took and how long it waited."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._waiting = _Waiting()
        self.steps: list[dict[str, float]] = []

    def _train_step(self, *arguments: Any) -> Any:
        self.steps.append({})
        return self._timed("step", super()._train_step, *arguments)

    def _learn(self, *arguments: Any) -> Any:
        return self._timed("update", super()._learn, *arguments)

    def _timed(self, stage: str, work: Any, *arguments: Any) -> Any:
        started, waited = time.perf_counter(), self._waiting.seconds
        result = work(*arguments)
        self.steps[-1][f"{stage}_seconds"] = time.perf_counter() - started
        self.steps[-1][stage] = self._waiting.seconds - waited
        return result


def main() -> None:
    """One process's part."""
    config = load_config(sys.argv[1])
    trainer = TimedTrainer(config)
    try:
        trainer.train()
        path = Path(sys.argv[1]).parent / f"waited-{trainer.world.rank}.json"
        path.write_text(json.dumps(trainer.steps))
    finally:
        trainer.close()


if __name__ == "__main__":
    main()
