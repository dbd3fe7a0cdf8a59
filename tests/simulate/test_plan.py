from __future__ import annotations

from dataclasses import replace

import pytest

from recap_fast.config import ConfigError
from recap_fast.simulate.pipeline import Costs
from recap_fast.simulate.plan import modes, parse_split, plan, splits
from recap_fast.simulate.trace import asynchrony
from recap_fast.simulate.workload import Workload, clipped_lognormal
from recap_fast.types import UserError
from tests.simulate.traces import make_config

COSTS = Costs(0.01, 0.0005, 0.1, 0.001, sync=0.1)
WORK = Workload(16, 4, (clipped_lognormal(100, 400, 0.6),), (1.0,))


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


def test_every_set_up_is_tried_on_every_number_of_gpus(config):
    found = plan(COSTS, WORK, config)
    assert [(c.gpus, c.mode.name.split(",")[0]) for c in found.choices] == [
        (gpus, name)
        for gpus in (8, 64, 512)
        for name in ("synchronous", "one step off", "asynchronous")
    ]
    for choice in found.choices:
        assert choice.outcome.set_up.gpus == choice.gpus


def test_the_split_follows_the_slower_side(config):
    heavy = plan(replace(COSTS, train_token=0.01), WORK, config, [16])
    light = plan(replace(COSTS, train_token=0.0001), WORK, config, [16])
    for few, many in zip(light.choices[1:], heavy.choices[1:], strict=True):
        assert few.outcome.set_up.trainer_gpus < 8 < many.outcome.set_up.trainer_gpus


@pytest.mark.parametrize("gpus", [5, 24])
def test_no_other_split_is_much_faster(config, gpus):
    found = plan(COSTS, WORK, config, [gpus]).choices[1]
    for trainer in range(1, gpus):
        other = plan(COSTS, WORK, config, split=(trainer, gpus - trainer)).choices[1]
        assert found.outcome.step_seconds <= 1.05 * other.outcome.step_seconds


def test_in_turns_is_recommended_where_nothing_overlaps(config):
    alone = plan(replace(COSTS, decode_step=1e-6, decode_request=1e-9), WORK, config, [8])
    assert alone.recommended(8).mode.colocated
    overlapped = plan(COSTS, WORK, config, [8])
    assert not overlapped.recommended(8).mode.colocated


def test_staleness_is_not_bought_for_nothing(config):
    # The trainer is the slower side: one step off hides all that can be hidden.
    found = plan(replace(COSTS, train_token=0.1), WORK, config, split=(4, 4))
    assert found.recommended(8).mode.name in ("one step off", "synchronous, colocated")


def test_engines_are_whole(config):
    assert splits(8, 4, 1) == [4]
    assert splits(8, 1, 2) == [2, 4, 6]
    assert splits(4, 4, 1) == []
    wide = replace(COSTS, engine_gpus=2)
    for choice in plan(wide, WORK, config, [8]).choices:
        assert choice.outcome.set_up.engine_gpus % 2 == 0


@pytest.mark.parametrize(
    ("gpus", "split", "message"),
    [
        ([1], None, r"--gpus 1: a trainer \(at least 1\) and an engine \(2\) of their own need at"),
        ([7], None, r"--gpus 7: rollout.tensor_parallel_size is 2, which does not divide it"),
        ([8, 16], (6, 2), r"--split 6:2 makes 8 GPUs, and --gpus says 8, 16"),
        ([], (5, 3), r"--split 5:3: the engines' GPUs must be a multiple of 2"),
    ],
)
def test_numbers_of_gpus_that_contradict_are_refused(config, gpus, split, message):
    with pytest.raises((ConfigError, UserError), match=message):
        plan(replace(COSTS, engine_gpus=2), WORK, config, gpus, split=split)


def test_replicas_bound_the_trainer(tmp_path):
    config = make_config(tmp_path)
    distributed = config.distributed.model_copy(update={"replicas": 3})
    config = config.model_copy(update={"distributed": distributed})
    with pytest.raises(ConfigError, match=r"--gpus 8: distributed.replicas is 3"):
        plan(COSTS, WORK, config, [8])


@pytest.mark.parametrize("text", ["6", "6:0", "a:b", "6:2:1", "-1:3", ""])
def test_a_split_is_two_numbers(text):
    with pytest.raises(UserError, match="--split: wanted GPUs of the trainer and of the engines"):
        parse_split(text)


def test_a_split_is_read():
    assert parse_split("6:2") == (6, 2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"depth": 1, "max_staleness": 4}, (1, 4)),
        ({"depth": 2}, (2, 2)),
        ({"depth": 0}, None),
    ],
)
def test_the_configurations_own_asynchrony_is_taken(tmp_path, settings, expected):
    config = make_config(tmp_path, engine="vllm_server", **{"async": settings})
    assert asynchrony(config) == expected
    if expected:
        assert [(mode.depth, mode.max_staleness) for mode in modes(config)][-1] == expected


def test_a_synchronous_configuration_has_a_usual_asynchrony(config):
    assert asynchrony(config) is None
    assert [(mode.depth, mode.max_staleness) for mode in modes(config)] == [(0, 0), (1, 1), (2, 3)]
