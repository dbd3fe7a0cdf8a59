"""The prediction for many GPUs: its arithmetic, its sources, and what it is held against."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks import scaling, scaling_runs
from benchmarks.on_gpu.scaling import decoder
from benchmarks.scaling_model import (
    SHAPES,
    Machine,
    Work,
    collective,
    decode_step,
    fewest_replicas_apart,
    fits,
    layer_compute,
    overlapped,
    replicas_sum,
    step_seconds,
    train_seconds,
)
from benchmarks.training_step import WORKLOADS

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine()
SEVEN = SHAPES["7B"]


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_transformers(name):
    shape = SHAPES[name]
    config = Qwen2Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == pytest.approx(model.num_parameters(), rel=1e-3)  # biases and norms


def test_every_constant_has_a_source():
    for name, source in MACHINE.sources.items():
        known = ("data sheet", "nccl", "paper", "default", "ESTIMATE")
        assert any(word.lower() in source.lower() for word in known), name


def test_a_ring_by_hand():
    machine = replace(
        MACHINE, base=1.0, nvlink_step=0.1, network_step=10.0, nvlink=7.0, network=3.0
    )
    assert collective(machine, 16.0, 1) == 0
    assert collective(machine, 16.0, 8) == pytest.approx(1 + 7 * 0.1 + 14 / 7)
    assert collective(machine, 16.0, 16) == pytest.approx(1 + 14 * 0.1 + 10 + 15 / 3)


def test_copies_are_summed_by_hand():
    machine = replace(MACHINE, base=1.0, network_step=0.25, card=5.0)
    assert replicas_sum(machine, 80.0, 8, 1) == 0
    # 10 bytes each, which twice 3/4 of pass through a card.
    assert replicas_sum(machine, 80.0, 8, 4) == pytest.approx(1 + 6 * 0.25 + 10 * 1.5 / 5)


def test_communication_hides_behind_what_computes():
    machine = replace(MACHINE, nccl_share=0.25)
    assert overlapped(machine, 8.0, 4.0) == 9.0
    assert overlapped(machine, 4.0, 8.0) == 8.0
    assert overlapped(machine, 4.0, 0.0) == 4.0


def test_products_are_the_training_steps():
    """benchmarks/training_step.py counts them by itself: 6 operations a parameter and token."""
    workload = WORKLOADS["gpu"]
    machine = replace(MACHINE, gemm=1.0, memory=1e30, attention=1e30, launch=0)
    forward, backward = layer_compute(
        machine, decoder(workload), Work(8, prompt_tokens=64, recompute=0), 1000
    )
    m = workload.model
    kv = m.hidden // m.heads * m.kv_heads
    layer = m.hidden * (2 * m.hidden + 2 * kv + 3 * m.intermediate)
    assert forward == pytest.approx(2 * layer * 1000)
    assert forward + backward == pytest.approx(6 * layer * 1000)


def test_short_passes_wait_for_the_host():
    forward, backward = layer_compute(MACHINE, SHAPES["3B"], Work(8), 8)
    assert (forward, backward) == (55 * MACHINE.launch, 172 * MACHINE.launch)


def test_a_step_is_the_sum_of_its_parts():
    parts = step_seconds(MACHINE, SEVEN, Work(512), 64)
    total = parts.pop("total")
    assert total == pytest.approx(sum(parts.values()))
    assert all(seconds > 0 for seconds in parts.values())


def test_every_tensor_of_a_sync_pays_its_rings_steps():
    machine = replace(MACHINE, nvlink=1e30, network=1e30, memory=1e30, sync_tensor=0)
    sync = step_seconds(machine, SEVEN, Work(512), 64)["sync"]
    ring = machine.base + 56 * machine.nvlink_step + 7 * machine.network_step
    assert sync == pytest.approx((12 * 28 + 3) * ring)


def test_one_gpu_communicates_nothing():
    parts = step_seconds(MACHINE, SHAPES["3B"], Work(8), 1)
    assert parts["exchange"] == parts["exposed"] == 0


@pytest.mark.parametrize("name", SHAPES)
def test_more_gpus_never_are_more_efficient(name):
    for load in ("weak", "strong"):
        rows = [
            row
            for row in scaling.predict(MACHINE, [name], scaling.GPUS)
            if (row.load, row.sharding) == (load, "FSDP")
        ]
        found = [row.efficiency for row in rows]
        assert found[0] == 1
        assert found == sorted(found, reverse=True)
        assert len(found) >= 5


def test_a_slower_network_costs_fsdp_and_spares_hsdps_gathers():
    slow = replace(MACHINE, network=2e10, network_step=1e-4)
    whole, split = Work(4096), Work(4096, replicas=64)
    assert (
        train_seconds(slow, SEVEN, whole, 512)["exposed"]
        > 2 * (train_seconds(MACHINE, SEVEN, whole, 512)["exposed"])
    )
    slowed = train_seconds(slow, SEVEN, split, 512)["exposed"]
    assert slowed < train_seconds(slow, SEVEN, whole, 512)["exposed"]


def test_what_does_not_fit_is_left_out():
    assert not fits(MACHINE, SHAPES["72B"], Work(64), 8)
    rows = scaling.predict(MACHINE, ["72B"], scaling.GPUS)
    assert min(row.gpus for row in rows) == 32
    assert fewest_replicas_apart(MACHINE, SHAPES["72B"], Work(64), 128) == 4
    assert fewest_replicas_apart(MACHINE, SEVEN, Work(64), 128) == 16
    assert fewest_replicas_apart(MACHINE, SEVEN, Work(64), 8) == 1


def test_decoding_is_bound_by_weights_then_by_products():
    one = decode_step(MACHINE, SEVEN, 1, 0) - MACHINE.decode_overhead
    weights = 2 * (SEVEN.parameters - SEVEN.head)
    assert one == pytest.approx(weights / MACHINE.memory)
    assert decode_step(MACHINE, SEVEN, 64, 0) == decode_step(MACHINE, SEVEN, 1, 0)
    many = decode_step(MACHINE, SEVEN, 1000, 0) - MACHINE.decode_overhead
    assert many == pytest.approx(1000 * weights / MACHINE.gemm)


def test_replicas_must_divide():
    with pytest.raises(ValueError, match="wanted replicas that divide 12 GPUs, got 8"):
        step_seconds(MACHINE, SEVEN, Work(8, replicas=8), 12)


def test_the_model_holds_against_what_is_published():
    text, holds = scaling.check(MACHINE)
    assert holds, text


@pytest.mark.parametrize(
    "change", [{"gemm": 8e14}, {"gemm": 3e14}, {"memory": 2e12}, {"network": 5e9}]
)
def test_wrong_constants_would_be_noticed(change):
    text, holds = scaling.check(replace(MACHINE, **change))
    assert not holds, text


def test_the_figure_shows_every_model(tmp_path):
    rows = scaling.predict(MACHINE, ["3B", "72B"], (8, 64, 512))
    scaling.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def test_the_command_says_that_it_predicts():
    done = command("--models", "7B", "--gpus", "8", "16", "--set", "gemm=1e15")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PREDICTED")
    assert done.stdout.count("| 7B | weak | FSDP |") == 2
    faster = scaling.predict(replace(MACHINE, gemm=1e15), ["7B"], (8, 16))
    assert scaling.table(faster) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "gem=1"], "--set gem=1: wanted NAME=NUMBER"),
        (["--set", "gemm=fast"], "--set gemm=fast: 'fast' is no number"),
        (["--gpus", "12"], "wanted whole nodes of 8"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_shares_of_waiting_are_of_the_fastest_timed_step():
    times = [1.0, 1.0, 9.0, 4.0, 8.0]  # the first two are not timed
    rows = [
        {"step": n, "tokens_per_second": 100 / seconds,
         **dict.fromkeys(("time/total", "time/rollout", "time/train", "time/sync"), seconds),
         "time/reward": 0.5}
        for n, seconds in enumerate(times, 1)
    ]  # fmt: skip

    def rank(waited: float) -> list[dict[str, float]]:
        other = {"step_seconds": 1.0, "step": 1.0, "update_seconds": 1.0, "update": 1.0}
        own = {"step_seconds": 4.0, "step": waited, "update_seconds": 2.0, "update": waited / 4}
        return [own if seconds == 4 else other for seconds in times]

    found = scaling_runs.summary(rows, [rank(1.0), rank(3.0)])
    assert found["tokens_per_second"] == 25
    assert found["seconds"]["train"] == 4
    assert found["seconds_of_all_steps"] == times
    assert found["waiting_share"] == {"step": 0.5, "update": 0.25}


@pytest.mark.slow
@pytest.mark.variant
def test_processes_are_measured():
    (run,) = scaling_runs.measure([2])["runs"]
    assert run["processes"] == 2
    assert run["tokens_per_second"] > 0
    assert 0 < run["waiting_share"]["update"] < 1
