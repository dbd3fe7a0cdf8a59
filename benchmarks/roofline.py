"""The fewest seconds that the fused head and loss can take on a GPU, counted from its algorithm.

    python benchmarks/roofline.py [--tflops 790] [--tbps 4.3] [--chunk 4096]

Every figure is PREDICTED from two rates, by default those of one H200: bf16 matrix products of
large shapes, and device memory. Counted, for N tokens, H hidden, V vocabulary, chunks of C tokens:

    GEMMs   3 of 2*N*H*V floating-point operations
    rows    logits read and overwritten by their gradient. bf16: 2 + 2 bytes a logit, as the rows
            in flight (132 of 304 KB) are still in the L2 cache when the kernel reads them again;
            float32: 4 + 4 + 2, as they are not.
    dW      [V, H] float32 read and written once a chunk beyond the first, in the GEMM's epilogue
    cast    dW rounded to bf16 for a bf16 weight: 4 + 2 bytes an element
    scale   backward multiplies dX and dW by the loss's gradient: one read and one write of each
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

VOCABULARY = 151936


@dataclass(frozen=True, slots=True)
class Rates:
    """Ceilings of a device."""

    flops: float  # per second
    bandwidth: float  # bytes per second


def milliseconds(
    n: int, h: int, v: int, chunk: int, logit_bytes: int, rates: Rates
) -> dict[str, float]:
    """Predicted time by part, in ms; "floor" is the three GEMMs, "total" adds everything up."""
    chunks = -(-n // chunk)
    gemms = 3 * 2 * n * h * v / rates.flops
    memory = {
        "rows": n * v * ((logit_bytes if logit_bytes == 2 else 2 * logit_bytes) + 2),
        "dW": 2 * (chunks - 1) * v * h * 4,
        "cast": v * h * 6,
        "scale": 2 * (n * h + v * h) * 2,
    }
    parts = {name: size / rates.bandwidth * 1e3 for name, size in memory.items()}
    return {"floor": gemms * 1e3, **parts, "total": gemms * 1e3 + sum(parts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tflops", type=float, default=790.0)
    parser.add_argument("--tbps", type=float, default=4.3)
    parser.add_argument("--chunk", type=int, default=4096)
    options = parser.parse_args()
    rates = Rates(options.tflops * 1e12, options.tbps * 1e12)
    print(
        f"PREDICTED ms at {options.tflops:g} TFLOP/s, {options.tbps:g} TB/s, chunk {options.chunk}"
    )
    print("| N | H | logits | 3 GEMMs | rows | dW | cast | scale | total | of 3 GEMMs |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for n in (8192, 32768, 131072):
        for h in (2048, 3584):
            for name, size in (("bf16", 2), ("float32", 4)):
                t = milliseconds(n, h, VOCABULARY, options.chunk, size, rates)
                cells = [
                    f"{t[key]:.1f}" for key in ("floor", "rows", "dW", "cast", "scale", "total")
                ]
                print(
                    f"| {n} | {h} | {name} | {' | '.join(cells)} | {t['total'] / t['floor']:.2f}x |"
                )


if __name__ == "__main__":
    main()
