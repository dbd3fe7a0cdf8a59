"""Others' published asynchronous runs, predicted from their synchronous figures.

    python -m recap_fast.simulate.published

Sources, read 2026-11-26:

- NeMo RL, docs/about/performance-summary.md, "NeMo RL v0.6", H100 BF16
  (https://docs.nvidia.com/nemo/rl/0.6.0/about/performance-summary.html): step times, GPUs, mean and
  longest sequence. Splits of the GPUs, rollouts a step, tensor parallelism and the largest age of
  rollouts: examples/configs/recipes/llm/performance/ of the same repository. It does not say what
  the stages take.
- NeMo RL v0.3 (https://nvidia-nemo.github.io/blog/2025/07/21/nemo-rl-v0.3/): Qwen3-30B-A3B on 64
  H100, the same rollouts, 167 s: training 50, refit 12, generation 78, log-probs 23. These shares
  are assumed for v0.6, for both models.
- verl, docs/advance/fully_async.md (https://verl.readthedocs.io/en/latest/advance/fully_async.html):
  Qwen2.5-Math-7B on H20, step, generation, log-probs and update by number of GPUs, colocated and
  apart. Of the lengths it gives the limit, 28 K.

No input comes from an asynchronous run. What no source gives is assumed: prompts of 150 tokens;
log-normal lengths with sigma 0.8; decode steps that take as long as weights take to be read; 6,000
tokens a completion for verl. The table shows what other assumptions would have predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from recap_fast.simulate.pipeline import Costs, Outcome, SetUp, simulate
from recap_fast.simulate.workload import Lengths, Workload, clipped_lognormal

LIMIT = 0.15
"""Largest error that is called a match."""
_H100, _H20 = 3.35e12, 4.0e12
"""Bytes a second of a GPU's memory, by its data sheet."""
_PROMPT, _SIGMA, _VERL_MEAN = 150, 0.8, 6000
_ANY_AGE = 8
_MAIN = 3  # of the cases; the others say where the model ends


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of a synchronous step; log-probs are the trainer's."""

    generation: float
    train: float
    sync: float
    other: float

    def scaled(self, total: float) -> Stages:
        """The same shares of another total."""
        factor = total / (self.generation + self.train + self.sync + self.other)
        parts = (self.generation, self.train, self.sync, self.other)
        return Stages(*(factor * part for part in parts))

    def shifted(self, points: float) -> Stages:
        """`points` of the two stages' time given from training to generation."""
        moved = points * (self.generation + self.train)
        return replace(self, generation=self.generation + moved, train=self.train - moved)


NEMO_V03 = Stages(generation=78, train=50 + 23, sync=12, other=167 - 78 - 50 - 23 - 12)


@dataclass(frozen=True, slots=True)
class Published:
    """A synchronous run, and an asynchronous one that is predicted from it.

    Attributes:
        stages: of the synchronous run, on `traced_gpus`.
        decode_step: seconds of a decode step, whatever is in flight.
        measured: seconds of the asynchronous step.
        synchronous: seconds of the synchronous step that its source compares it with.
        mean_is_assumed: of the lengths.
    """

    name: str
    stages: Stages
    traced_gpus: int
    groups: int
    group_size: int
    lengths: Lengths
    engine_gpus: int
    decode_step: float
    set_up: SetUp
    measured: float
    synchronous: float
    mean_is_assumed: bool = False

    @property
    def costs(self) -> Costs:
        tokens = self.groups * self.group_size * self.lengths.mean
        engines = self.traced_gpus / self.engine_gpus
        by_request = max(self.stages.generation - self.decode_step * self.lengths.longest, 0.0)
        return Costs(
            decode_step=self.decode_step,
            decode_request=by_request * engines / tokens,
            train_fixed=0.0,
            train_token=self.stages.train * self.traced_gpus / tokens,
            sync=self.stages.sync,
            other=self.stages.other,
            engine_gpus=self.engine_gpus,
        )

    def predict(self) -> Outcome:
        workload = Workload(self.groups, self.group_size, (self.lengths,), (1.0,))
        return simulate(self.costs, workload, self.set_up, steps=4)

    @property
    def error(self) -> float:
        return self.predict().step_seconds / self.measured - 1


def nemo_qwen3_30b() -> Published:
    """16 + 16 of 32 H100, one step off: 192 s synchronous, 152 s asynchronous."""
    return Published(
        "NeMo, Qwen3-30B-A3B, 16 + 16 H100, 1 step off",
        NEMO_V03.scaled(192),
        traced_gpus=32,
        groups=64,
        group_size=32,
        lengths=clipped_lognormal(3203 - _PROMPT, 4096 - _PROMPT, _SIGMA),
        engine_gpus=2,
        decode_step=61.1e9 / 2 / _H100,
        set_up=SetUp(16, 16, depth=1, max_staleness=1),
        measured=152,
        synchronous=192,
    )


def nemo_qwen3_30b_far() -> Published:
    """128 + 64 H100, 8 steps off: 34.5 s."""
    return replace(
        nemo_qwen3_30b(),
        name="NeMo, Qwen3-30B-A3B, 128 + 64 H100, 8 steps off",
        set_up=SetUp(128, 64, depth=8, max_staleness=8),
        measured=34.5,
    )


