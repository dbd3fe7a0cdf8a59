"""The command line. Exit status: 0 done, 1 failed, 2 the user can mend it, and how is printed."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from recap_fast.paths import shown
from recap_fast.quiet import quieten
from recap_fast.types import UserError, WeightSyncError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="GRPO with replay, dynamic objective weights and fused losses.",
)
reproduce = typer.Typer(no_args_is_help=True, help="Run the paper's experiments.")
app.add_typer(reproduce, name="reproduce")
_console = Console(stderr=True)

Config = Annotated[Path, typer.Argument(help="YAML file", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="replace a key, e.g. training.steps=20"),
]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="continue the run from its checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option(help="remove an earlier run in the folder")] = False,
) -> None:
    """Train, evaluate before and after, and write report.html."""
    from recap_fast.config import load_config

    loaded = load_config(config, overrides or ())
    _log_to_console()
    from recap_fast.report.page import write_report
    from recap_fast.trainer import Trainer
    from recap_fast.training.run_folder import FinishedRunError

    try:
        trainer = Trainer(loaded, resume=resume, overwrite=overwrite)
    except FinishedRunError as done:
        print(_after_the_end(str(done), loaded.run, done.step))
        return
    try:
        finished = trainer.train()
        report = write_report(trainer.run_dir)
    finally:
        trainer.close()
    if finished:
        print(f"finished {loaded.training.steps} steps; report: {report}")
    else:
        print(f"stopped after step {trainer.step}, checkpoint saved; --resume continues")


def _after_the_end(what: str, run: str, steps: int) -> str:
    more = f"--set training.steps={2 * steps}"
    return (
        f"{what}\n"
        f"to evaluate it: recap-fast eval {run}\n"
        f"to go on:       recap-fast train {run}/config.yaml --resume {more}"
    )


@app.command(name="eval")
def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            help="YAML file, run folder or folder of a checkpoint", metavar="CONFIG|RUN|CHECKPOINT"
        ),
    ],
    overrides: Overrides = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", help="lm-eval's or lmms-eval's name of a benchmark, e.g. gsm8k"),
    ] = None,
    harness: Annotated[
        Literal["lm-eval", "lmms-eval"] | None, typer.Option(help="by default after the model")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="examples of each task")] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="further task definitions", exists=True, file_okay=False)
    ] = None,
) -> None:
    """Evaluate a configuration's model, a run's newest checkpoint or the checkpoint given: on the
    sources' held-out rows, or on the benchmarks given with --task."""
    from recap_fast.config import load_config

    if not tasks and (harness or limit or task_folder):
        raise UserError("--harness, --limit and --task-folder need a --task that they apply to")
    _log_to_console()
    file, path = source, None
    if not os.path.exists(source):
        raise UserError(f"{shown(source)}: no such file or folder")
    if os.path.isdir(source):  # pathlib raises for names that are too long
        from recap_fast.training.run_folder import find_evaluated

        file, path = find_evaluated(source)
    loaded = load_config(file, overrides or ())
    if path and loaded.model.path != load_config(file).model.path:
        raise UserError(
            f"model.path is set, and {source} names a checkpoint: give the configuration "
            f"(recap-fast eval {file} --set model.path=...) or leave model.path out"
        )
    model = str(path or loaded.model.path)
    if tasks:
        from recap_fast.training.harness import evaluate_tasks

        scores = evaluate_tasks(
            loaded, model, tasks, harness=harness, limit=limit, task_folder=task_folder
        )
    else:
        from recap_fast.training.evaluate import evaluate_model

        scores = evaluate_model(loaded, model)
    for name, value in scores.items():
        print(f"{name}\t{value:.4f}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run folder", metavar="RUN")]) -> None:
    """Write RUN/report.html from the run's records."""
    from recap_fast.report.page import write_report

    print(write_report(run))


