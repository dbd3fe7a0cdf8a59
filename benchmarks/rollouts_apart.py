"""Trainer and server on a CPU core of their own each: what sampling ahead gains, and whether the
simulator foretells it.

`recap-fast serve` has the last core, the trainer the others. Both run the configuration of `make
train` through that server, first in turns, then one step off; the simulator is given the first run
as its trace and predicts the second. Needs two cores that nothing else uses.

    python -m benchmarks.rollouts_apart [--steps 24] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import provenance
from benchmarks.rollout_modes import EXAMPLE, ROOT
from recap_fast.report.metrics import read_metrics
from recap_fast.rollout.server_process import free_port
from recap_fast.simulate.check import Check, check_run
from recap_fast.simulate.trace import fit_costs, read_trace

MODES = {"in turns": 0, "one step off": 1}
"""`rollout.async.depth` of each."""
_START = 300.0
"""Seconds that the server may take to start."""


def on_cores(cores: list[int], *words: str) -> list[str]:
    """A command line of ours that runs on these cores alone."""
    listed = ",".join(map(str, cores))
    return ["taskset", "--cpu-list", listed, sys.executable, "-m", "recap_fast", *words]


def wait_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """A run waits for half a minute where nobody listens, and a server with one core starts in
    more."""
    until = time.monotonic() + _START
    while time.monotonic() < until and server.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{url} was not ready within {_START:g} s: {log.read_text()[-2000:]}")


def train(url: str, cores: list[int], run: Path, depth: int, steps: int) -> None:
    settings = [
        f"run={run}", f"training.steps={steps}", "rollout.engine=vllm_server",
        f"rollout.server.urls=[{url}]", f"rollout.async.depth={depth}", "loss.rollout_is_cap=2.0",
        "evaluation.before=false", "evaluation.after=false", "evaluation.every=0",
        "checkpoint.every=0", "logging.tensorboard=false",
    ]  # fmt: skip
    sets = [word for setting in settings for word in ("--set", setting)]
    command = on_cores(cores, "train", str(EXAMPLE), *sets)
    environment = os.environ | {"OMP_NUM_THREADS": str(len(cores))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"depth {depth}: {done.stdout}{done.stderr}")


def show(console: Console, checks: dict[str, Check]) -> None:
    table = Table("run", "stage", "predicted s", "measured s")
    for mode, check in checks.items():
        for stage, (predicted, measured) in check.seconds.items():
            table.add_row(mode, stage, f"{predicted:.2f}", f"{measured:.2f}")
        table.add_row(mode, "step, error", f"{check.error:+.1%}", "")
    console.print(table)


def summary(checks: dict[str, Check], folder: Path) -> dict[str, Any]:
    found = {}
    for mode, check in checks.items():
        rows = read_metrics(folder / mode)[1:]
        found[mode] = {
            "tokens/s": round(sum(row["tokens_per_second"] or 0 for row in rows) / len(rows), 1),
            "seconds": {
                stage: {"predicted": round(predicted, 3), "measured": round(measured, 3)}
                for stage, (predicted, measured) in check.seconds.items()
            },
            "error of the step": round(check.error, 4),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    *ours, last = sorted(os.sched_getaffinity(0))
    if not ours:
        console.print("trainer and server need a core each, and this process may use one alone")
        return 2
    port = free_port()
    command = on_cores([last], "serve", str(EXAMPLE), "--port", str(port))
    command += ["--set", "rollout.engine=vllm_server"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        url, said = f"http://127.0.0.1:{port}", folder / "server.log"
        with said.open("wb") as log:
            server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            with console.status("starting the server"):
                wait_ready(url, server, said)
            for mode, depth in MODES.items():
                with console.status(f"{options.steps} steps {mode}"):
                    train(url, ours, folder / mode, depth, options.steps)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
        trace = read_trace([folder / "in turns"])
        costs = fit_costs(trace).costs
        checks = {mode: check_run(costs, trace, folder / mode) for mode in MODES}
        show(console, checks)
        if options.json is not None:
            about = provenance(torch.device("cpu"), "python -m benchmarks.rollouts_apart")
            record = {**about, "steps": options.steps, "runs": summary(checks, folder)}
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(check.passes for check in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
