"""The command line. Exit status: 0 done, 1 failed, 2 the user can mend it, and how is printed."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from recap_fast.config import ConfigError, MissingGpuError
from recap_fast.paths import shown
from recap_fast.quiet import quieten
from recap_fast.types import StageError, UserError, WeightSyncError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="GRPO with replay, dynamic objective weights and fused losses.",
)
reproduce = typer.Typer(no_args_is_help=True, help="Run the paper's experiments.")
app.add_typer(reproduce, name="reproduce")
_console = Console(stderr=True)
_PATIENCE = 20.0
"""Seconds that the others give the process that prints an error, for what it closes before."""

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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the memory that each GPU needs, and stop")
    ] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of the dry run; 1")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GiB of each GPU of the dry run; 80")
    ] = None,
) -> None:
    """Train, evaluate before and after, and write report.html."""
    from recap_fast.config import load_config

    if not dry_run and (gpus or gpu_memory):
        raise UserError("--gpus and --gpu-memory describe the GPUs of a --dry-run: add it")
    loaded = load_config(config, overrides or ())
    _log_to_console()
    if dry_run:
        from recap_fast.training import memory_check

        raise SystemExit(0 if memory_check.dry_run(loaded, gpus or 1, gpu_memory or 80) else 1)
    from recap_fast.report.page import write_report
    from recap_fast.trainer import Trainer
    from recap_fast.training.distributed import RankError
    from recap_fast.training.run_folder import FinishedRunError

    try:
        trainer = Trainer(loaded, resume=resume, overwrite=overwrite)
    except FinishedRunError as done:
        print(_after_the_end(str(done), loaded.run, done.step))
        return
    except RankError as error:
        if error.kind == FinishedRunError.__name__:
            return
        raise
    try:
        finished = trainer.train()
        report = write_report(trainer.run_dir) if trainer.world.is_main else None
    finally:
        trainer.close()
    if not trainer.world.is_main:
        return
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


@app.command()
def serve(
    config: Config,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="interface to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Run a vLLM server that a run with rollout.engine vllm_server attaches to."""
    from recap_fast.config import load_config
    from recap_fast.serve import serve as run_server

    loaded = load_config(config, overrides or ())
    _log_to_console()
    raise SystemExit(run_server(loaded, host, port))


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
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("--task runs in one process: start recap-fast eval without torchrun")
        from recap_fast.training.harness import evaluate_tasks

        scores = evaluate_tasks(
            loaded, model, tasks, harness=harness, limit=limit, task_folder=task_folder
        )
    else:
        from recap_fast.training.evaluate import evaluate_model

        scores = evaluate_model(loaded, model)
    if os.environ.get("RANK", "0") == "0":
        for name, value in scores.items():
            print(f"{name}\t{value:.4f}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run folder, or a checkpoint's", metavar="RUN")],
    output: Annotated[
        Path | None, typer.Option(help="a new folder; RUN/export/step-NNNNNN by default")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="of all weights; as in the checkpoint, float32, by default"),
    ] = None,
) -> None:
    """Write the newest checkpoint's model alone, as a Hugging Face folder."""
    from recap_fast.training.export import export_model

    _log_to_console()
    folder = export_model(run, output, dtype)
    if os.environ.get("RANK", "0") == "0":
        print(folder)


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
def simulate(
    config: Config,
    trace: Annotated[
        list[Path], typer.Option(help="synchronous run to replay; more than once: several")
    ],
    overrides: Overrides = None,
    gpus: Annotated[
        list[int] | None, typer.Option(min=1, help="GPUs to share out; 8, 64 and 512")
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="TRAINER:ENGINES", help="who has which; searched")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="another run: fail where its step is over 10 % off")
    ] = None,
    output: Annotated[Path, typer.Option(help="folder for JSON and figure")] = Path(
        "runs/simulate"
    ),
) -> None:
    """Predict step time, idle time and staleness on other GPUs, in turns and overlapped."""
    from recap_fast.config import load_config
    from recap_fast.simulate.command import run_simulation

    loaded = load_config(config, overrides or ())
    passes = run_simulation(
        loaded, trace, gpus=gpus or (), split=split, checked=check, output=output
    )
    raise SystemExit(0 if passes else 1)


