"""Compiles what the operations launch for GPUs that need not be here, and says what came out.

Registers, shared memory, spills, widths of memory accesses, loads that are under way together and
instructions per element, from the
machine code that Triton makes for each architecture. A table of them is committed
(`benchmarks/results/static`, shown in docs/static.md), so that a regression shows without a GPU.

Compilation needs Triton's compiler where tests choose its interpreter, and possibly another
version of Triton than the one installed. So it happens in a process of its own:
`python -m recap_fast.bench.static_analysis CASES ARCH...`, which forks once the cases are recorded.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from recap_fast.bench.sass import Code, Kernel, read_kernel
from recap_fast.ops.launch import Launch

ARCHS = ("sm_80", "sm_90", "sm_100")
CASES = "recap_fast.bench.static_cases:record"
FULL_WIDTH = 128
"""Bits that one thread should move in one access to a row."""
_OTHER_TRITON_REGISTERS = 8
"""How far registers may be from the committed table under another patch release of Triton."""
_INSTRUCTIONS_TOLERANCE = 0.02
_WARP = 32
_FILE_WIDTH = 160
"""Columns of the printed table where it does not go to a terminal."""
_MESSAGE_LENGTH = 4000


class StaticAnalysisError(RuntimeError):
    """Something did not compile, or could not be read; the message says what."""


@dataclass(frozen=True, slots=True)
class Case:
    """A launch to compile, with a name that stays."""

    name: str
    launch: Launch
    is_aligned: bool = True
    """Whether its rows start at multiples of 16 bytes, so that loops must use 128-bit accesses."""


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop over a row."""

    instructions_per_element: float | None
    """Instructions that a thread issues for each element of the row that it loads: those of the
    loop's body / (bytes its loads move / bytes of an element). Both branches count where the body
    has any. None where the loop only stores."""
    loads: dict[int, int]
    """How many global loads of how many bits a thread the body has; `stores` likewise."""
    stores: dict[int, int]
    in_flight: int
    """Loads that a thread has under way when it waits for the first of them: 2 or more hide a
    latency behind another. 0 where the loop only stores."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one launch compiles to on one architecture."""

    case: str
    kernel: str
    arch: str
    warps: int
    registers: int
    """Of a thread. 65536 / (32 * warps * registers) programs fit an SM at most."""
    shared_bytes: int
    local_bytes: int
    """Of a thread: stack and spilled registers. Must be 0."""
    local_accesses: int
    """Instructions that touch local memory. Must be 0."""
    instructions: int
    """Of the whole kernel, as written, not as run."""
    exponentials: int
    """Uses of the special function unit's exp2 among them."""
    loops: list[Loop]
    is_aligned: bool

    @property
    def spills(self) -> bool:
        return self.local_bytes > 0 or self.local_accesses > 0

    @property
    def reading(self) -> list[Loop]:
        """Loops that read a row, in the order in which they run."""
        return [loop for loop in self.loops if loop.loads]

    @property
    def narrow(self) -> dict[str, int]:
        """Accesses of loops that move less than `FULL_WIDTH` bits, e.g. {"load 16": 8}."""
        found: dict[str, int] = {}
        for loop in self.loops:
            for kind, accesses in (("load", loop.loads), ("store", loop.stores)):
                for width, number in accesses.items():
                    if width < FULL_WIDTH:
                        found[f"{kind} {width}"] = found.get(f"{kind} {width}", 0) + number
        return found


@dataclass(frozen=True, slots=True)
class StaticTable:
    """Records, and the version of Triton (which brings its own assembler) that they hold for."""

    triton: str
    records: list[Record]


