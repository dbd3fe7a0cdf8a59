"""The forgetting experiment on text: SmolLM2-135M-Instruct learns sums by reinforcement.

Three methods: reinforcement on the sums alone, and with replay of two other abilities, weighted
uniformly or by RECAP. The other abilities are products, rewarded when they are right, and
instructions, answered by the base model itself before anything is trained. Those answers are
sampled at temperature 1, so their next-token loss is least for the base: what it rises by is the
divergence of the model from its base where nobody asked for a change. All three are evaluated on
held-out rows before, during and after, whether a method trains on them or not.

No format is rewarded: a model of this size soon finds that repeating a request for <answer> tags
has them in it, and stops computing.

With `--replay` few rows are replayed, and the methods are those of the same experiment on images
(recap_fast.reproduce.replay).

    recap-fast reproduce text --quick
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from recap_fast.config import ModelConfig, RolloutConfig, TrainConfig, merge
from recap_fast.report.history import RunHistory
from recap_fast.report.metrics import describe_machine, read_metrics
from recap_fast.reproduce.experiment import with_window
from recap_fast.reproduce.grid import Cell, make_output, run_grid
from recap_fast.reproduce.intervals import interval, markdown
from recap_fast.reproduce.replay import Sources, method_changes

METHODS = ("reasoning-only", "uniform", "recap")
SCARCE_METHODS = ("uniform", "recap", "together")
"""Where `TextSettings.replay` is set: of recap_fast.reproduce.replay."""
SCORES = {
    "sums accuracy": "eval/sums/accuracy",
    "products accuracy": "eval/products/product_accuracy",
    "instructions loss": "eval/instructions/loss",
    "instructions token accuracy": "eval/instructions/token_accuracy",
}
_BY_PURPOSE = Sources("sums", ("products", "instructions"), ["accuracy", "product_accuracy"])
_INSTRUCTION_TOKENS = 64
_TOPICS = (
    "rain", "bread", "the moon", "bicycles", "honey", "rivers", "chess", "glass", "sleep", "cats",
    "paper", "music", "volcanoes", "tea", "bridges", "whales", "winter", "clocks", "gardens",
    "salt", "trains", "mirrors", "the heart", "maps", "gold", "snow", "owls", "soap", "deserts",
    "candles", "forests", "coffee", "the sun", "books", "wheels", "fire", "bees", "ships", "milk",
    "stars",
)  # fmt: skip
_INSTRUCTIONS = (
    "Explain in one sentence why people care about {topic}.",
    "Write one sentence about {topic} for a child.",
    "Give one fact about {topic}.",
    "Ask me one question about {topic}.",
)


@dataclass(frozen=True, slots=True)
class TextSettings:
    """The grid and the lengths of its runs."""

    model: str = "smollm2-135m-instruct"
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    seeds: int = 1
    steps: int = 60
    batch_size: int = 12
    group_size: int = 8
    max_new_tokens: int = 24
    learning_rate: float = 2e-5
    evaluate_every: int = 20
    held_out: int = 48
    topics: int = len(_TOPICS)
    window: int = 5
    """RECAP's: half the paper's, as the runs are an eighth of the paper's."""
    review_after: int = 15
    """`data.review.after`: a quarter of the run, as on images."""
    replay: int | None = None
    """Percent of all rows that are replayed, by SCARCE_METHODS. None: two thirds, by METHODS."""


FULL = TextSettings()
QUICK = TextSettings(
    steps=2,
    batch_size=3,
    group_size=2,
    evaluate_every=1,
    held_out=4,
    topics=4,
    window=4,
    review_after=1,
)
"""Shows that everything works, and nothing else."""


def run_text(output: Path, settings: TextSettings, *, jobs: int) -> str:
    """Runs what is missing of the experiment into `output`, and returns its table.

    Raises:
        UserError: stopped, a run failed, or the folder holds another experiment.
    """
    make_output(output)
    console = Console(stderr=True)
    instructions = output / "instructions.jsonl"
    if not instructions.exists():
        console.print("the base answers the instructions")
        rows = answer_instructions(settings.model, settings.topics)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        instructions.write_text(text, encoding="utf-8")
    cells = [
        Cell(method, seed, run_config(settings, instructions, output, method, seed))
        for seed in range(settings.seeds)
        for method in (METHODS if settings.replay is None else SCARCE_METHODS)
    ]
    run_grid(cells, jobs, console)
    results = collect_scores(cells)
    table = render_scores(results)
    content = {"settings": asdict(settings), "machine": describe_machine(), "scores": results}
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(table, encoding="utf-8")
    return table


def run_config(
    settings: TextSettings, instructions: Path, output: Path, method: str, seed: int
) -> TrainConfig:
    """The configuration of one run; `method` is one of METHODS or SCARCE_METHODS."""
    common = {
        "run": str(output / method / f"seed-{seed}"),
        "seed": seed,
        "model": {"path": settings.model},
        "data": {
            "sources": _sources(settings, instructions),
            "batch_size": settings.batch_size,
            "max_prompt_tokens": 192,
            "max_supervised_tokens": 192,
        },
        "rollout": {
            "engine": settings.engine,
            "group_size": settings.group_size,
            "max_new_tokens": settings.max_new_tokens,
        },
        "rewards": {"workers": 1},
        "optimizer": {"learning_rate": settings.learning_rate},
        "training": {"steps": settings.steps},
        "evaluation": {"every": settings.evaluate_every},
        "checkpoint": {"every": settings.evaluate_every, "keep": 1},
        "logging": {"tensorboard": False},
    }
    content = merge(common, _changes(settings, method))
    return TrainConfig.model_validate(with_window(content, settings.window))


