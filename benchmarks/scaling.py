"""Many GPUs: a table and a figure of what a step is predicted to take, and what processes measure.

    python -m benchmarks.scaling [--models 7B 72B] [--gpus 8 64] [--set network=2e11] [--figure PNG]
    python -m benchmarks.scaling --check
    python -m benchmarks.scaling --measure [--processes 1 2 4] [--json FILE]
    python -m benchmarks.scaling --constants

The prediction (`benchmarks.scaling_model` says how it is made) is of H100s in nodes of 8. Two
loads: "weak", 8 prompts x 8 rollouts a GPU, and "strong", 512 prompts x 8 rollouts in all. HSDP
shards over one node, or over the fewest that hold the model. Nothing of it has been measured on a
GPU.

--measure trains a small model through torchrun with 1, 2 and 4 processes on this machine's CPU, and
--check holds the model against what others have published.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.scaling_model import (
    NODE,
    SHAPES,
    Machine,
    Shape,
    Work,
    decode_step,
    fewest_replicas_apart,
    fits,
    step_seconds,
    train_seconds,
)

GPUS = (8, 16, 32, 64, 128, 256, 512)
SECONDS = (10, 20, 50, 100, 200)
"""Marks of the figure."""
WEAK_PROMPTS, STRONG_PROMPTS = 8, 512


@dataclass(frozen=True)
class Row:
    """A predicted step."""

    model: str
    load: str
    sharding: str
    gpus: int
    seconds: dict[str, float]
    tokens_per_second: float  # of completions, on one GPU
    efficiency: float  # against the fewest GPUs that hold the model


def predict(machine: Machine, models: Sequence[str], gpus: Sequence[int]) -> list[Row]:
    """Every model, load and sharding on the numbers of GPUs that hold it."""
    return [
        row
        for name in models
        for load in ("weak", "strong")
        for row in _scaled(machine, SHAPES[name], load, gpus)
    ]


def _scaled(machine: Machine, shape: Shape, load: str, gpus: Sequence[int]) -> Iterator[Row]:
    first = None
    for count in gpus:
        work = Work(WEAK_PROMPTS * count if load == "weak" else STRONG_PROMPTS)
        replicas = fewest_replicas_apart(machine, shape, work, count)
        for sharding, copies in (("FSDP", 1), ("HSDP", replicas)):
            if (sharding == "HSDP" and copies == 1) or not fits(machine, shape, work, count):
                continue
            seconds = step_seconds(machine, shape, replace(work, replicas=copies), count)
            speed = work.rollouts * work.completion_tokens / seconds["total"] / count
            first = first or speed
            yield Row(shape.name, load, sharding, count, seconds, speed, speed / first)


def table(rows: Sequence[Row]) -> str:
    """As Markdown. Seconds by part; "exposed" is what communication adds to the update."""
    parts = ("rollout", "rewards", "exchange", "compute", "exposed", "optimizer", "sync", "total")
    lines = [
        f"| model | load | sharding | GPUs | {' | '.join(parts)} | tokens/s a GPU | efficiency |",
        "| --- " * (len(parts) + 6) + "|",
    ]
    for row in rows:
        cells = " | ".join(f"{row.seconds[part]:.2f}" for part in parts)
        lines.append(
            f"| {row.model} | {row.load} | {row.sharding} | {row.gpus} | {cells} | "
            f"{row.tokens_per_second:.0f} | {row.efficiency:.2f} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Time a step and efficiency against GPUs, for both loads."""
    import matplotlib.pyplot as plt

    from recap_fast.report.plot_style import COLOURS, DPI, MUTED, STYLE

    models = list(dict.fromkeys(row.model for row in rows))
    titles = {
        "weak": f"{WEAK_PROMPTS} prompts a GPU",
        "strong": f"{STRONG_PROMPTS} prompts in all",
    }
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
        for column, (load, title) in enumerate(titles.items()):
            for colour, model in zip(COLOURS, models, strict=False):
                for sharding, line in (("FSDP", "-"), ("HSDP", ":")):
                    own = [
                        r for r in rows if (r.model, r.load, r.sharding) == (model, load, sharding)
                    ]
                    style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3.5}
                    label = model if sharding == "FSDP" else None
                    x = [row.gpus for row in own]
                    grid[0, column].plot(x, [r.seconds["total"] for r in own], label=label, **style)
                    grid[1, column].plot(x, [r.efficiency for r in own], label=label, **style)
            _label(grid[0, column], title, "seconds a step (predicted)")
            _label(grid[1, column], "", "tokens/s a GPU, of the fewest GPUs'")
            grid[0, column].set_yscale("log")
            grid[0, column].set_yticks(SECONDS, [str(seconds) for seconds in SECONDS])
            grid[0, column].set_ylim(8, 200)
            grid[0, column].minorticks_off()
            grid[1, column].set_xlabel("H100s")
        grid[0, 1].plot([], [], color=MUTED, linestyle=":", label="HSDP")
        grid[0, 1].legend(ncols=2, loc="upper right")
        grid[1, 0].set_ylim(0.85, 1.005)
        grid[1, 1].set_ylim(0, 1.05)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def _label(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [str(count) for count in GPUS])
    axes.minorticks_off()


