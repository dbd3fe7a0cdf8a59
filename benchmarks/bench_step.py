"""Times whole GRPO steps through recap-fast and through TRL's GRPOTrainer, side by side.

The work is the same: SmolLM2-135M-Instruct, reasoning-gym's chain_sum, 2 prompts x 8 rollouts x up
to 32 tokens, one AdamW update a step. The reward is a hash of the completion, so that every
rollout carries a gradient in either trainer. Each implementation runs in a process of its own, one
after the other, in rounds; the first steps of each process are not counted.

TRL runs in every setting that this machine allows (float32, bfloat16 autocast, bfloat16 weights,
the latter also in the environment that recap-fast starts itself in, and vLLM in its colocated
mode); the fastest one is what we compare with. Only its float32 and autocast settings keep float32
weights, as recap-fast does: at this learning rate most updates of bfloat16 weights round to 0.

    python benchmarks/bench_step.py [--steps 5] [--rounds 1] [--json PATH]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from recap_fast.rollout.preload import preload_environment

PRELOADED = ", preloaded"
PROMPTS, GROUP, TOKENS, WARMUP = 2, 8, 32, 2
QUESTION = "{question} Put the final answer in <answer> </answer> tags."
TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


def hash_reward(text: str) -> float:
    """A number in [0, 1) that differs between different completions."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def reward_of_sample(sample: Any) -> float:
    """`hash_reward` in recap-fast's form."""
    return hash_reward(sample.completion)


def run_recap(engine: str, steps: int) -> list[dict[str, float]]:
    """Seconds per step and part, from the trainer's own metrics."""
    import yaml

    from recap_fast.config import load_config
    from recap_fast.report.metrics import read_metrics
    from recap_fast.trainer import Trainer

    folder = Path(tempfile.mkdtemp())
    source = {
        "name": "chain_sum", "kind": "rl", "reasoning_gym": "chain_sum", "parameters": TASK,
        "prompt": QUESTION, "rewards": {"hash": "benchmarks.bench_step:reward_of_sample"},
    }  # fmt: skip
    settings = {
        "run": str(folder / "run"),
        "model": {"path": "smollm2-135m-instruct"},
        "data": {"sources": [source], "batch_size": PROMPTS},
        "rollout": {"engine": engine, "group_size": GROUP, "max_new_tokens": TOKENS},
        "training": {"steps": steps + WARMUP},
        "evaluation": {"before": False, "after": False},
        "checkpoint": {"every": 1000},
        "logging": {"tensorboard": False, "rollouts_per_step": 0},
    }
    (folder / "bench.yaml").write_text(yaml.safe_dump(settings))
    trainer = Trainer(load_config(folder / "bench.yaml"))
    trainer.save = lambda: folder  # type: ignore[method-assign]  # no checkpoint of a benchmark
    trainer.train()
    rows = read_metrics(folder / "run")
    trainer.close()
    return [
        {
            "total": row["time/total"],
            "rollout": row["time/rollout"],
            "training": row["time/total"] - row["time/rollout"],
            "tokens": row["rollout/completion_tokens"],
        }
        for row in rows[WARMUP:]
    ]


def run_trl(setting: str, steps: int) -> list[dict[str, float]]:
    """Seconds per step and part, measured around TRL's own methods."""
    import reasoning_gym
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from recap_fast.model.model_path import resolve_model

    path = resolve_model("smollm2-135m-instruct")
    entries = reasoning_gym.create_dataset("chain_sum", seed=0, size=200, **TASK)
    prompts = [
        [{"role": "user", "content": QUESTION.replace("{question}", entry["question"])}]
        for entry in entries
    ]
    lengths: list[float] = []

    def reward(completions: list[Any], completion_ids: list[Any], **kwargs: Any) -> list[float]:
        lengths.append(statistics.mean(len(ids) for ids in completion_ids))
        return [hash_reward(completion[0]["content"]) for completion in completions]

    weights = torch.bfloat16 if setting == "bf16 weights" else torch.float32
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=TOKENS,
        max_steps=steps + WARMUP,
        learning_rate=1e-6,
        bf16=setting == "bf16 autocast",
        gradient_checkpointing=False,  # memory is not short here; recomputing would slow it
        use_vllm=setting == "vllm",
        vllm_mode="colocate",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=weights),
        processing_class=AutoTokenizer.from_pretrained(path),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )
    generation = _timed(trainer, "_generate")
    ends: list[float] = []
    trainer.add_callback(_step_end_callback(ends))
    started = time.perf_counter()
    trainer.train()
    totals = [end - begin for begin, end in zip([started, *ends], ends, strict=False)]
    return [
        {"total": total, "rollout": rollout, "training": total - rollout, "tokens": tokens}
        for total, rollout, tokens in zip(totals, generation, lengths, strict=True)
    ][WARMUP:]


