"""Kernels for the tests of the static analysis, which compiles them in processes of its own."""

import torch
import triton
import triton.language as tl

from recap_fast.bench.static_analysis import Case
from recap_fast.ops.launch import Launch

BLOCK, WARPS = 2048, 8


@triton.jit
def exp_kernel(source_ptr, source_stride, target_ptr, size, BLOCK_V: tl.constexpr):
    """A row's exponentials."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, size, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < size
        x = tl.load(source_ptr + row * source_stride + columns, mask=inside)
        tl.store(target_ptr + row * source_stride + columns, tl.exp(x), mask=inside)


@triton.jit
def spilling_kernel(source_ptr, target_ptr, size, BLOCK_V: tl.constexpr):
    """Holds a block in registers while it reads on."""
    columns = tl.arange(0, BLOCK_V)
    first = tl.load(source_ptr + columns)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, size, BLOCK_V):
        total = total * first + tl.exp(tl.load(source_ptr + start + columns))
    tl.store(target_ptr + columns, total + first)


@triton.jit
def broken_kernel(source_ptr):
    tl.store(source_ptr, undefined_name)  # noqa: F821


def exponentials(name: str, columns: int, is_aligned: bool) -> Case:
    source, target = torch.empty(4, columns), torch.empty(4, columns)
    arguments = {
        "source_ptr": source,
        "source_stride": columns,
        "target_ptr": target,
        "size": columns,
        "BLOCK_V": BLOCK,
        "num_warps": WARPS,
    }
    return Case(name, Launch(exp_kernel, (4,), arguments), is_aligned)


def spilling() -> Case:
    x = torch.empty(1 << 14)
    # 128 elements a thread, three times: more than its 255 registers.
    arguments = {"source_ptr": x, "target_ptr": x, "size": x.numel(), "BLOCK_V": 2 * BLOCK}
    return Case("spilling", Launch(spilling_kernel, (1,), arguments | {"num_warps": 1}))


def good_and_bad() -> list[Case]:
    return [
        exponentials("aligned", 4096, True),
        exponentials("the same again", 4096, True),
        exponentials("unaligned", 4097, False),
        spilling(),
    ]


def broken() -> list[Case]:
    return [Case("broken", Launch(broken_kernel, (1,), {"source_ptr": torch.empty(4)}))]