def static_table(
    archs: Sequence[str] = ARCHS, *, cases: str = CASES, triton: Path | None = None
) -> StaticTable:
    """Compiles every case for every architecture; about 20 s on two cores the first time.

    Args:
        archs: names such as "sm_90".
        cases: "module:function"; the function takes nothing and returns a list of `Case`.
        triton: a folder that holds the Triton to use; None: the installed one.

    Raises:
        StaticAnalysisError: a case does not compile.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if triton is not None:
        paths = [str(triton), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "recap_fast.bench.static_analysis", cases, *archs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise StaticAnalysisError(f"{cases}: {done.stderr.strip()[-_MESSAGE_LENGTH:]}")
    return from_json(done.stdout.splitlines()[-1])


def compile_cases(cases: Sequence[Case], archs: Sequence[str]) -> list[Record]:
    """Compiles on all cores, but not where Triton's interpreter is chosen. Equal kernels once.

    Raises:
        StaticAnalysisError: a case does not compile.
    """
    _jobs.extend(itertools.product(cases, archs))
    # Forked, because launches hold kernels and tensors that no other process could be sent.
    with multiprocessing.get_context("fork").Pool(min(len(_jobs), _cores())) as pool:
        compiled = pool.map(_compile, range(len(_jobs)), chunksize=1)
    _jobs.clear()
    return list(dict(reversed(compiled)).values())[::-1]


_jobs: list[tuple[Case, str]] = []
"""What the forked processes find."""


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _compile(job: int) -> tuple[str, Record]:
    """One case for one architecture, and what tells equal kernels."""
    from triton.runtime.driver import driver

    case, arch = _jobs[job]
    driver.set_active(_Compiler(arch))
    launch = case.launch
    try:
        # As the kernel's launch would, down to what it specialises on.
        compiled = launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments)
    except Exception as error:
        raise StaticAnalysisError(f"{case.name}, {arch}: {error}") from error
    return compiled.hash, _record(case, arch, compiled)


class _Compiler:
    """Stands in for Triton's driver of a device of an architecture. Each is a device to Triton."""

    def __init__(self, arch: str) -> None:
        self._capability = int(arch.removeprefix("sm_"))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, _WARP)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


def _record(case: Case, arch: str, compiled: Any) -> Record:
    kernel = _disassemble(compiled)
    return Record(
        case=case.name,
        kernel=compiled.metadata.name,
        arch=arch,
        warps=compiled.metadata.num_warps,
        registers=kernel.registers,
        shared_bytes=compiled.metadata.shared,
        local_bytes=kernel.local_bytes,
        local_accesses=kernel.local_accesses,
        instructions=kernel.code.instructions,
        exponentials=kernel.code.exponentials,
        loops=_row_loops(case.launch, kernel),
        is_aligned=case.is_aligned,
    )