# ---- what others have published


@dataclass(frozen=True)
class Published:
    """A figure of somebody else's, and the model's for the same work."""

    what: str
    source: str
    measured: float
    predicted: float
    bounds: tuple[float, float]
    """Of predicted / measured: outside of them the model does not hold."""

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


LLAMA_3_8B = Shape("Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256)
LLAMA_2_7B = Shape("Llama-2-7B", 4096, 32, 32, 32, 11008, 32000)


def _update_speed(machine: Machine, shape: Shape, work: Work, gpus: int) -> float:
    """Tokens a second on one GPU, of an update alone."""
    tokens = work.rollouts * work.completion_tokens / gpus
    return tokens / sum(train_seconds(machine, shape, work, gpus).values())


def published(machine: Machine) -> list[Published]:
    """Where the model can be held against something; GPUs of others, and code of others."""
    titan = Work(16, group=1, prompt_tokens=0, completion_tokens=8192, recompute=0.5)
    few = _update_speed(machine, LLAMA_3_8B, titan, 8)
    many = _update_speed(machine, LLAMA_3_8B, replace(titan, prompts=256), 128)
    ibm = Work(192, group=1, prompt_tokens=0, completion_tokens=4096, recompute=0, replicas=12)
    benchmarks = "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
    return [
        Published("8B, FSDP2, 8 H100: tokens/s a GPU", benchmarks, 5762, few, (0.8, 1.25)),
        Published(
            "the same, 128 GPUs of 8", benchmarks, 5605 / 5762, many / few, (0.95, 1.05)
        ),
        Published(
            "7B, HSDP, 96 H100: tokens/s a GPU",
            "foundation-model-stack/fms-fsdp README.md",
            7500,
            _update_speed(machine, LLAMA_2_7B, ibm, 96),
            (0.7, 1.35),
        ),
        Published(
            "72B, vLLM on 2 H100s: ms a token of one sequence",
            "tenstorrent/tt-inference-server#143",
            30.9,
            1e3 * decode_step(machine, SHAPES["72B"], 1, 128, 2),
            (0.85, 1.15),
        ),
    ]  # fmt: skip


def check(machine: Machine) -> tuple[str, bool]:
    """The comparison as Markdown, and whether all of it is within its bounds."""
    found = published(machine)
    lines = ["| what | published | model | ratio | source |", "| --- | --- | --- | --- | --- |"]
    for one in found:
        lines.append(
            f"| {one.what} | {one.measured:.4g} | {one.predicted:.4g} | {one.ratio:.2f} | "
            f"{one.source} |"
        )
    holds = all(one.bounds[0] <= one.ratio <= one.bounds[1] for one in found)
    return "\n".join(lines), holds


# ---- the command


def _machine(settings: Sequence[str], parser: argparse.ArgumentParser) -> Machine:
    machine, names = Machine(), Machine().sources
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign or name not in names:
            parser.error(f"--set {setting}: wanted NAME=NUMBER, NAME one of {', '.join(names)}")
        try:
            machine = replace(machine, **{name: float(value)})
        except ValueError:
            parser.error(f"--set {setting}: {value!r} is no number")
    return machine


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS), metavar="N")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--figure", type=Path, metavar="PNG")
    parser.add_argument("--check", action="store_true", help="against published figures")
    parser.add_argument("--constants", action="store_true", help="values and their sources")
    parser.add_argument("--measure", action="store_true", help="processes on this CPU")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where --measure writes")
    options = parser.parse_args()
    machine = _machine(options.settings, parser)
    if any(count < 1 or count % NODE and count > NODE for count in options.gpus):
        parser.error(f"--gpus: wanted whole nodes of {NODE}, or less than one, got {options.gpus}")
    if options.constants:
        for name, source in machine.sources.items():
            print(f"{name} = {getattr(machine, name):.4g}: {source}")
        return 0
    if options.check:
        text, holds = check(machine)
        print(text)
        return 0 if holds else 1
    if options.measure:
        from benchmarks.scaling_runs import measure

        record = measure(options.processes)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record["runs"], indent=1))
        return 0
    rows = predict(machine, options.models, options.gpus)
    print("PREDICTED, nothing of it measured on a GPU. Seconds a step.\n")
    print(table(rows))
    if options.figure:
        draw(rows, options.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
