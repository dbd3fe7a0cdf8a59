from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recap_fast.report.metrics import read_metrics
from recap_fast.simulate.trace import TraceError, fit_costs, read_trace, workload_of
from tests.simulate.traces import COSTS, make_config, write_trace


def edit(run: Path, change) -> Path:
    """Applies a function to every row that a run recorded."""
    rows = read_metrics(run)
    for row in rows:
        change(row)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_costs_come_back_from_what_they_made(tmp_path):
    fit = fit_costs(read_trace([write_trace(tmp_path / "run")]))
    for name in ("decode_step", "decode_request", "train_fixed", "train_token", "reward", "sync"):
        assert getattr(fit.costs, name) == pytest.approx(getattr(COSTS, name), rel=1e-3), name
    assert fit.costs.other == pytest.approx(0.05, rel=1e-3)
    assert fit.rollout_error < 1e-3
    assert fit.notes == ()


def test_noise_is_averaged_out_and_said(tmp_path):
    fit = fit_costs(read_trace([write_trace(tmp_path / "run", steps=60, noise=0.05)]))
    assert fit.costs.decode_step == pytest.approx(COSTS.decode_step, rel=0.1)
    assert fit.costs.decode_request == pytest.approx(COSTS.decode_request, rel=0.1)
    assert 0.02 < fit.rollout_error < 0.1


def test_the_first_step_is_left_out(tmp_path):
    trace = read_trace([write_trace(tmp_path / "run", steps=7)])
    assert len(trace.steps) == 6


def test_runs_on_other_numbers_of_processes_tell_what_one_does_not(tmp_path):
    alone = write_trace(tmp_path / "one", vary=False)
    many = write_trace(tmp_path / "four", processes=4, vary=False, seed=1)
    fit = fit_costs(read_trace([alone]))
    assert len(fit.notes) == 2
    assert fit.costs.train_fixed == 0
    both = fit_costs(read_trace([alone, many]))
    assert both.notes == ()
    assert both.costs.train_fixed == pytest.approx(COSTS.train_fixed, rel=1e-2)
    assert both.costs.decode_step == pytest.approx(COSTS.decode_step, rel=1e-2)


def test_whatever_is_assumed_the_means_are_those_of_the_trace(tmp_path):
    trace = read_trace([write_trace(tmp_path / "run", vary=False, noise=0.2)])
    costs = fit_costs(trace).costs
    rollout = np.mean([s.times["rollout"] for s in trace.steps])
    fitted = [
        costs.decode_step * s.lengths.longest + costs.decode_request * s.sampled_tokens
        for s in trace.steps
    ]
    assert np.mean(fitted) == pytest.approx(rollout)


def test_no_cost_is_negative(tmp_path):
    costs = replace(COSTS, decode_step=0.0, train_fixed=0.0)
    fit = fit_costs(read_trace([write_trace(tmp_path / "run", costs=costs, noise=0.02)]))
    assert min(fit.costs.decode_step, fit.costs.train_fixed) >= 0
    assert fit.costs.decode_request == pytest.approx(COSTS.decode_request, rel=0.3)


def test_the_work_is_the_configurations_and_the_lengths_are_the_traces(tmp_path):
    trace = read_trace([write_trace(tmp_path / "run", rows=8)])
    work = workload_of(trace, make_config(tmp_path, rows=24, group_size=16))
    assert (work.groups, work.group_size) == (24, 16)
    assert work.trained_per_sampled == pytest.approx([1.5] * 19)
    shorter = workload_of(trace, make_config(tmp_path, max_new_tokens=64))
    assert max(lengths.longest for lengths in shorter.lengths) == 64


def test_rows_without_rollouts_are_no_groups(tmp_path):
    run = write_trace(tmp_path / "run", rows=8)

    def half(row):
        if row["step"]:
            row["rollout/completions"] //= 2

    trace = read_trace([edit(run, half)])
    assert workload_of(trace, make_config(tmp_path, rows=40)).groups == 20


def test_a_step_without_rollouts_is_no_step_of_the_trace(tmp_path):
    run = write_trace(tmp_path / "run", steps=10)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 11, "rollout/completions": 0, "time/total": 1.0}) + "\n")
    assert len(read_trace([run]).steps) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("time/sync", None), r"step 1 has no time/sync: a trace is a run"),
        (
            lambda row: [row.pop(k) for k in list(row) if "completion_tokens_" in k],
            r"step 1 has no rollout/completion_tokens_min \(nor 6 others\)",
        ),
    ],
)
def test_a_trace_without_what_it_needs_is_refused(tmp_path, change, message):
    run = edit(write_trace(tmp_path / "run"), change)
    with pytest.raises(TraceError, match=message):
        read_trace([run])


def test_a_trace_of_too_few_steps_is_refused(tmp_path):
    with pytest.raises(TraceError, match=r"wanted at least 6 \(the first also warms up\), got 5"):
        read_trace([write_trace(tmp_path / "run", steps=5)])


def test_no_run_no_processes_no_trace(tmp_path):
    with pytest.raises(TraceError, match=r"not a run's folder \(it has no config.yaml\)"):
        read_trace([tmp_path])
    run = write_trace(tmp_path / "run")
    (run / "machine.json").write_text('{"cpu": "old"}')
    with pytest.raises(TraceError, match="does not say how many processes"):
        read_trace([run])


def test_an_asynchronous_run_is_no_trace(tmp_path):
    run = write_trace(tmp_path / "run", engine="vllm_server", **{"async": {"depth": 1}})
    with pytest.raises(TraceError, match="an asynchronous run, whose stages overlap"):
        read_trace([run])


def test_traces_of_other_work_are_refused(tmp_path):
    runs = [write_trace(tmp_path / "a", rows=8), write_trace(tmp_path / "b", rows=16)]
    with pytest.raises(TraceError, match=r"data.batch_size: .*/a has 8, .*/b has 16"):
        read_trace(runs)


def test_a_configuration_that_the_trace_says_nothing_of_is_refused(tmp_path):
    trace = read_trace([write_trace(tmp_path / "run", vary=False)])
    other = make_config(tmp_path)
    model = other.model.model_copy(update={"path": "another"})
    other = other.model_copy(update={"model": model})
    with pytest.raises(TraceError, match=r"model.path: the trace is of smollm2-135m-instruct"):
        workload_of(trace, other)
    with pytest.raises(TraceError, match=r"max_new_tokens: 512 is wanted, .* cut at 256"):
        workload_of(trace, make_config(tmp_path, max_new_tokens=512))
