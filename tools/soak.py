"""Kills a run at random moments until it has ended, and looks whether anything was lost.

A small model is trained on a CPU through a real vLLM server, one step off or in turns. At random
moments one of its processes is killed with SIGKILL: the trainer, one of the server (keeper, HTTP
process, engine, a worker), or one that computes rewards. A trainer that is gone is started again
with --resume. In the end every step must have trained on its own prompts, each with all its
rollouts, and no process and no shared memory may be left, but the file of 1 KiB that Intel's OpenMP
makes for each process, where nobody was left to remove it: of trainers that were killed themselves,
and of servers whose keeper was killed, before them or while it cleaned up after them. These are
counted apart.

In turns (--depth 0) nothing but the seed decides what is sampled: losses and rewards must be, step
by step, those of the same run unbroken. One step off it depends on the moment which
weights sample a request that an update passes by, and no two runs are alike.

    python -m tools.soak --depth 0 --steps 40 --kills 8
    python -m tools.soak --steps 200 --kills 50 --out benchmarks/results/cpu-2core/soak.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recap_fast.config import TrainConfig, load_config
from recap_fast.data.mix import DataStream
from recap_fast.model.policy import load_tokenizer
from recap_fast.report.metrics import read_metrics
from recap_fast.training.checkpoint import list_checkpoints

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path("/dev/shm")  # noqa: S108 (looked at only)
PATIENCE = 60.0
"""Seconds in which what belongs to a run must have ended after it."""
VICTIMS = ("trainer", "server", "reward worker")
KEEPER = "server_process.py"
"""In the command line of the process that removes what a server leaves."""
ROUNDING = 1e-5
"""Of losses and rewards in float32: a batch of other requests adds in another order."""
CONSOLE = Console()


class Problem(RuntimeError):
    """What was lost or left behind."""


def write_config(folder: Path, model: Path, steps: int, depth: int = 1) -> Path:
    """A run of two rewards and a supervised loss, all of whose rollouts are written down."""
    question = "{question} Your reply must start with <answer> and end with </answer>."
    sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 3}
    size = 4 * steps + 8  # rows enough for every step, whichever source they come from
    settings = {
        "run": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {
            "batch_size": 4,
            "max_prompt_tokens": 220,
            "max_supervised_tokens": 250,
            "sources": [
                {
                    "name": "sums", "kind": "rl", "reasoning_gym": "chain_sum", "size": size,
                    "parameters": sums, "prompt": question, "held_out": 4,
                    # Which a random model is not always given alike: updates follow from them.
                    "rewards": {
                        "length": "tests.tiny_rewards:length",
                        "vowels": "tests.tiny_rewards:vowels",
                    },
                },
                {
                    "name": "worked", "kind": "sft", "reasoning_gym": "chain_sum", "size": size,
                    "parameters": sums, "prompt": question, "held_out": 4,
                },
            ],
        },
        "rollout": {
            "engine": "vllm_server", "dtype": "float32", "group_size": 4, "max_new_tokens": 24,
            "cpu_kv_cache_gib": 0.05, "async": {"depth": depth},
            "server": {"timeout": 30.0, "start_timeout": 300.0},
        },
        "loss": {"rollout_is_cap": 2.0},
        "training": {"steps": steps, "max_tokens": 2048},
        "evaluation": {"before": False, "after": False},
        "checkpoint": {"every": 2, "keep": 2},
        "logging": {"tensorboard": False, "rollouts_per_step": 100000},
    }  # fmt: skip
    file = folder / "soak.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def start(file: Path, run: Path, log: Path) -> subprocess.Popen[bytes]:
    """From the newest checkpoint, or from the beginning where the run did not come to one."""
    how = "--resume" if list_checkpoints(run / "checkpoints") else "--overwrite"
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "recap_fast", "train", str(file), how],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def train_unbroken(file: Path, run: Path, log: Path) -> None:
    with log.open("wb") as output:
        status = subprocess.run(
            [sys.executable, "-m", "recap_fast", "train", str(file), "--set", f"run={run}"],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip
    if status:
        raise Problem(f"the unbroken run ended with {status}: {log.read_text()[-2000:]}")


def agreeing(run: Path, unbroken: Path) -> list[int]:
    """Steps whose losses and rewards are those of another run, but for rounding."""
    found = []
    for ours, theirs in zip(read_metrics(run), read_metrics(unbroken), strict=True):
        names = [
            name for name in ours.keys() | theirs.keys() if name.startswith(("loss/", "reward/"))
        ]
        if names and all(_is_near(ours.get(name), theirs.get(name)) for name in names):
            found.append(int(ours["step"]))
    return found


def _is_near(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=ROUNDING)


def victims(trainer: psutil.Process) -> dict[str, list[psutil.Process]]:
    """Processes of a run that a kill may hit."""
    found: dict[str, list[psutil.Process]] = {
        "trainer": [trainer],
        "server": [],
        "reward worker": [],
    }
    for process in trainer.children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            name = process.name()
        except psutil.Error:
            continue
        if KEEPER in line or "vllm" in line or name.startswith("VLLM"):
            found["server"].append(process)
        elif "forkserver" in line and process.ppid() != trainer.pid:
            found["reward worker"].append(process)
    return found


def last_step(run: Path) -> int:
    try:
        return max((int(row["step"] or 0) for row in read_metrics(run)), default=0)
    except (OSError, ValueError):
        return 0


def expected(config: TrainConfig) -> dict[int, Counter[tuple[str, int]]]:
    """Of each step the prompts that it must train on, each as often as it has rollouts."""
    stream = DataStream(config.data, load_tokenizer(config.model.path), config.seed, None)
    found = {}
    for step in range(1, config.training.steps + 1):
        prompts = stream.next_step().prompts
        found[step] = Counter({(p.source, p.row): 0 for p in prompts})
        for prompt in prompts:
            found[step][prompt.source, prompt.row] += config.rollout.group_size
    return found


def trained(run: Path) -> dict[int, Counter[tuple[str, int]]]:
    found: dict[int, Counter[tuple[str, int]]] = {}
    for line in (run / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        counts = found.setdefault(sample["step"], Counter())
        counts[sample["source"], sample["row"]] += 1
    return found


def in_use() -> set[str]:
    """Names of shared memory that a living process has mapped: other programs may have some."""
    used = set()
    for process in psutil.process_iter():
        try:
            used |= {Path(region.path).name for region in process.memory_maps()}
        except psutil.Error:
            continue
    return used


def in_shared_memory() -> set[str]:
    return {path.name for path in SHARED.iterdir()}


def left_in_shared_memory(before: set[str], seen: Set[int]) -> set[str]:
    """What has appeared, and no living process has mapped. A file whose name has the number of a
    process (as Intel's OpenMP and loky give them) counts where that was one of the run's, and has
    ended: other programs may be at work."""
    return {
        name
        for name in in_shared_memory() - before - in_use()
        if (number := owner(name)) is None or (number in seen and not psutil.pid_exists(number))
    }


def owner(name: str) -> int | None:
    """The process that a file is named after."""
    found = re.match(r"(?:__KMP_REGISTERED_LIB_|sem\.loky-)(\d+)[_-]", name)
    return None if found is None else int(found[1])


def of_nobody(before: set[str], alone: Set[int]) -> set[str]:
    """What OpenMP has left of processes that nobody was there to clean up after."""
    return {name for name in left_in_shared_memory(before, alone) if owner(name) in alone}


def is_keeper(process: psutil.Process) -> bool:
    try:
        return KEEPER in " ".join(process.cmdline())
    except psutil.Error:
        return False


def note_servers(found: Sequence[psutil.Process], under: dict[int, set[int]]) -> None:
    """Adds to each keeper's processes those that it has now: it cleans up after all, a while after
    they are gone, and where it is killed meanwhile nobody does."""
    for keeper in filter(is_keeper, found):
        with suppress(psutil.Error):
            below = {one.pid for one in keeper.children(recursive=True)}
            under.setdefault(keeper.pid, set()).update(below)


def check(
    config: TrainConfig, seen: Mapping[int, str], before: set[str], alone: Set[int] = frozenset()
) -> list[str]:
    """What is wrong in the end.

    Args:
        seen: processes that the run had, and their command lines.
        before: what lay in shared memory.
        alone: processes that nobody was left to clean up after; OpenMP's files of them are no
            problem.
    """
    run = Path(config.run)
    problems = []
    wanted, got = expected(config), trained(run)
    for step, prompts in wanted.items():
        if got.get(step) != prompts:
            problems.append(f"step {step}: wanted {dict(prompts)}, got {dict(got.get(step, {}))}")
    steps = [row["step"] for row in read_metrics(run)]
    if steps != list(range(1, config.training.steps + 1)):
        problems.append(f"metrics of the steps {steps}")
    until = time.monotonic() + PATIENCE
    alive = list(seen)
    while alive and time.monotonic() < until:
        alive = [pid for pid in alive if psutil.pid_exists(pid)]
        time.sleep(0.2)
    for pid in alive:
        problems.append(f"process {pid} is left: {seen[pid]}")
    for name in sorted(left_in_shared_memory(before, set(seen)) - of_nobody(before, alone)):
        number = owner(name)
        of = "" if number is None else f" of {seen[number]}"
        problems.append(f"shared memory is left: {name}{of}")
    return problems


def compare(run: Path, unbroken: Path, steps: int) -> int:
    """How many steps there are, all of which have the losses and rewards of another run.

    Raises:
        Problem: some have others.
    """
    same = agreeing(run, unbroken)
    others = [step for step in range(1, steps + 1) if step not in same]
    if others:
        raise Problem(f"losses or rewards are not those of the unbroken run in the steps {others}")
    return len(same)


def soak(
    folder: Path, steps: int, kills: int, seed: int, depth: int, each: int = 0
) -> dict[str, Any]:
    """Args:
    each: kills of each kind, in the place of `kills` of any, the last while a third of the run is
        left: a run that ends before them has failed.
    """
    from tests.rollout.conftest import random_llama
    from tests.tiny_tokenizer import tiny_tokenizer

    random_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    file = write_config(folder, folder / "model", steps, depth)
    config = load_config(file)
    run, log = Path(config.run), folder / "log"
    dice = random.Random(seed)
    # Kills are spread over the run, and fall at any moment of a step or a start.
    kinds = list(VICTIMS) * each
    dice.shuffle(kinds)
    last = steps * 2 / 3 if each else steps - 1
    marks = sorted(dice.uniform(0, last) for _ in range(len(kinds) or kills))
    before = in_shared_memory()
    alone: set[int] = set()
    under: dict[int, set[int]] = {}
    done: Counter[str] = Counter()
    seen: dict[int, str] = {}
    starts, begun = 1, time.monotonic()
    process = start(file, run, log)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=CONSOLE) as progress:
        bar = progress.add_task("steps", total=steps)
        while True:
            time.sleep(dice.uniform(0.05, 0.3))
            step = last_step(run)
            progress.update(bar, completed=step, description=f"{sum(done.values())} kills, steps")
            status = process.poll()
            if status == 0:
                break
            if status is not None:
                if status != -signal.SIGKILL:
                    raise Problem(f"the trainer ended with {status}: {log.read_text()[-2000:]}")
                starts += 1
                process = start(file, run, log)
                continue
            try:
                found = victims(psutil.Process(process.pid))
            except psutil.NoSuchProcess:
                continue
            note_servers(found["server"], under)
            for one in (one for group in found.values() for one in group):
                with suppress(psutil.Error):
                    seen[one.pid] = " ".join(one.cmdline())[:200]
            if marks and step >= marks[0]:
                kind = kinds[0] if kinds else dice.choice(VICTIMS)
                if found[kind]:
                    time.sleep(dice.uniform(0, 1.0))
                    chosen = dice.choice(found[kind])
                    note_servers(found["server"], under)
                    try:
                        os.kill(chosen.pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                    alone |= {chosen.pid} if kind == "trainer" else under.get(chosen.pid, set())
                    marks.pop(0)
                    del kinds[:1]
                    done[kind] += 1
    problems = check(config, seen, before, alone)
    if kinds:
        problems.append(f"the run ended before these were killed: {kinds}")
    if problems:
        raise Problem("\n".join(problems))
    rows = read_metrics(run)
    minutes = round((time.monotonic() - begun) / 60, 1)
    compared = {}
    if depth == 0:
        with CONSOLE.status("the same run unbroken"):
            train_unbroken(file, folder / "unbroken", folder / "unbroken.log")
        same = compare(run, folder / "unbroken", steps)
        compared = {"steps with the losses and rewards of the unbroken run": same}
    return {
        "depth": depth,
        "steps": steps,
        "kills": dict(sorted(done.items())),
        "starts of the trainer": starts,
        "minutes": minutes,
        "prompts trained on once": sum(len(p) for p in expected(config).values()),
        "requests asked again": int(sum(row.get("rollout/reissued_requests") or 0 for row in rows)),
        "largest staleness": int(max(row.get("staleness/max") or 0 for row in rows)),
        "processes left": 0,
        "shared memory left": 0,
        "OpenMP files that nobody was left to remove": len(of_nobody(before, alone)),
        **compared,
        "seed": seed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--each", type=int, default=0, help="kills of each kind, not of any")
    parser.add_argument("--depth", type=int, default=1, help="rollout.async.depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the summary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        try:
            summary = soak(
                Path(folder), options.steps, options.kills, options.seed, options.depth,
                options.each,
            )  # fmt: skip
        except Problem as problem:
            CONSOLE.print(f"[red]failed[/]: {problem}", highlight=False)
            return 1
    CONSOLE.print_json(data=summary)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
