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


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("depth", [0, 1])
def test_servers_have_gpus_of_their_own(tmp_path, depth, tensor_parallel_size):
    servers = {
        "engine": "vllm_server", "server": {"count": 3},
        "tensor_parallel_size": tensor_parallel_size,
    }  # fmt: skip
    first = write_trace(tmp_path / "first", steps=12, **servers)
    run = write_trace(tmp_path / "run", steps=12, **servers, **{"async": {"depth": depth}})
    set_up = checked(first, run).set_up
    assert (set_up.trainer_gpus, set_up.engine_gpus) == (1, 3 * tensor_parallel_size)
    assert (set_up.depth, set_up.colocated) == (depth, False)


@pytest.mark.parametrize(
    ("server", "engines"),
    [({"count": 4}, 4), ({"urls": ["http://a:1", "http://b:1"]}, 2), ({}, 1)],
)
def test_a_trace_says_how_many_servers_sampled(tmp_path, server, engines):
    run = write_trace(tmp_path / "run", engine="vllm_server", server=server)
    trace = read_trace([run])
    assert {step.engines for step in trace.steps} == {engines}
    alone = fit_costs(read_trace([write_trace(tmp_path / "alone")])).costs
    assert fit_costs(trace).costs.decode_request == pytest.approx(
        engines * alone.decode_request, rel=1e-6
    )