def _timed(owner: Any, name: str) -> list[float]:
    """Wraps a method so that the seconds of each call are collected."""
    times: list[float] = []
    method: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = method(*args, **kwargs)
        times.append(time.perf_counter() - started)
        return result

    setattr(owner, name, wrapper)
    return times


def _step_end_callback(ends: list[float]) -> Any:
    from transformers import TrainerCallback

    class StepEnd(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    return StepEnd()


RUNNERS: dict[str, tuple[Callable[[str, int], list[dict[str, float]]], str]] = {
    "recap-fast, vLLM": (run_recap, "vllm"),
    "recap-fast, transformers": (run_recap, "transformers"),
    "TRL, float32": (run_trl, "float32"),
    "TRL, bf16 autocast": (run_trl, "bf16 autocast"),
    "TRL, bf16 weights": (run_trl, "bf16 weights"),
    f"TRL, bf16 weights{PRELOADED}": (run_trl, "bf16 weights"),
    "TRL, vLLM colocated": (run_trl, "vllm"),
}

FLOAT32_WEIGHTS = ("TRL, float32", "TRL, bf16 autocast")


def measure(name: str, steps: int) -> list[dict[str, float]] | str:
    """Runs one implementation in a fresh process. Returns its steps, or why there are none."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, __file__, "--worker", name, "--steps", str(steps)]
    environment = os.environ | {"PYTHONPATH": str(root), "TRL_EXPERIMENTAL_SILENCE": "1"}
    if not name.startswith("TRL") or name.endswith(PRELOADED):
        # What the recap-fast command does for itself when it starts.
        environment = preload_environment(environment) or environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each process")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", help="substrings of implementations' names")
    parser.add_argument("--worker", choices=RUNNERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        runner, setting = RUNNERS[options.worker]
        print("RESULT " + json.dumps(runner(setting, options.steps)))
        return
    names = [n for n in RUNNERS if not options.only or any(o in n for o in options.only)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    absent: dict[str, str] = {}
    for _ in range(options.rounds):
        for name in names:
            print(f"running {name} ...", file=sys.stderr, flush=True)
            result = measure(name, options.steps)
            if isinstance(result, str):
                absent[name] = result
            else:
                found[name] += result
    summary = {name: _summarise(steps) for name, steps in found.items() if steps}
    _print(summary, absent)
    if options.json:
        options.json.write_text(json.dumps(_record(summary, absent, options), indent=1) + "\n")


def _summarise(steps: list[dict[str, float]]) -> dict[str, float]:
    keys = ("total", "rollout", "training", "tokens")
    return {key: statistics.median(step[key] for step in steps) for key in keys} | {
        "steps": len(steps),
        "slowest": max(step["total"] for step in steps),
        "fastest": min(step["total"] for step in steps),
    }


def _print(summary: dict[str, dict[str, float]], absent: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{PROMPTS} prompts x {GROUP} rollouts x {TOKENS} tokens, median seconds")
    for column in ("implementation", "step", "rollout", "training", "range", "tokens/rollout"):
        table.add_column(column, justify="left" if column == "implementation" else "right")
    for name, row in summary.items():
        cells = [f"{row[key]:.2f}" for key in ("total", "rollout", "training")]
        spread = f"{row['fastest']:.2f}-{row['slowest']:.2f}"
        table.add_row(name, *cells, spread, f"{row['tokens']:.1f}")
    console = Console()
    console.print(table)
    for name, reason in absent.items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    ours = [row["total"] for name, row in summary.items() if name.startswith("recap")]
    trl = {name: row["total"] for name, row in summary.items() if name.startswith("TRL")}
    comparisons = {
        "as TRL starts": [t for name, t in trl.items() if not name.endswith(PRELOADED)],
        "of those with float32 weights": [t for name, t in trl.items() if name in FLOAT32_WEIGHTS],
        "in recap-fast's process environment": [
            t for name, t in trl.items() if name.endswith(PRELOADED)
        ],
    }
    for what, times in comparisons.items():
        if times and ours:
            ratio = min(times) / min(ours)
            console.print(f"fastest TRL / fastest recap-fast, {what}: {ratio:.1f}x")


def _record(summary: Any, absent: Any, options: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    from recap_fast.report.metrics import describe_machine

    return {
        "command": f"python benchmarks/bench_step.py --steps {options.steps}"
        f" --rounds {options.rounds}",
        "date": date.today().isoformat(),
        "machine": describe_machine() | {"cores": os.cpu_count(), "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "trl", "transformers")},
        "seconds": summary,
        "not_measured": absent,
    }


if __name__ == "__main__":
    main()
