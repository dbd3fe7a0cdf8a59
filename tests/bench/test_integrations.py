"""Two heads on one model: the comparison switches between them, and refuses a wrong one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest as suites_conftest
from benchmarks import integrations
from benchmarks.inputs import Inputs, Shape, compute_truth, errors
from benchmarks.integrations import CASES, HEADS, OURS, THEIRS, differences, tolerance
from benchmarks.measuring import Replay, seconds_in_turns
from benchmarks.peers import LIGER_LOSSES
from benchmarks.verl_heads import find_python, measure_in_its_environment

CPU = torch.device("cpu")


def test_turns_change_their_order_and_the_first_does_not_count():
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = seconds_in_turns(steps, CPU, rounds=3)
    assert "".join(order) == "baabbaab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_replay_gives_the_times_that_were_taken():
    clock, shown = Replay(), []

    def pedantic(function, rounds):
        for _ in range(rounds):
            start = clock.read()
            function()
            shown.append(clock.read() - start)

    clock.play(SimpleNamespace(pedantic=pedantic), [0.5, 2.0])
    clock.play(SimpleNamespace(pedantic=pedantic), [1.0])
    assert shown == [0.5, 2.0, 1.0]


@pytest.mark.parametrize("suite", integrations.TWO_HEADS)
@pytest.mark.parametrize("case", CASES["small"], ids=str)
def test_both_heads_compute_the_same(suite, case):
    pytest.importorskip("trl")
    with integrations.TWO_HEADS[suite](case, CPU) as heads:
        found = differences(heads)
        assert max(found.values()) <= tolerance(case), found
        assert max(found.values()) > 0, "not even rounding differs: is it the same head twice?"
        for name in HEADS:
            heads.with_head(name, heads.step)()
            heads.with_head(name, heads.small)()
            assert all(parameter.grad is None for parameter in heads.model.parameters())


def test_the_loss_of_the_step_depends_on_the_log_probs():
    """On-policy it would be the mean advantage, whatever a head gives."""
    pytest.importorskip("trl")
    with integrations.two_heads_in_step(CASES["small"][0], CPU) as heads:
        before, _ = heads.backward()
        with torch.no_grad():
            for parameter in heads.model.parameters():
                parameter.mul_(1.5)
        after, _ = heads.backward()
    assert abs(after - before) > 1e-3 * abs(before)


def test_a_head_that_differs_is_not_timed(monkeypatch):
    pytest.importorskip("trl")
    switch = integrations.HeadSwitch
    monkeypatch.setattr(integrations, "HeadSwitch", lambda model: switch(model, temperature=1.1))
    monkeypatch.setattr(integrations, "seconds_in_turns", None)
    with pytest.raises(ValueError, match="wrong: tiny.*differs from TRL's"):
        integrations.measure_heads("trl_head", CASES["small"][0], CPU, rounds=1)


@pytest.mark.parametrize("implementation", LIGER_LOSSES, ids=str)
def test_both_of_ligers_losses_compute_the_same_step(implementation):
    pytest.importorskip("liger_kernel")
    inputs = Inputs.random(Shape(3, 5, 16, 101, "float32"))
    found = errors(inputs, implementation.build(inputs)(), compute_truth(inputs))
    assert max(found.values()) < 1e-5, found


def test_every_comparison_has_theirs_first_and_ours():
    assert (THEIRS, OURS) == HEADS
    assert OURS.startswith("recap-fast")
    for word, cases in CASES.items():
        assert {case.autocast for case in cases} == ({True} if word == "gpu" else {False, True})
        assert len({str(case) for case in cases}) == len(cases)


def test_an_environment_of_verl_that_fails_says_why(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no module of that name' >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="ended with 3: no module of that name"):
        measure_in_its_environment(str(python), Shape(1, 1, 1, 1), rounds=1)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr("benchmarks.verl_heads.find_spec", lambda name: None)
    assert find_python() is None
    (tmp_path / "verl" / "bin").mkdir(parents=True)
    (tmp_path / "verl" / "bin" / "python").touch()
    assert find_python() == str(Path(tmp_path) / "verl" / "bin" / "python")


@pytest.mark.parametrize(
    ("fixtures", "measured", "starts"),
    [(["once"], True, True), (["once"], False, False), ([], True, False)],
)
def test_a_deadline_between_the_two_of_a_pair_loses_neither(
    fixtures, measured, starts, monkeypatch
):
    item = SimpleNamespace(
        config=SimpleNamespace(getoption=lambda name: -1.0),
        path=Path("test_integrations.py"),
        originalname="test_trl_step",
        fixturenames=fixtures,
    )
    monkeypatch.setattr(suites_conftest, "_measured", {"trl_step"} if measured else {"trl_head"})
    if starts:
        suites_conftest.pytest_runtest_setup(item)
    else:
        with pytest.raises(pytest.skip.Exception, match="--deadline were over"):
            suites_conftest.pytest_runtest_setup(item)