@app.command()
def watch(run: Annotated[Path, typer.Argument(help="run folder", metavar="RUN")]) -> None:
    """Show a run of another process: waits for its start, follows it, says how it ended."""
    from recap_fast.report.watch import watch_run

    watch_run(run)


@app.command()
def doctor(
    servers: Annotated[
        list[str] | None,
        typer.Option("--server", metavar="URL", help="a vLLM server to try, and nothing else"),
    ] = None,
) -> None:
    """Say what this machine can run, and why not the rest."""
    from recap_fast.doctor import run_doctor

    raise SystemExit(run_doctor(servers=servers or ()))


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
def replay(
    quick: Annotated[
        bool, typer.Option("--quick", help="two methods, shares and seeds, a few steps; for CI")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="folder for runs, tables and figure; runs/reproduce/replay[-quick]"),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="only these methods")
    ] = None,
    shares: Annotated[
        str | None, typer.Option(metavar="PERCENT,...", help="only these shares of replay")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="SEED,...", help="only these seeds")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, metavar="MINUTES", help="then start no more runs")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 2,
    earlier: Annotated[
        Path | None,
        typer.Option(help="results.json of another machine, whose runs are not done again"),
    ] = None,
) -> None:
    """What is kept where replay is scarce, by method and share; goes on where it was stopped."""
    _log_to_console()
    from recap_fast.reproduce.replay import FULL, QUICK
    from recap_fast.reproduce.replay_report import run_replay

    print(
        run_replay(
            output or Path("runs/reproduce") / ("replay-quick" if quick else "replay"),
            QUICK if quick else FULL,
            methods=methods.split(",") if methods else None,
            shares=_numbers("--shares", shares),
            seeds=_numbers("--seeds", seeds),
            jobs=jobs,
            budget=math.inf if budget is None else budget,
            earlier=earlier,
        )
    )


def _numbers(option: str, text: str | None) -> list[int] | None:
    """Of "10,20"."""
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise typer.BadParameter(f"{option}: wanted whole numbers as 10,20, got {text}") from None


@reproduce.command()
def text(
    quick: Annotated[bool, typer.Option("--quick", help="two steps of each; for a check")] = False,
    scarce: Annotated[
        int | None,
        typer.Option(
            "--replay", min=1, max=99, metavar="PERCENT", help="of the rows are replayed; 67"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="folder for runs and table; runs/reproduce/text[-replay-N][-quick]"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each method")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
) -> None:
    """Sums learnt by SmolLM2-135M, with and without replay; goes on where it was stopped."""
    _log_to_console()
    from dataclasses import replace

    from recap_fast.reproduce.text import FULL, QUICK, run_text

    name = "text" + (f"-replay-{scarce}" if scarce else "") + ("-quick" if quick else "")
    settings = replace(QUICK if quick else FULL, seeds=seeds, replay=scarce)
    print(run_text(output or Path("runs/reproduce") / name, settings, jobs=jobs))


def _log_to_console() -> None:
    """One log through rich, which keeps the live view whole."""
    handler = RichHandler(console=_console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("recap_fast").setLevel(logging.INFO)
    if os.environ.get("RANK", "0") != "0":  # torchrun's others: their log files have the rest
        handler.setLevel(logging.ERROR)


def main() -> None:
    """Entry point."""
    from recap_fast.rollout.preload import ensure_preload

    if sys.argv[1:2] in (["train"], ["eval"], ["serve"]):
        ensure_preload()
    quieten()
    try:
        app()
    except UserError as error:
        _fail(error, 2)
    except WeightSyncError as error:
        _fail(error, 1)
    except StageError:  # is in the log
        raise SystemExit(1) from None


def _fail(error: Exception, status: int) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0" and _is_said_elsewhere(error):
        # torchrun ends all at the first one's exit: not before it is said, and with this status.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
        time.sleep(_PATIENCE)
    else:
        where = f"rank {rank}: " if rank != "0" else ""
        _console.print(f"[bold red]error:[/] {escape(where + str(error))}", highlight=False)
    raise SystemExit(status) from None


def _is_said_elsewhere(error: Exception) -> bool:
    """By rank 0; or, of a configuration, by each host's first process."""
    if isinstance(error, UserError) and error.is_shared:
        return True
    if isinstance(error, MissingGpuError):  # the processes before this one have theirs
        return not error.is_first
    return isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0"


if __name__ == "__main__":
    main()
