"""A rank: the real trainer with rewards of its own, then the same run resumed half way."""

from __future__ import annotations

import faulthandler
import gc
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from recap_fast.integrations.trl_trainer import RecapGRPOTrainer
from tests.integrations.trl_runs import SHIFTED, TABLE, functions, make, settings
from tests.processes import report


class Recorded(RecapGRPOTrainer):
    """Remembers what it hands on to its loss, before the parts are shuffled."""

    handed_on: list[float]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.handed_on = output["advantages"].tolist()
        return output


def run(folder: Path, model: Path, tables: list[Any]) -> Recorded:
    args = settings(
        folder, per_device_train_batch_size=2, max_steps=2, save_strategy="steps", save_steps=1
    )
    rank = args.distributed_state.process_index
    mine = functions(*tables, rows=slice(4 * rank, 4 * rank + 4))
    trainer: Recorded = make(Recorded, model, args, mine, reweighting_parameters={"window": 1})
    return trainer


def results(model: Path, folder: Path) -> dict[str, Any]:
    whole = run(folder, model, [TABLE, SHIFTED])
    whole.train()
    resumed = run(folder, model, [SHIFTED])
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-1"))
    return {
        "processes": whole.accelerator.num_processes,
        "weights": whole.reweighter.weights.tolist(),
        "rates": whole.reweighter.rates.tolist(),
        "advantages": whole.handed_on,
        "resumed": resumed.reweighter.weights.tolist(),
    }


def main() -> None:
    faulthandler.dump_traceback_later(150, exit=True)  # says where a rank waits, and ends it
    report(**results(*map(Path, sys.argv[1:])))
    # The trainers' DDP first: torch waits for ever where it outlives the process group.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
