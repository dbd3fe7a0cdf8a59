"""Reading machine code: loops on the control flow that real listings show."""

from __future__ import annotations

import pytest

from recap_fast.bench.sass import innermost_loops, read_instructions, read_kernel

HEADER = " Function k:\n  REG:40 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:528 TEXTURE:0\n"


def listing(*instructions: str) -> str:
    """Numbers instructions in steps of 16 bytes, as cuobjdump prints them."""
    lines = [
        f"        /*{16 * place:04x}*/  {text} ;    /* 0x000000ff */"
        for place, text in enumerate(instructions)
    ]
    return HEADER + "\n".join(lines)


def loops(*instructions: str) -> list[list[int]]:
    """Places of the instructions of each innermost loop."""
    found = innermost_loops(read_instructions(listing(*instructions)))
    return [[i.address // 16 for i in loop] for loop in found]


def test_resources_and_accesses_are_counted() -> None:
    kernel = read_kernel(
        listing(
            "@!P0 LDG.E.128 R4, desc[UR4][R2.64]",
            "@P0 LDG.E.64.CONSTANT R4, desc[UR4][R2.64]",
            "LDG.E.U16 R4, desc[UR4][R2.64]",
            "LDG.E R4, desc[UR4][R2.64]",
            "LDS R1, [R2]",
            "MUFU.EX2 R8, R8",
            "MUFU.RCP R8, R8",
            "STL [R1+0x4], R2",
            "STG.E.U8 desc[UR4][R2.64], R4",
            "EXIT",
            "BRA 0xa0",
            "NOP",
        )
    )
    assert (kernel.registers, kernel.local_bytes, kernel.local_accesses) == (40, 24, 1)
    assert kernel.code.loads == {128: 1, 64: 1, 32: 1, 16: 1}
    assert kernel.code.stores == {8: 1}
    assert kernel.code.bytes_loaded == 16 + 8 + 4 + 2
    assert kernel.code.bytes_stored == 1
    assert kernel.code.exponentials == 1
    assert kernel.code.instructions == 11


def in_flight(*instructions: str) -> int:
    return read_kernel(listing(*instructions, "EXIT")).code.in_flight


LOADS = ("LDG.E.128 R4, desc[UR4][R2.64]", "@!P1 LDG.E.128 R8, desc[UR4][R2.64+0x10]")


def test_loads_that_are_under_way_together() -> None:
    first, second = LOADS
    assert in_flight("MOV R1, R2") == 0
    assert in_flight(first, "FADD R1, R4, R4", second, "FADD R1, R8, R8") == 1
    assert in_flight(first, second, "FADD R1, R4, R4", "FADD R1, R8, R8") == 2
    # The last of the four registers counts; what lies beside them, or is shared memory, does not.
    assert in_flight(first, "FADD R1, R7, R7", second, "FADD R1, R11, R11") == 1
    assert in_flight(first, "FADD R12, R3, R12", second, "FADD R1, R7, R11") == 2
    assert in_flight(first, "LDS.128 R8, [R3]", second, "FADD R1, R7, R11") == 2


def test_a_register_that_is_filled_again_is_waited_for() -> None:
    first, _ = LOADS
    assert in_flight(first, first, "FADD R1, R4, R4") == 1
    assert in_flight(first, "MOV R5, 0xff800000", first, "FADD R1, R4, R4") == 1


def test_a_prefetched_load_is_under_way_across_the_jump_back() -> None:
    first, second = LOADS
    used = ("FADD R1, R4, R4", "FADD R1, R8, R8")
    # Waited for in the next round, when nothing else is under way; then with its own successor.
    assert in_flight(*used, first, second) == 2
    assert in_flight("MOV R12, R4", first, "FADD R1, R12, R12") == 1
    assert in_flight("LDG.E.128 R16, desc[UR4][R2.64]", *used, first, second) == 3


def test_a_loop_is_what_is_repeated() -> None:
    assert loops("MOV R1, R2", "FADD R1, R1, R1", "FMUL R1, R1, R1", "@P0 BRA 0x10", "EXIT") == [
        [1, 2, 3]
    ]


def test_only_the_inner_of_nested_loops() -> None:
    body = ("MOV R1, R2", "FADD R1, R1, R1", "@P1 BRA 0x10", "@P0 BRA 0x0", "EXIT")
    assert loops(*body) == [[1, 2]]


def test_code_moved_out_of_line_belongs_to_its_loop() -> None:
    assert loops(
        "MOV R1, R2",
        "BRA.DIV UR4, 0x50",
        "FADD R1, R1, R1",
        "@P0 BRA 0x10",
        "EXIT",
        "SHFL.BFLY PT, R1, R1",
        "BRA 0x20",
    ) == [[1, 2, 3, 5, 6]]


def test_a_backward_jump_alone_is_no_loop() -> None:
    assert loops("@P0 BRA 0x30", "FADD R1, R1, R1", "EXIT", "MOV R1, R2", "BRA 0x10") == []


def test_a_loop_left_by_a_call_that_does_not_return() -> None:
    assert loops(
        "MOV R1, R2",
        "FADD R1, R1, R1",
        "@P0 CALL.REL.NOINC 0x40",
        "BRA 0x10",
        "FMUL R1, R1, R1",
        "@P1 BRA 0x40",
        "EXIT",
    ) == [[1, 2, 3], [4, 5]]


def test_uniform_conditions_among_the_operands() -> None:
    assert loops("FADD R1, R1, R1", "BRA.U UP0, 0x0", "EXIT") == [[0, 1]]


def test_indirect_branches_are_refused() -> None:
    with pytest.raises(ValueError, match="direct branches only"):
        read_kernel(listing("BRX R2 -0x10", "EXIT"))


def test_text_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted a listing of cuobjdump, got 'nothing'"):
        read_kernel("nothing")
