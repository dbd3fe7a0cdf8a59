"""Benchmarks by name through EleutherAI's lm-eval or, for vision-language models, lmms-eval.

The harness loads the weights from their folder and does its own prompting and scoring, so that its
scores are those that others publish; none of our engines or rewards take part.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from recap_fast.config import TrainConfig
from recap_fast.model.lora import base_of, is_adapter
from recap_fast.model.model_path import resolve_model
from recap_fast.model.policy import load_tokenizer, model_dtype, pick_device
from recap_fast.types import UserError

Harness = Literal["lm-eval", "lmms-eval"]

_MODULES: dict[Harness, str] = {"lm-eval": "lm_eval", "lmms-eval": "lmms_eval"}
_LMMS_MODELS = {"qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl"}
"""transformers' model types and lmms-eval's names for the classes that run them."""
_OTHER_HARNESS = " (it needs torchvision), or --harness lm-eval for lm-eval's tasks"


class HarnessError(UserError):
    """A benchmark that cannot be run here."""


def evaluate_tasks(
    config: TrainConfig,
    path: str,
    tasks: Sequence[str],
    *,
    harness: Harness | None = None,
    limit: int | None = None,
    task_folder: Path | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Runs a harness's tasks on one model.

    Args:
        path: the model: what `ModelConfig.path` takes, or a checkpoint's folder.
        tasks: the harness's names of tasks or groups.
        harness: None: lmms-eval for the vision-language models that it knows, else lm-eval.
        limit: examples of each task at most; None: all.
        task_folder: folder of further task definitions (YAML).
        batch_size: sequences that the harness runs at a time.

    Returns:
        eval/<task>/<metric> for every number that the harness reports, standard errors included.

    Raises:
        HarnessError: the harness is not installed, does not know a task or the model, or cannot
            reach a task's dataset.
    """
    base = resolve_model(base_of(path))
    adapters = path if is_adapter(path) else None
    kind = _model_type(base)
    harness = harness or ("lmms-eval" if kind in _LMMS_MODELS else "lm-eval")
    module = _MODULES[harness]
    if find_spec(module) is None:
        raise HarnessError(
            f"these tasks need {harness}, which is not installed: pip install {harness}"
            f"{_OTHER_HARNESS if harness == 'lmms-eval' else ''}"
        )
    folder = None if task_folder is None else str(task_folder)
    manager = import_module(f"{module}.tasks").TaskManager(include_path=folder)
    _check_tasks(tasks, manager.all_tasks, harness)
    model, arguments = _model_arguments(harness, kind, base, adapters, config)
    results = _run(
        harness,
        model=model,
        model_args=arguments,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        device=str(pick_device(config.model.device)),
        apply_chat_template=load_tokenizer(base).chat_template is not None,
        log_samples=False,
        random_seed=config.seed,
    )
    return _numbers(results["results"])


def _model_type(path: str) -> str:
    from transformers import AutoConfig

    return str(AutoConfig.from_pretrained(path).model_type)


def _check_tasks(tasks: Sequence[str], known: Sequence[str], harness: Harness) -> None:
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, known, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise HarnessError(f"{harness} knows no task {task!r}{hint}")


def _model_arguments(
    harness: Harness, kind: str, path: str, adapters: str | None, config: TrainConfig
) -> tuple[str, dict[str, Any]]:
    """The harness's name for the model's class, and that class's arguments."""
    if harness == "lm-eval":
        name = "hf-multimodal" if kind in _LMMS_MODELS else "hf"
        peft = {} if adapters is None else {"peft": adapters}
        dtype = str(model_dtype(config.model)).removeprefix("torch.")
        return name, {"pretrained": path, "dtype": dtype, **peft}
    if kind not in _LMMS_MODELS:
        known = ", ".join(_LMMS_MODELS)
        raise HarnessError(f"lmms-eval is wanted for a model of type {kind}; it runs {known} here")
    if adapters is not None:
        raise HarnessError(f"lmms-eval loads whole models, and {adapters} holds LoRA adapters")
    # Its classes load in the checkpoint's own dtype and refuse arguments that they do not know.
    return _LMMS_MODELS[kind], {"pretrained": path}


def _run(harness: Harness, **arguments: Any) -> Mapping[str, Any]:
    evaluator: Any = import_module(f"{_MODULES[harness]}.evaluator")
    # Outside of a repository git would print "fatal: ..." here; no score depends on the answer.
    evaluator.get_git_commit_hash = lambda: None
    if harness == "lmms-eval":
        # Its classes parse a string, and chat models apply their template themselves.
        pairs = arguments.pop("model_args").items()
        arguments["model_args"] = ",".join(f"{name}={value}" for name, value in pairs)
        del arguments["apply_chat_template"]
    try:
        results = evaluator.simple_evaluate(**arguments)
    except ImportError as error:
        first = str(error).strip().splitlines()[0]
        raise HarnessError(f"{harness} cannot load the model here: {first}") from error
    except (ConnectionError, FileNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise HarnessError(
            f"{harness} could not load the data of {', '.join(arguments['tasks'])}: {first}"
        ) from error
    return dict(results)


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """{"task": {"acc,none": 0.5, "acc_stderr,none": 0.1}} -> {"eval/task/acc": 0.5, ...}."""
    found = {}
    for task, metrics in results.items():
        for name, value in metrics.items():
            if isinstance(value, Real) and name != "sample_len":
                metric, _, filtered = name.partition(",")
                suffix = "" if filtered in ("", "none") else f",{filtered}"
                found[f"eval/{task}/{metric}{suffix}"] = float(value)
    return found
