"""Writes worked_sums.jsonl, the replayed rows of smollm2-cpu.yaml: small sums, worked out in words.

python examples/make_worked_sums.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

ROWS, LARGEST, SEED = 600, 20, 0
OPERATIONS = {
    "plus": ("+", int.__add__),
    "minus": ("-", int.__sub__),
    "times": ("*", int.__mul__),
}


def main() -> None:
    generator = random.Random(SEED)
    cases = [(a, word, b) for a in range(LARGEST) for word in OPERATIONS for b in range(LARGEST)]
    path = Path(__file__).with_name("worked_sums.jsonl")
    with path.open("w", encoding="utf-8") as file:
        for a, word, b in generator.sample(cases, ROWS):
            symbol, operation = OPERATIONS[word]
            result = operation(a, b)
            row = {
                "question": f"What is {a} {word} {b}?",
                "answer": f"{a} {symbol} {b} = {result} <answer>{result}</answer>",
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