def nemo_deepseek_v3() -> Published:
    """256 + 256 H100, one step off: 111 s synchronous on 512, 64.1 s asynchronous. The stages are
    those of the synchronous run on 256 GPUs (134 s), which each side has here. Its 134 s and the
    111 on 512 say that 46 s of them are shared out among GPUs: taken of generation and training
    alike, that leaves to decode steps what generation has besides."""
    stages = NEMO_V03.scaled(134)
    divisible = 2 * (134 - 111) / (stages.generation + stages.train)
    lengths = clipped_lognormal(701 - _PROMPT, 1536 - _PROMPT, _SIGMA)
    return Published(
        "NeMo, DeepSeek V3, 256 + 256 H100, 1 step off",
        stages,
        traced_gpus=256,
        groups=32,
        group_size=16,
        lengths=lengths,
        engine_gpus=32,
        decode_step=(1 - divisible) * stages.generation / lengths.longest,
        set_up=SetUp(256, 256, depth=1, max_staleness=1),
        measured=64.1,
        synchronous=111,
    )


def verl_qwen25_7b() -> Published:
    """64 + 64 H20, 0.5 steps ahead, a step in 4 updates as its groups come: 356.3 s synchronous on
    128, 150.63 s asynchronous (2.35 to 2.67 times as fast by the clock, evaluations included). The
    stages are those of the colocated run on 64 GPUs, which each side has here, without log-probs:
    asynchronous runs take the engine's. verl bounds how many groups are ahead, not their age."""
    return Published(
        "verl, Qwen2.5-Math-7B, 64 + 64 H20, 0.5 steps off",
        Stages(150.72, 133.41, sync=0.12, other=365.28 - 150.72 - 133.41 - 70.26),
        traced_gpus=64,
        groups=512,
        group_size=16,
        lengths=clipped_lognormal(_VERL_MEAN, 28 * 1024, _SIGMA),
        engine_gpus=1,
        decode_step=15.2e9 / _H20,
        set_up=SetUp(64, 64, depth=0.5, max_staleness=_ANY_AGE, parts=4),
        measured=150.63,
        synchronous=356.3,
        mean_is_assumed=True,
    )


def verl_qwen25_7b_small() -> Published:
    """32 + 32 H20: 365.28 s synchronous on 64, 189.26 asynchronous; the stages are those of the
    colocated run on 32."""
    return replace(
        verl_qwen25_7b(),
        name="verl, Qwen2.5-Math-7B, 32 + 32 H20, 0.5 steps off",
        stages=Stages(357.41, 269.80, sync=0.12, other=790.10 - 357.41 - 107.71 - 269.80),
        traced_gpus=32,
        set_up=SetUp(32, 32, depth=0.5, max_staleness=_ANY_AGE, parts=4),
        measured=189.26,
        synchronous=365.28,
    )


CASES: tuple[Callable[[], Published], ...] = (
    nemo_qwen3_30b,
    nemo_deepseek_v3,
    verl_qwen25_7b,
    nemo_qwen3_30b_far,
    verl_qwen25_7b_small,
)


def alternatives(case: Published) -> dict[str, Published | None]:
    """A case under other assumptions; None where there is none to be made."""
    lengths = case.lengths

    def mean_times(factor: float) -> Published | None:
        if not case.mean_is_assumed:
            return None
        mean = factor * lengths.mean
        return replace(case, lengths=clipped_lognormal(mean, lengths.longest, _SIGMA))

    return {
        "10 % of the time to generation": replace(case, stages=case.stages.shifted(0.1)),
        "10 % to training": replace(case, stages=case.stages.shifted(-0.1)),
        "decode step x 0.5": replace(case, decode_step=0.5 * case.decode_step),
        "decode step x 1.5": replace(case, decode_step=1.5 * case.decode_step),
        "sigma 0.4": replace(case, lengths=clipped_lognormal(lengths.mean, lengths.longest, 0.4)),
        "sigma 1.2": replace(case, lengths=clipped_lognormal(lengths.mean, lengths.longest, 1.2)),
        "half as long": mean_times(0.5),
        "twice as long": mean_times(2.0),
        "no pause for weights": replace(case, stages=replace(case.stages, sync=0.0)),
    }


def main() -> None:
    """Prints the cases, and how they move with what was assumed."""
    console = Console()
    table = Table(title="Seconds a step, predicted from synchronous figures and published")
    for title in ("run", "synchronous", "predicted", "published", "error", "trainer idle",
                  "engines idle"):  # fmt: skip
        table.add_column(title, justify="left" if title == "run" else "right")
    cases = [case() for case in CASES]
    for case in cases:
        found = case.predict()
        table.add_row(
            case.name,
            f"{case.synchronous:g}",
            f"{found.step_seconds:.1f}",
            f"{case.measured:g}",
            f"{found.step_seconds / case.measured - 1:+.1%}",
            f"{found.trainer_idle:.0%}",
            f"{found.engine_idle:.0%}",
        )
    console.print(table)
    moved = Table(title="The prediction under other assumptions, seconds")
    moved.add_column("run")
    for title in alternatives(cases[0]):
        moved.add_column(title, justify="right")
    for case in cases[:_MAIN]:
        others = alternatives(case).values()
        cells = (f"{c.predict().step_seconds:.1f}" if c else "" for c in others)
        moved.add_row(case.name, *cells)
    console.print(moved)


if __name__ == "__main__":
    main()
