"""A real run as the trace, and as what is predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from recap_fast.report.metrics import COMPLETION_QUANTILES, read_metrics
from recap_fast.simulate.check import check_run
from recap_fast.simulate.trace import fit_costs, read_trace
from recap_fast.trainer import Trainer
from tests.tiny import save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced")
    config = tiny_config(
        folder, save_tiny_model(folder / "model"), "training.steps=16", "evaluation.before=false",
        "evaluation.after=false", "checkpoint.every=0",
    )  # fmt: skip
    trainer = Trainer(config)
    try:
        trainer.train()
    finally:
        trainer.close()
    return Path(config.run)


def test_a_run_records_what_a_trace_needs(run):
    for row in read_metrics(run):
        lengths = [row[key] for key in COMPLETION_QUANTILES]
        assert lengths == sorted(lengths)
        assert lengths[0] <= row["rollout/completion_tokens"] <= lengths[-1]
        assert row["rollout/completions"] > 1


def test_a_real_run_is_predicted_from_itself(run):
    trace = read_trace([run])
    check = check_run(fit_costs(trace).costs, trace, run)
    assert check.passes, check
    for stage in ("rollout", "train"):
        predicted, measured = check.seconds[stage]
        assert predicted == pytest.approx(measured, rel=0.15), stage
