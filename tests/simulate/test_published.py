"""What docs/rollouts.md says of the published runs, where they are met and where they are not: a
change of the model that moves them shows here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recap_fast.simulate import published
from recap_fast.simulate.pipeline import SetUp
from recap_fast.simulate.published import CASES, LIMIT, alternatives, nemo_qwen3_30b


def test_verl_is_predicted_from_its_colocated_run():
    assert abs(published.verl_qwen25_7b().error) <= LIMIT


@pytest.mark.parametrize(
    ("case", "low", "high"),
    [
        (published.nemo_qwen3_30b, 0.20, 0.25),
        (published.nemo_deepseek_v3, 0.15, 0.21),
        (published.nemo_qwen3_30b_far, 0.25, 0.35),
    ],
)
def test_nemo_is_predicted_too_slow_with_the_stages_of_an_older_version(case, low, high):
    """It does not publish the stages of the version whose steps it publishes."""
    assert low < case().error < high


@pytest.mark.parametrize("case", [published.nemo_qwen3_30b, published.nemo_deepseek_v3])
def test_the_pause_for_weights_is_what_nemo_differs_by(case):
    without = alternatives(case())["no pause for weights"]
    assert without is not None
    assert abs(without.error) <= LIMIT


def test_a_trace_of_other_work_predicts_nothing():
    """verl's update on 32 GPUs took 270 s colocated, and 157 s in the run that is predicted."""
    assert published.verl_qwen25_7b_small().error > 1


def test_the_stages_of_the_synchronous_run_are_met():
    """Replayed in turns, a case takes what its own stages add up to."""
    case = nemo_qwen3_30b()
    again = replace(case, set_up=SetUp(32, 32, colocated=True)).predict()
    assert again.step_seconds == pytest.approx(192, rel=0.03)


@pytest.mark.slow
def test_the_table_has_every_case(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    published.main()
    text = capsys.readouterr().out
    for case in CASES:
        assert case().name in text
    assert "no pause for weights" in text