def _changes(settings: TextSettings, method: str) -> dict[str, Any]:
    if settings.replay is not None:
        changes = method_changes(method, settings.replay, _BY_PURPOSE)
        if "review" in changes["data"]:
            changes["data"]["review"]["after"] = settings.review_after
        return changes
    alone = {"sums": 1.0, "products": 0.0, "instructions": 0.0}
    return {
        "data": {"mixing": alone if method == "reasoning-only" else "uniform"},
        "reweighting": {"method": "recap" if method == "recap" else "uniform"},
    }


def _sources(settings: TextSettings, instructions: Path) -> list[dict[str, Any]]:
    rewarded = {"kind": "rl", "size": 4000, "held_out": settings.held_out}
    one_digit = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return [
        {
            "name": "sums",
            "reasoning_gym": "chain_sum",
            "parameters": one_digit,
            "rewards": {"accuracy": "accuracy"},
            **rewarded,
        },
        {
            "name": "products",
            "reasoning_gym": "products",
            "parameters": one_digit,
            "rewards": {"product_accuracy": "accuracy"},
            "replay": True,
            **rewarded,
        },
        {
            "name": "instructions",
            "kind": "sft",
            "path": str(instructions.resolve()),
            "held_out": settings.held_out,
        },
    ]


def answer_instructions(model: str, topics: int) -> list[dict[str, str]]:
    """Rows {"question", "answer"}: instructions on the first topics, answered by `model`.

    Sampled at temperature 1 with a fixed seed. Answers that do not end within 64 tokens are left
    out.
    """
    from recap_fast.data.prompts import ChatRenderer
    from recap_fast.model.model_path import resolve_model
    from recap_fast.model.policy import load_policy, load_tokenizer
    from recap_fast.rollout.factory import make_engine
    from recap_fast.types import Prompt, SamplingSpec

    path = resolve_model(model)
    tokenizer = load_tokenizer(path)
    renderer = ChatRenderer(tokenizer)
    questions = [
        instruction.format(topic=topic)
        for topic, instruction in itertools.product(_TOPICS[:topics], _INSTRUCTIONS)
    ]
    prompts = [
        Prompt("instructions", row, renderer.prompt([{"role": "user", "content": q}]), q, None, {})
        for row, q in enumerate(questions)
    ]
    policy = load_policy(ModelConfig(path=model), path)
    engine = make_engine(
        RolloutConfig(engine="transformers"),
        model=policy.model,
        model_path=path,
        tokenizer=tokenizer,
        max_model_len=256,
        seed=0,
        device=policy.device,
    )
    sampling = SamplingSpec(n=1, max_new_tokens=_INSTRUCTION_TOKENS, temperature=1.0, seed=0)
    rollouts = engine.generate(prompts, sampling)
    return [
        {"question": rollout.prompt.text, "answer": rollout.text.strip()}
        for rollout in rollouts
        if rollout.finish_reason == "stop" and rollout.text.strip()
    ]


def collect_scores(cells: Sequence[Cell]) -> dict[str, dict[str, list[list[float]]]]:
    """For each method and score, [seeds][evaluations], from before the run to after it."""
    results: dict[str, dict[str, list[list[float]]]] = {}
    for cell in cells:
        history = RunHistory(read_metrics(cell.folder))
        scores = results.setdefault(cell.method, {label: [] for label in SCORES})
        for label, key in SCORES.items():
            scores[label].append(history.series(key)[1].tolist())
    return results


def render_scores(results: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> str:
    """Markdown: a row before training, then one a method; means with deviations over seeds.

    With several seeds a second table has how much each method's last scores lie above Uniform's of
    the same seed: the mean, with its 95 % interval.
    """
    first = next(iter(results.values()))
    rows = [_row(method, scores, -1) for method, scores in results.items()]
    tables = markdown(["", *SCORES], [_row("before", first, 0), *rows])
    uniform, seeds = results.get("uniform"), len(next(iter(first.values())))
    if uniform is None or seeds < 2:
        return tables
    differences = [
        [
            method,
            *(interval(_at(scores, k, -1) - _at(uniform, k, -1)).ends() for k in SCORES),
        ]
        for method, scores in results.items()
        if method != "uniform"
    ]
    return tables + "\n" + markdown(["above Uniform, paired", *SCORES], differences)


def _row(name: str, scores: Mapping[str, Sequence[Sequence[float]]], at: int) -> list[str]:
    return [name, *(_cell(_at(scores, label, at)) for label in SCORES)]


def _at(scores: Mapping[str, Sequence[Sequence[float]]], label: str, at: int) -> np.ndarray:
    """A score of each seed [S] at evaluation `at`; nan of runs without any."""
    return np.array([run[at] if run else math.nan for run in scores[label]])


def _cell(values: np.ndarray) -> str:
    deviation = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{deviation}"
