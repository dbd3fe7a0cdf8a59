"""Processes that have imported everything before they start.

Importing torch, transformers and the trainer takes a rank ten seconds of a core, more than most
tests of several ranks, and vLLM another ten. This program imports them once, with the modules that
it is given, and is forked into the ranks of one test after another. It starts what is asked for on
its standard input, a JSON line each, and answers with a line when all ranks have ended.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
from typing import Any

import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
from transformers import (  # noqa: F401 (transformers imports what is asked for, when it is)
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
)

import recap_fast.trainer  # noqa: F401


def main() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    torch.set_num_threads(1)
    # What is left by a test must not be in the way of the next, nor be waited for.
    for line in iter(sys.stdin.readline, ""):
        task = json.loads(line)
        children = {}
        for rank in range(task["processes"]):
            pid = os.fork()
            if pid == 0:
                _become(task, rank)
                return
            children[pid] = rank
        print(json.dumps({"failed": _wait(children)}), flush=True)


def _become(task: dict[str, Any], rank: int) -> None:
    os.setsid()
    with open(task["output"], "a", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 0)
    size = str(task["processes"])
    os.environ |= task["environment"] | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(task["port"]),
    }  # fmt: skip
    sys.argv = [task["script"], *task["arguments"]]
    runpy.run_path(task["script"], run_name="__main__")


def _wait(children: dict[int, int]) -> list[list[int]]:
    """[[rank, status]] of those that failed; the first one that does ends the others."""
    failed = []
    while children:
        pid, status = os.wait()
        rank = children.pop(pid, None)
        if rank is None or status == 0:
            continue
        failed.append([rank, os.waitstatus_to_exitcode(status)])
        for other in children:
            os.killpg(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    main()
