"""Reads what cuobjdump prints of a compiled kernel: resources, memory accesses, innermost loops.

Loops are the natural loops of the control flow graph, so that code which the assembler moves out of
line (warp-synchronous fallbacks, slow division) is counted where it belongs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"(?P<operands>[^;]*);"
)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_WIDTH = re.compile(r"\.(?:[US])?(8|16|64|128|256)(?:\.|$)")
_LOADS = {"LDG", "LD", "LDGSTS"}
_STORES = {"STG", "ST"}
_LOCAL = {"LDL", "STL"}
_ENDS = {"EXIT", "RET"}
# The assembler leaves loops by a guarded call that never returns, so a call may go both ways.
_BRANCHES = {"BRA", "CALL"}
_UNREADABLE = {"BRX", "BRXU", "JMX", "JMXU"}


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers, e.g. "LDG.E.128"
    may_fall_through: bool  # control may reach the next instruction
    target: int | None  # of a branch or a call
    registers: tuple[int, ...]  # that its operands name, a load's destination first

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bits of a memory access."""
        match = _WIDTH.search(self.opcode)
        return 32 if match is None else int(match[1])

    @property
    def loaded(self) -> set[int]:
        """Registers that a global load into registers fills, one for each 32 bits."""
        if self.name not in _LOADS - {"LDGSTS"} or not self.registers:
            return set()
        first = self.registers[0]
        return set(range(first, first + max(1, self.width // 32)))


@dataclass(frozen=True, slots=True)
class Code:
    """Some instructions, counted. Widths are in bits, accesses those of global memory."""

    instructions: int
    loads: dict[int, int]  # width -> how many
    stores: dict[int, int]
    exponentials: int
    in_flight: int
    """Global loads that a thread has under way when it first waits for one of them, at most, where
    the instructions are repeated: as many latencies pass at once. See `loads_in_flight`."""

    @property
    def bytes_loaded(self) -> int:
        """By one thread that runs every instruction once; `bytes_stored` likewise."""
        return sum(width // 8 * number for width, number in self.loads.items())

    @property
    def bytes_stored(self) -> int:
        return sum(width // 8 * number for width, number in self.stores.items())


@dataclass(frozen=True, slots=True)
class Kernel:
    """A compiled kernel."""

    registers: int  # of a thread
    local_bytes: int  # of a thread: its stack and what does not fit into registers
    local_accesses: int  # instructions that touch local memory; spills show here
    code: Code
    loops: list[Code]  # innermost loops in the order of their addresses


def read_kernel(listing: str) -> Kernel:
    """Reads the output of `cuobjdump -sass -res-usage` for a file with one kernel.

    Raises:
        ValueError: no kernel is in it, or its control flow has indirect branches.
    """
    resources = _RESOURCES.search(listing)
    instructions = read_instructions(listing)
    if resources is None or not instructions:
        raise ValueError(f"wanted a listing of cuobjdump, got {listing[:200]!r}")
    unreadable = {i.opcode for i in instructions if i.name in _UNREADABLE}
    if unreadable:
        raise ValueError(f"wanted direct branches only, got {sorted(unreadable)}")
    registers, stack, _, local = map(int, resources.groups())
    return Kernel(
        registers=registers,
        local_bytes=stack + local,
        local_accesses=sum(i.name in _LOCAL for i in instructions),
        code=count(instructions),
        loops=[count(loop) for loop in innermost_loops(instructions)],
    )


def read_instructions(listing: str) -> list[Instruction]:
    """The instructions of a listing, in their order."""
    found = []
    for line in listing.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, target = match["opcode"].partition(".")[0], None
        operands = match["operands"].split()
        if name in _BRANCHES:
            target = int(operands[-1], 16)
        # "BRA.U UP0, 0x8e0" and "BRA.DIV UR4, 0x510" carry their condition among the operands.
        is_certain = match["guard"] is None and (len(operands) == 1 or name in _ENDS)
        falls = not (is_certain and name in _ENDS | {"BRA"})
        registers = tuple(int(number) for number in _REGISTER.findall(match["operands"]))
        address = int(match["address"], 16)
        found.append(Instruction(address, match["opcode"], falls, target, registers))
    return found


def count(instructions: Iterable[Instruction]) -> Code:
    """Counts instructions by what the table shows, without padding."""
    instructions = [i for i in instructions if i.name != "NOP"]
    return Code(
        instructions=len(instructions),
        loads=_widths(i for i in instructions if i.name in _LOADS),
        stores=_widths(i for i in instructions if i.name in _STORES),
        exponentials=sum(i.opcode == "MUFU.EX2" for i in instructions),
        in_flight=loads_in_flight(instructions),
    )


def _widths(accesses: Iterable[Instruction]) -> dict[int, int]:
    counts = Counter(access.width for access in accesses)
    return dict(sorted(counts.items(), reverse=True))


def loads_in_flight(body: Sequence[Instruction]) -> int:
    """The most global loads into registers that are under way whenever one is waited for.

    A thread goes on behind a load until an instruction reads or overwrites what it fills. A loop's
    body is run through twice in the order of its addresses: a load that is prefetched for the next
    round is under way across the jump back.
    """
    under_way: list[set[int]] = []
    most = 0
    for instruction in (*body, *body):
        touched = instruction.loaded | set(instruction.registers)
        awaited = [load for load in under_way if load & touched]
        if awaited:
            most = max(most, len(under_way))
            under_way = [load for load in under_way if load not in awaited]
        if instruction.loaded:
            under_way.append(instruction.loaded)
    return most


def innermost_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of the loops that contain no other, in the order of their addresses."""
    blocks = _basic_blocks(instructions)
    dominators = _dominators({start: after for start, (_, after) in blocks.items()})
    loops: dict[int, set[int]] = {}
    for start in dominators:
        for header in blocks[start][1]:
            if header in dominators[start]:
                loops.setdefault(header, {header}).update(_body(header, start, blocks))
    return [
        [instruction for start in sorted(body) for instruction in blocks[start][0]]
        for header, body in sorted(loops.items())
        if not any(other in body for other in loops if other != header)
    ]


_Blocks = dict[int, tuple[list[Instruction], list[int]]]
"""By the address of its first instruction: a block and the addresses of those that may follow."""


def _basic_blocks(instructions: list[Instruction]) -> _Blocks:
    addresses = [i.address for i in instructions]
    starts = {addresses[0]} | {i.target for i in instructions if i.target is not None}
    starts |= {
        after
        for i, after in zip(instructions, addresses[1:], strict=False)
        if i.target is not None or i.name in _ENDS
    }
    blocks: _Blocks = {}
    for position, instruction in enumerate(instructions):
        if instruction.address in starts:
            block: list[Instruction] = []
            blocks[instruction.address] = (block, [])
        block.append(instruction)
        after = addresses[position + 1] if position + 1 < len(addresses) else None
        if after in starts or after is None:
            blocks[block[0].address][1].extend(_successors(instruction, after))
    return blocks


def _successors(last: Instruction, after: int | None) -> list[int]:
    found = [after] if last.may_fall_through and after is not None else []
    return found if last.target is None else [*found, last.target]


def _dominators(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each block that can be reached: the blocks on every path to it from the entry."""
    entry = next(iter(successors))
    order, seen, stack = [], {entry}, [entry]
    while stack:
        block = stack.pop()
        order.append(block)
        fresh = [after for after in successors[block] if after not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for after in successors[block]:
            predecessors[after].append(block)
    found = {block: set(order) for block in order}
    found[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = {block} | set.intersection(*(found[before] for before in predecessors[block]))
            changed |= new != found[block]
            found[block] = new
    return found


def _body(header: int, end: int, blocks: _Blocks) -> set[int]:
    """Blocks from which `end` is reached without passing `header`, `header` included."""
    body, stack = {header}, [end]
    while stack:
        block = stack.pop()
        if block not in body:
            body.add(block)
            stack.extend(start for start, (_, after) in blocks.items() if block in after)
    return body
