"""The command `recap-fast simulate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recap_fast.config import TrainConfig
from recap_fast.simulate.check import check_run
from recap_fast.simulate.plan import parse_split, plan
from recap_fast.simulate.show import print_check, print_plan, write_plan
from recap_fast.simulate.trace import fit_costs, read_trace, workload_of


def run_simulation(
    config: TrainConfig,
    traces: Sequence[Path],
    *,
    gpus: Sequence[int] = (),
    split: str | None = None,
    checked: Path | None = None,
    output: Path,
) -> bool:
    """Prints the predictions and writes them into `output`.

    Args:
        gpus: to share out; none: what `split` makes, or 8, 64 and 512.
        split: "TRAINER:ENGINES"; None: the fastest is searched.
        checked: a run whose step is to be predicted from the traces.

    Returns:
        Whether `checked` is within the limit; True without one.

    Raises:
        TraceError: a run that cannot be replayed or compared.
        UserError: numbers of GPUs that contradict each other or the configuration.
    """
    trace = read_trace(traces)
    fit = fit_costs(trace)
    workload = workload_of(trace, config)
    parts = None if split is None else parse_split(split)
    check = None if checked is None else check_run(fit.costs, trace, checked, seed=config.seed)
    console = Console()
    with console.status("simulating"):
        found = plan(fit.costs, workload, config, gpus, split=parts, seed=config.seed)
    print_plan(found, fit, trace, console)
    if check is not None:
        print_check(check, console)
    for path in write_plan(found, fit, check, output):
        console.print(str(path), soft_wrap=True, highlight=False)
    return check is None or check.passes
