"""Prints the memory tables of docs/scaling.md: the paper's run at four sizes on 1, 8 and 64 GPUs,
and with less of the optimizer on them.

python tools/memory_tables.py
"""

from __future__ import annotations

from pathlib import Path

from recap_fast.config import load_config
from recap_fast.model.shapes import load_shapes
from recap_fast.training.memory_plan import GIB, MemoryPlan, plan_memory

CONFIG = Path(__file__).resolve().parent.parent / "examples" / "recap-qwen2.5-vl-7b-hybrid.yaml"
SIZES, GPUS, MEMORY = ("3B", "7B", "32B", "72B"), (1, 8, 64), 79.6
TRAINED = ("masters", "gradients", "optimizer state")
ENGINE = ("engine weights", "engine KV cache", "engine graphs")


def tables() -> str:
    """Markdown: a table a model, a line a number of GPUs, GiB a GPU."""
    found = []
    for size in SIZES:
        model = f"Qwen/Qwen2.5-VL-{size}-Instruct"
        config = load_config(CONFIG, [f"model.path={model}"])
        shapes = load_shapes(model)
        plans = [plan_memory(config, shapes, gpus, int(MEMORY * GIB)) for gpus in GPUS]
        modes = ", ".join(
            f"{mode} {value / GIB:.1f}" for mode, value in plans[0].activations.items()
        )
        found += [
            f"**{model.partition('/')[2]}**: {shapes.text_parameters / 1e9:.2f} billion parameters "
            f"and {shapes.tower_parameters / 1e9:.2f} in the tower; "
            f"{shapes.kv_bytes() / 1e3:.1f} KB of KV cache a token; activations of a pass by "
            f"checkpointing: {modes} GiB.",
            "",
            "| GPUs | masters, gradients, AdamW | tower | engine weights | KV cache | load | "
            "rollouts | training pass | weight sync | fits |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
            *(_line(plan) for plan in plans),
            "",
        ]
    return "\n".join(found).rstrip() + "\n"


def savings() -> str:
    """Markdown: the paper's own model by optimizer state and offload, a column a number of GPUs."""
    gpus = (1, 2, 4, 8)
    heads = " | ".join(f"on {count}" for count in gpus)
    found = [
        f"| optimizer.state | model.offload | {heads} |",
        f"|---|---|{'---:|' * len(gpus)}",
    ]
    for offload in ("false", "true"):
        for state in ("float32", "bfloat16", "8bit"):
            settings = [f"optimizer.state={state}", f"model.offload={offload}"]
            config = load_config(CONFIG, settings)
            shapes = load_shapes(config.model.path)
            plans = [plan_memory(config, shapes, count, int(MEMORY * GIB)) for count in gpus]
            cells = "".join(f" {_need(plan)} |" for plan in plans)
            found.append(f"| {state} | {offload} |{cells}")
    return "\n".join(found) + "\n"


def _need(plan: MemoryPlan) -> str:
    need = f"{plan.total / GIB:.1f}"
    return f"{f'**{need}**' if plan.fits else need}, {plan.host_total / GIB:.1f}"


def _line(plan: MemoryPlan) -> str:
    parts = {part.name: part.bytes for part in plan.parts}
    cells = [
        sum(parts[name] for name in TRAINED),
        *(parts[name] for name in ("frozen tower", "engine weights", "engine KV cache")),
        *(plan.stage_total(stage) for stage in plan.stages),
    ]
    return (
        f"| {plan.world_size} | {' | '.join(f'{c / GIB:.1f}' for c in cells)} | {_verdict(plan)} |"
    )


def _verdict(plan: MemoryPlan) -> str:
    if plan.fits:
        return "yes"
    return "no: engine" if plan.problem else "no"


if __name__ == "__main__":
    print(tables(), savings(), sep="\n", end="")
