"""Which set-up, and which GPUs for whom: simulates the choices that a number of GPUs leaves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recap_fast.config import ConfigError, TrainConfig
from recap_fast.simulate.pipeline import Costs, Outcome, SetUp, simulate
from recap_fast.simulate.trace import asynchrony
from recap_fast.simulate.workload import Workload
from recap_fast.types import UserError

DEFAULT_GPUS = (8, 64, 512)
_SEARCH_STEPS = 4
_DEFAULT_ASYNC = (2, 3)  # depth and max_staleness where the configuration has none


@dataclass(frozen=True, slots=True)
class Mode:
    """A set-up but for its GPUs."""

    name: str
    depth: float
    max_staleness: int
    colocated: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A mode on a number of GPUs, split as is fastest."""

    gpus: int
    mode: Mode
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Plan:
    """All choices, and the fastest for each number of GPUs."""

    choices: tuple[Choice, ...]

    def recommended(self, gpus: int) -> Choice:
        """The fastest; of those within 2 %, the one with the least staleness."""
        mine = [choice for choice in self.choices if choice.gpus == gpus]
        limit = 1.02 * min(choice.outcome.step_seconds for choice in mine)
        fast = [choice for choice in mine if choice.outcome.step_seconds <= limit]
        return min(fast, key=lambda c: (c.outcome.mean_staleness, c.outcome.step_seconds))


def modes(config: TrainConfig) -> tuple[Mode, ...]:
    depth, staleness = asynchrony(config) or _DEFAULT_ASYNC
    return (
        Mode("synchronous, colocated", 0, 0, colocated=True),
        Mode("one step off", 1, 1),
        Mode(f"asynchronous, depth {depth:g}, staleness <= {staleness}", depth, staleness),
    )


def plan(
    costs: Costs,
    workload: Workload,
    config: TrainConfig,
    gpus: Sequence[int] = (),
    *,
    split: tuple[int, int] | None = None,
    seed: int = 0,
) -> Plan:
    """Simulates every mode on every number of GPUs.

    Args:
        gpus: numbers to share out; none: what `split` makes, or `DEFAULT_GPUS`.
        split: GPUs of the trainer and of the engines where they have their own; None: searched.

    Raises:
        ConfigError: numbers of GPUs that cannot be shared out as the configuration says.
    """
    if split is not None:
        gpus = _agreed(gpus, split)
    gpus = gpus or DEFAULT_GPUS
    for count in gpus:
        _check(count, config, costs)
    found = []
    for count in dict.fromkeys(gpus):
        for mode in modes(config):
            outcome = _fastest(costs, workload, mode, count, config, split, seed)
            found.append(Choice(count, mode, outcome))
    return Plan(tuple(found))


def parse_split(text: str) -> tuple[int, int]:
    """ "6:2": 6 GPUs for the trainer, 2 for the engines."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise UserError(
            f"--split: wanted GPUs of the trainer and of the engines as in 6:2, got {text!r}"
        )
    return int(match[1]), int(match[2])


def _agreed(gpus: Sequence[int], split: tuple[int, int]) -> Sequence[int]:
    total = sum(split)
    if set(gpus) - {total}:
        given = ", ".join(map(str, gpus))
        raise UserError(
            f"--split {split[0]}:{split[1]} makes {total} GPUs, and --gpus says {given}: leave one "
            f"of them out"
        )
    return (total,)


def _check(count: int, config: TrainConfig, costs: Costs) -> None:
    replicas = config.distributed.replicas
    if count < replicas + costs.engine_gpus:
        raise ConfigError(
            f"--gpus {count}: a trainer (at least {replicas}) and an engine ({costs.engine_gpus}) "
            f"of their own need at least {replicas + costs.engine_gpus}"
        )
    if count % costs.engine_gpus:
        raise ConfigError(
            f"--gpus {count}: rollout.tensor_parallel_size is {costs.engine_gpus}, which does not "
            f"divide it"
        )
    if count % replicas:
        raise ConfigError(
            f"--gpus {count}: distributed.replicas is {replicas}, which does not divide it"
        )


def _fastest(
    costs: Costs,
    workload: Workload,
    mode: Mode,
    count: int,
    config: TrainConfig,
    split: tuple[int, int] | None,
    seed: int,
) -> Outcome:
    def run(trainer: int, engines: int, steps: int = 12) -> Outcome:
        set_up = SetUp(trainer, engines, mode.depth, mode.max_staleness, mode.colocated)
        return simulate(costs, workload, set_up, steps=steps, seed=seed)

    if mode.colocated:
        return run(count, count)
    if split is not None:
        _check_split(split, config, costs)
        return run(*split)
    tried: dict[int, Outcome] = {}

    def search(candidates: Iterable[int]) -> int:
        for trainer in candidates:
            if trainer not in tried:
                tried[trainer] = run(trainer, count - trainer, _SEARCH_STEPS)
        return min(tried, key=lambda trainer: _order(tried[trainer]))

    possible = splits(count, costs.engine_gpus, config.distributed.replicas)
    if not possible:
        raise ConfigError(
            f"--gpus {count}: cannot be split so that the engines have a multiple of "
            f"{costs.engine_gpus} (rollout.tensor_parallel_size) and the trainer one of "
            f"{config.distributed.replicas} (distributed.replicas)"
        )
    stride = max(1, len(possible) // 8)
    best = search(possible[stride // 2 :: stride])
    while stride > 1 and len(possible) > 8:
        stride //= 2
        place = possible.index(best)
        near = (place - stride, place + stride)
        best = search(possible[p] for p in near if 0 <= p < len(possible))
        if stride <= len(possible) // 32:
            break
    return run(best, count - best)


def splits(count: int, engine_gpus: int, replicas: int) -> list[int]:
    """GPUs that a trainer may have beside whole engines: what is left is theirs."""
    return [
        trainer
        for trainer in range(replicas, count - engine_gpus + 1, replicas)
        if not (count - trainer) % engine_gpus
    ]


def _check_split(split: tuple[int, int], config: TrainConfig, costs: Costs) -> None:
    trainer, engines = split
    if engines % costs.engine_gpus or trainer % config.distributed.replicas:
        raise ConfigError(
            f"--split {trainer}:{engines}: the engines' GPUs must be a multiple of "
            f"{costs.engine_gpus} (rollout.tensor_parallel_size), the trainer's of "
            f"{config.distributed.replicas} (distributed.replicas)"
        )


def _order(outcome: Outcome) -> tuple[float, float]:
    return round(outcome.step_seconds, 6), outcome.engine_idle
