"""The forgetting experiment on digit scenes: what reinforcement on one task does to the others.

From one base, every method trains on `range` (reasoning) for the same number of steps of the same
number of rows; all but the first replay `locate` (grounding) and `transcribe` (OCR). Held-out
scores of all three are taken before, during and after, over several seeds.

    recap-fast reproduce digits --quick
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recap_fast.config import TrainConfig, merge
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.reproduce.digits import PROMPTS, BaseSettings
from recap_fast.reproduce.grid import Cell
from recap_fast.types import UserError

_WINDOWED = ("recap", "dwa", "saw")
_MAX_TOKENS = 160  # of a prompt; the scenes' longest has about 80


class ExperimentError(UserError):
    """An experiment that cannot be run."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to keep, or not to keep, what reinforcement does not train."""

    label: str
    mixing: str | dict[str, float] = "uniform"
    reweighter: str = "uniform"
    parameters: dict[str, Any] = field(default_factory=dict)
    """Of the reweighter, beside the window."""
    kl_coef: float = 0.0
    length: float = 1.0
    """Of its runs, in those of the others."""


_COMPARED: dict[str, Method] = {
    "reasoning-only": Method("Reasoning only", mixing={"range": 1.0}),
    "propmix": Method("PropMix", mixing="proportional"),
    "uniform": Method("Uniform"),
    "coreset": Method("Coreset", mixing="coreset"),
    "lwf": Method("LwF", kl_coef=0.01),
    "recap": Method("RECAP", reweighter="recap"),
    "dwa": Method("DWA", reweighter="dwa"),
    "rlw": Method("RLW", reweighter="rlw"),
    "uw": Method("UW", reweighter="uw"),
    "saw": Method("SAW", reweighter="saw"),
}
_FURTHER: dict[str, Method] = {
    "lwf-0.001": Method("LwF, KL 0.001", kl_coef=0.001),
    "lwf-0.1": Method("LwF, KL 0.1", kl_coef=0.1),
    "uniform-1.5": Method("Uniform, 1.5 x steps", length=1.5),
    "uniform-2": Method("Uniform, 2 x steps", length=2.0),
    "recap-c": Method("RECAP, c alone", reweighter="recap", parameters={"alpha": 1.0}),
    "recap-i": Method("RECAP, i alone", reweighter="recap", parameters={"alpha": 0.0}),
    "recap-w4": Method("RECAP, W = 4", reweighter="recap", parameters={"window": 4}),
    "recap-t1": Method("RECAP, T = 1", reweighter="recap", parameters={"temperature": 1.0}),
    # In the objectives' order: accuracy, thinking format, IoU, answer format, next-token loss.
    "iou-3": Method("IoU x 3", reweighter="static", parameters={"weights": [1, 1, 3, 1, 1]}),
}
METHODS = _COMPARED | _FURTHER
"""The paper's method and baselines, and reweighters in RECAP's place. Each reweighter has its own
defaults, and all share one learning rate: nothing is tuned for one of them. Then what readers of
the paper asked for (another KL, more steps), and what tells why RECAP does what it does: its parts,
and a fixed weight for what is forgotten, which knows the answer beforehand."""
COMPARED = tuple(_COMPARED)
"""The ten methods of the comparison, with equal steps."""

_SOURCES: tuple[dict[str, Any], ...] = (
    {
        "name": "range",
        "kind": "rl",
        "size": 12_000,
        "rewards": {"accuracy": "accuracy", "thinking_format": "thinking_format"},
    },
    {
        "name": "locate",
        "kind": "rl",
        "size": 3_000,
        "rewards": {"iou": "iou", "answer_format": "answer_format"},
        "replay": True,
    },
    {"name": "transcribe", "kind": "sft", "size": 1_500, "answer": "worked", "objective": "ntp"},
)
"""Sizes matter to PropMix alone: as in the paper, reasoning has by far the most rows."""


@dataclass(frozen=True, slots=True)
class ExperimentSettings:
    """A grid and the lengths of its runs."""

    base: BaseSettings = field(default_factory=BaseSettings)
    methods: tuple[str, ...] = COMPARED
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    batch_size: int = 12
    group_size: int = 8
    learning_rate: float = 5e-4
    evaluate_every: int = 50
    held_out: int = 256
    window: int = 10
    """RECAP's, DWA's and SAW's, in steps."""


def run_config(
    settings: ExperimentSettings, base: Path, output: Path, method: str, seed: int
) -> TrainConfig:
    """The configuration of one run.

    Raises:
        ExperimentError: no method has that name.
    """
    if method not in METHODS:
        raise ExperimentError(f"no method {method!r}; there are {', '.join(METHODS)}")
    chosen = METHODS[method]
    changes = {
        "model": {"reference": "initial" if chosen.kl_coef else None},
        "data": {"mixing": chosen.mixing},
        "loss": PolicyLossConfig(kl_coef=chosen.kl_coef),
        "reweighting": {"method": chosen.reweighter, "parameters": chosen.parameters},
        "training": {"steps": round(chosen.length * settings.steps)},
    }
    return configure(settings, base, output / method / f"seed-{seed}", seed, changes)


def configure(
    settings: ExperimentSettings, base: Path, run: Path, seed: int, changes: Mapping[str, Any]
) -> TrainConfig:
    """What all runs have in common, with `changes` over it; they name the reweighter."""
    sources = [
        {
            **source,
            "digit_scenes": source["name"],
            "images": "image",
            "prompt": PROMPTS[source["name"]],
            "held_out": settings.held_out,
        }
        for source in _SOURCES
    ]
    common = {
        "run": str(run),
        "seed": seed,
        "model": {"path": str(base), "dtype": "float32", "train_vision": True},
        "data": {
            "sources": sources,
            "batch_size": settings.batch_size,
            "max_prompt_tokens": _MAX_TOKENS,
            "max_supervised_tokens": _MAX_TOKENS,
        },
        "rollout": {
            "engine": "transformers",
            "group_size": settings.group_size,
            "max_new_tokens": 20,
        },
        "rewards": {"workers": 1},
        "optimizer": {"learning_rate": settings.learning_rate},
        "training": {"steps": settings.steps},
        "evaluation": {"every": settings.evaluate_every},
        "checkpoint": {"every": settings.evaluate_every, "keep": 1},
        "logging": {"tensorboard": False},
    }
    return TrainConfig.model_validate(with_window(merge(common, dict(changes)), settings.window))


def with_window(content: dict[str, Any], window: int) -> dict[str, Any]:
    """A configuration whose reweighter looks back `window` steps, if it looks back at all."""
    reweighting = content["reweighting"]
    if reweighting["method"] not in _WINDOWED:
        return content
    parameters = {"window": window} | reweighting.get("parameters", {})
    return content | {"reweighting": reweighting | {"parameters": parameters}}


def grid(settings: ExperimentSettings, base: Path, output: Path) -> list[Cell]:
    """All runs, seed by seed, so that a grid that was cut short has every method."""
    return [
        Cell(method, seed, run_config(settings, base, output, method, seed))
        for seed in settings.seeds
        for method in settings.methods
    ]