@app.command()
def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(help="suites in benchmarks/; none: all", metavar="SUITE")
    ] = None,
    shapes: Annotated[str, typer.Option(help="small, cpu or gpu")] = "small",
    keyword: Annotated[
        str | None, typer.Option("-k", metavar="EXPR", help="only what matches, as pytest's -k")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds of each")] = 5,
    deadline: Annotated[
        float | None, typer.Option(help="seconds after which nothing more is started")
    ] = None,
    output: Annotated[Path, typer.Option(help="folder for JSON and figures")] = Path("runs/bench"),
    report: Annotated[
        Path | None, typer.Option(metavar="JSON", help="only print and draw earlier results")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="compile the kernels and count instead; needs no GPU")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="with --static: also write the table as JSON")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="with --static: fail where the table differs from this one")
    ] = None,
) -> None:
    """Time the operations beside their peers, from a checkout of the repository."""
    if static:
        from recap_fast.bench import static_analysis

        raise SystemExit(static_analysis.main(json, check))
    from recap_fast.bench.suites import print_report, run_suites

    if report is not None:
        print_report(report, output)
        return
    raise SystemExit(
        run_suites(
            suites or (),
            shapes=shapes,
            keyword=keyword,
            rounds=rounds,
            deadline=deadline,
            output=output,
        )
    )


@app.command()
def doctor() -> None:
    """Say what this machine can run, and why not the rest."""
    from recap_fast.doctor import run_doctor

    raise SystemExit(run_doctor())


@reproduce.command()
def toy(
    output: Annotated[Path, typer.Option(help="folder for tables, JSON and figures")] = Path(
        "runs/reproduce/toy"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="2,000 steps, 2 seeds")] = False,
    steps: Annotated[int | None, typer.Option(min=20, help="steps; 10,000")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="noise seeds; 10")] = None,
    noise: Annotated[float, typer.Option(min=0, help="standard deviation, on L1's value")] = 3.0,
) -> None:
    """Two losses, five starts, noise: every reweighting method, and RECAP's parameters."""
    from recap_fast.reproduce.toy_report import run_toy

    print(run_toy(output, quick=quick, steps=steps, seeds=seeds, noise=noise))


@reproduce.command()
def signals(
    output: Annotated[Path, typer.Option(help="folder for tables, JSON and figures")] = Path(
        "runs/reproduce/signals"
    ),
) -> None:
    """Synthetic reward curves: readings of the paper, sensitivity, scales, failures."""
    from recap_fast.reproduce.signals_report import run_signals

    print(run_signals(output))


@reproduce.command()
def digits(
    quick: Annotated[
        bool, typer.Option("--quick", help="three methods, one seed, a few steps; for CI")
    ] = False,
    large: Annotated[
        bool, typer.Option("--large", help="a larger model, four methods, five seeds; for a GPU")
    ] = False,
    extended: Annotated[
        bool,
        typer.Option("--extended", help="other KLs, longer Uniform runs and parts of RECAP too"),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="folder for runs, tables and figures; runs/reproduce/digits[-SIZE]"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 2,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="only build the base model, and print its scores")
    ] = False,
) -> None:
    """What training on one ability does to the others, by method; goes on where it was stopped."""
    _log_to_console()
    from recap_fast.reproduce.digits_report import SIZES, run_digits

    if quick and large:
        raise typer.BadParameter(
            "--quick and --large are two sizes of the experiment: give one of them"
        )
    size = "quick" if quick else "large" if large else "full"
    folder = output or Path("runs/reproduce") / ("digits" if size == "full" else f"digits-{size}")
    print(run_digits(folder, SIZES[size], extended=extended, jobs=jobs, base_only=base_only))


@reproduce.command()
def text(
    quick: Annotated[bool, typer.Option("--quick", help="two steps of each; for a check")] = False,
    output: Annotated[
        Path | None, typer.Option(help="folder for runs and table; runs/reproduce/text[-quick]")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each method")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
) -> None:
    """Sums learnt by SmolLM2-135M, with and without replay; goes on where it was stopped."""
    _log_to_console()
    from dataclasses import replace

    from recap_fast.reproduce.text import FULL, QUICK, run_text

    folder = output or Path("runs/reproduce") / ("text-quick" if quick else "text")
    settings = replace(QUICK if quick else FULL, seeds=seeds)
    print(run_text(folder, settings, jobs=jobs))


def _log_to_console() -> None:
    """One log through rich, which keeps the live view whole."""
    handler = RichHandler(console=_console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("recap_fast").setLevel(logging.INFO)


def main() -> None:
    """Entry point."""
    from recap_fast.rollout.preload import ensure_preload

    if sys.argv[1:2] in (["train"], ["eval"]):
        ensure_preload()
    quieten()
    try:
        app()
    except UserError as error:
        _fail(error, 2)
    except WeightSyncError as error:
        _fail(error, 1)


def _fail(error: Exception, status: int) -> None:
    _console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
    raise SystemExit(status) from None


if __name__ == "__main__":
    main()
