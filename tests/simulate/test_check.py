from __future__ import annotations

from dataclasses import replace

import pytest

from recap_fast.simulate.check import check_run
from recap_fast.simulate.trace import TraceError, fit_costs, read_trace
from tests.simulate.traces import COSTS, write_trace


def checked(trace_run, run, **arguments):
    trace = read_trace([trace_run])
    return check_run(fit_costs(trace).costs, trace, run, **arguments)


def test_a_run_predicts_itself(tmp_path):
    run = write_trace(tmp_path / "run", steps=24, noise=0.05)
    check = checked(run, run)
    assert check.passes
    for stage, (predicted, measured) in check.seconds.items():
        assert predicted == pytest.approx(measured, rel=0.03), stage
    assert check.seconds.keys() == {"step", "train", "sync", "rollout", "reward"}


@pytest.mark.parametrize(("rows", "processes"), [(16, 1), (8, 4), (32, 8)])
def test_a_run_predicts_others_of_the_same_costs(tmp_path, rows, processes):
    first = write_trace(tmp_path / "a", noise=0.02)
    other = write_trace(tmp_path / "b", rows=rows, processes=processes, noise=0.02)
    check = checked(first, other)
    assert check.set_up.engine_gpus == processes
    assert check.passes


def test_a_slower_run_is_not_passed(tmp_path):
    first = write_trace(tmp_path / "a")
    other = write_trace(tmp_path / "b", costs=replace(COSTS, train_token=0.003))
    check = checked(first, other)
    assert not check.passes
    assert check.error < -0.1
    assert check.seconds["rollout"][0] == pytest.approx(check.seconds["rollout"][1], rel=0.05)


def test_what_cannot_be_compared_is_said(tmp_path):
    run = write_trace(tmp_path / "run")
    with pytest.raises(TraceError, match=r"not a run's folder"):
        checked(run, tmp_path / "none")
    short = write_trace(tmp_path / "short", steps=3)
    with pytest.raises(TraceError, match=r"too few steps to compare with: .* got 3"):
        checked(run, short)


def test_an_asynchronous_run_needs_its_split(tmp_path):
    first = write_trace(tmp_path / "first", steps=12)
    asynchronous = {"engine": "vllm_server", "async": {"depth": 1}}
    run = write_trace(tmp_path / "run", steps=12, **asynchronous)
    with pytest.raises(TraceError, match=r"--split TRAINER:ENGINES says which GPUs it had"):
        checked(first, run)
    check = checked(first, run, split=(1, 1))
    assert check.set_up.depth == 1
    assert check.error < -0.2  # both sides at once
    assert "rollout" not in check.seconds