def _disassemble(compiled: Any) -> Kernel:
    from triton import knobs
    from triton.runtime.cache import get_cache_manager

    # Beside the kernel in Triton's own cache.
    cache = get_cache_manager(compiled.hash)
    cached = cache.get_file("listing.sass")
    if cached is not None:
        return read_kernel(Path(cached).read_text(encoding="utf-8"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cache.put(listing, "listing.sass", binary=False)
    return read_kernel(listing)


def _row_loops(launch: Launch, kernel: Kernel) -> list[Loop]:
    """The innermost loops that walk a row block by block; none for a kernel without BLOCK_V.

    They take exponentials of the row or store to it, which no other loop of such a kernel does. The
    row's elements are those of the largest tensor argument, the logits.
    """
    if "BLOCK_V" not in launch.arguments:
        return []
    row = max((a for a in launch.arguments.values() if isinstance(a, Tensor)), key=Tensor.numel)

    def loop(code: Code) -> Loop:
        elements = code.bytes_loaded / row.element_size()
        per_element = round(code.instructions / elements, 2) if elements else None
        return Loop(per_element, code.loads, code.stores, code.in_flight)

    return [loop(code) for code in kernel.loops if code.exponentials or code.stores]


def to_json(table: StaticTable) -> str:
    """One record a line, so that a change of one shows as such."""
    lines = ",\n".join(json.dumps(asdict(record)) for record in table.records)
    return f'{{"triton": {json.dumps(table.triton)}, "records": [\n{lines}\n]}}\n'


def from_json(text: str) -> StaticTable:
    """Reads what `to_json` wrote."""
    raw = json.loads(text)
    return StaticTable(raw["triton"], [_read_record(record) for record in raw["records"]])


def _read_record(raw: dict[str, Any]) -> Record:
    def widths(counts: dict[str, int]) -> dict[int, int]:
        return {int(width): number for width, number in counts.items()}

    loops = [
        Loop(**(x | {"loads": widths(x["loads"]), "stores": widths(x["stores"])}))
        for x in raw["loops"]
    ]
    return Record(**(raw | {"loops": loops}))


def differences(committed: StaticTable, current: StaticTable) -> list[str]:
    """What of `current` is not as committed, a line each.

    Under the version of Triton that the table was made with, all must be equal, up to 2% in the
    instructions per element. Another patch release may use 8 registers more or fewer, and time
    its loads otherwise.
    """
    slack = 0 if committed.triton == current.triton else _OTHER_TRITON_REGISTERS
    before = {(record.case, record.arch): record for record in committed.records}
    after = {(record.case, record.arch): record for record in current.records}
    found = [f"{case}, {arch}: not in the table" for case, arch in after.keys() - before.keys()]
    found += [f"{case}, {arch}: no longer compiled" for case, arch in before.keys() - after.keys()]
    for key in sorted(before.keys() & after.keys()):
        for what, was, now, allowed in _compared(before[key], after[key], slack):
            differs = was != now if allowed is None else abs(now - was) > allowed
            if differs:
                found.append(f"{key[0]}, {key[1]}: {what} was {was}, is {now}")
    return sorted(found)


def _compared(
    before: Record, after: Record, slack: int
) -> Iterable[tuple[str, Any, Any, float | None]]:
    """Names, both values, and by how much they may differ; None: not at all."""
    yield "registers", before.registers, after.registers, slack
    for name in ("warps", "shared_bytes", "local_bytes", "local_accesses", "narrow"):
        yield name.replace("_", " "), getattr(before, name), getattr(after, name), None
    yield "number of loops", len(before.loops), len(after.loops), None
    for one, other in zip(before.loops, after.loops, strict=False):
        was, now = one.instructions_per_element or 0.0, other.instructions_per_element or 0.0
        yield "instructions per element", was, now, _INSTRUCTIONS_TOLERANCE * was
        yield "loads in flight", one.in_flight, other.in_flight, slack


COLUMNS = (
    "case", "GPU", "warps", "registers", "shared", "local", "narrow accesses",
    "loads in flight", "instructions per element", "instructions",
)  # fmt: skip


def rows(table: StaticTable) -> list[tuple[str, ...]]:
    """The table's cells under `COLUMNS`. What loops that read a row do: loop by loop."""
    return [
        (
            record.case,
            record.arch,
            str(record.warps),
            str(record.registers),
            str(record.shared_bytes),
            f"{record.local_bytes}" + (f" ({record.local_accesses}x)" if record.spills else ""),
            ", ".join(f"{number} x {kind}" for kind, number in record.narrow.items()) or "none",
            " + ".join(str(loop.in_flight) for loop in record.reading) or "-",
            " + ".join(f"{loop.instructions_per_element:.1f}" for loop in record.reading) or "-",
            str(record.instructions),
        )
        for record in table.records
    ]


def to_markdown(table: StaticTable) -> str:
    """The table as docs/static.md shows it."""
    rule = ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (COLUMNS, rule, *rows(table)))


def print_table(table: StaticTable, console: Console) -> None:
    """Prints the table; spills and narrow accesses to aligned rows in red."""
    shown = Table(title=f"Compiled by Triton {table.triton}, not run", box=SIMPLE_HEAD)
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    previous = ""
    for record, cells in zip(table.records, rows(table), strict=True):
        is_wrong = record.spills or (record.is_aligned and record.narrow)
        name = "" if record.case == previous else record.case
        shown.add_row(name, *cells[1:], style="red" if is_wrong else None)
        previous = record.case
    console.print(shown)


def main(json_path: Path | None = None, check: Path | None = None) -> int:
    """`recap-fast bench --static`: prints the table, and writes it or compares it.

    Args:
        json_path: where to write the table.
        check: a table, as written to `json_path`, to compare it with.

    Returns:
        0; 1 where something uses local memory, does not compile, or is not as in `check`.
    """
    console = Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)
    try:
        table = static_table()
    except StaticAnalysisError as error:
        console.print(str(error), markup=False, style="red")
        return 1
    print_table(table, console)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(to_json(table), encoding="utf-8")
    wrong = [f"{r.case}, {r.arch}: uses local memory" for r in table.records if r.spills]
    if check is not None:
        wrong += differences(from_json(check.read_text(encoding="utf-8")), table)
    for line in wrong:
        console.print(line, markup=False, style="red")
    return 1 if wrong else 0


def _worker(cases: str, *archs: str) -> None:
    """Prints the table as one line of JSON."""
    import triton

    module, function = cases.split(":")
    try:
        records = compile_cases(getattr(importlib.import_module(module), function)(), archs)
    except StaticAnalysisError as error:
        sys.exit(str(error))
    print(to_json(StaticTable(triton.__version__, records)).replace("\n", " "))


if __name__ == "__main__":
    # Under the module's own name, so that its classes are those that the cases are made of.
    from recap_fast.bench import static_analysis

    static_analysis._worker(*sys.argv[1:])
