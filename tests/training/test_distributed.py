"""Training in several processes: the same numbers as one, and what they tell each other."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recap_fast import cli
from recap_fast.config import ConfigError, TrainConfig, save_config
from recap_fast.report.metrics import read_metrics
from recap_fast.trainer import Trainer
from recap_fast.training import distributed
from recap_fast.training.checkpoint import list_checkpoints
from recap_fast.training.distributed import ALONE, start_world
from tests.processes import run_ranks
from tests.tiny import save_tiny_model, save_tiny_vision_model, tiny_config
from tests.training.test_vision_training import vision_config

TRAIN = Path(__file__).with_name("train_ranks.py")
WORLD = Path(__file__).with_name("world_ranks.py")
SEVERAL_PASSES = ("training.updates_per_rollout=2", "training.max_tokens=600")
WITH_REFERENCE = ("model.reference=initial", "loss.kl_coef=0.1")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether the head is tied."""
    folder = tmp_path_factory.mktemp("models")
    return {
        tied: save_tiny_model(folder / f"tied-{tied}", tied=tied) for tied in (True, False)
    }  # fmt: skip


def trained(
    folder: Path,
    model: Path,
    processes: int,
    *overrides: str,
    make_config: Callable[..., TrainConfig] = tiny_config,
) -> dict[str, Any]:
    """Metrics, the last checkpoint's weights and each rank's report of five steps."""
    folder.mkdir()
    config = make_config(folder, model, "training.steps=5", *overrides)
    reports: list[Any] = []
    if processes == 1:
        trainer = Trainer(config)
        trainer.train()
        trainer.close()
    else:
        save_config(config, folder / "full.yaml")
        reports = run_ranks(TRAIN, processes, folder, str(folder / "full.yaml"), timeout=400)
    last = list_checkpoints(Path(config.run) / "checkpoints")[-1]
    return {
        "rows": read_metrics(Path(config.run)),
        "weights": load_file(next(last.glob("*.safetensors"))),
        "reports": reports,
    }


def samples_of(folder: Path) -> list[tuple[Any, ...]]:
    """Of every rollout its step, group, row and text."""
    lines = (folder / "run" / "samples.jsonl").read_text().splitlines()
    keys = ("step", "group", "row", "completion")
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in row.items()
        if not key.startswith(("time/", "memory/")) and key != "tokens_per_second"
    }


def assert_same(
    several: dict[str, Any],
    one: dict[str, Any],
    kinds: tuple[str, ...] = ("DTensor",),
    *,
    rounding: float = 1e-5,
) -> None:
    """To float32 rounding: sums over tokens are added in another order. A bias of keys has no
    gradient but rounding, as softmax is blind to it, and AdamW makes steps of that.

    Args:
        rounding: of weights, relative. AdamW turns that of small gradients into shares of a step,
            so it is in proportion to the learning rate.
    """
    assert len(several["rows"]) == len(one["rows"]) > 5
    for ours, wanted in zip(several["rows"], one["rows"], strict=True):
        assert ours.keys() == wanted.keys()
        for key, value in wanted.items():
            if key.startswith("time/") or key == "tokens_per_second":
                continue
            # A loss is a sum of terms of both signs; what is left of the engine's is all rounding.
            near = 2e-5 if "logprob_diff" in key else 1e-6
            assert (ours[key] is None) == (value is None), key
            if value is not None:
                assert ours[key] == pytest.approx(value, rel=1e-4, abs=near), (key, ours["step"])
    for name, wanted in one["weights"].items():
        if name.endswith("k_proj.bias"):
            continue
        assert (several["weights"][name] - wanted).norm() < rounding * wanted.norm(), name
    lambdas = [report["lambdas"] for report in several["reports"]]
    assert all(other == lambdas[0] for other in lambdas)
    assert all(report["kinds"] == list(kinds) for report in several["reports"])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, models: dict[bool, Path]) -> None:
    """Five rows, three of them prompts: neither the groups nor the tokens divide by two."""
    settings = (
        "data.batch_size=5", "checkpoint.every=0", "reweighting.balance=gradient",
        *SEVERAL_PASSES, *WITH_REFERENCE,
    )  # fmt: skip
    one = trained(tmp_path / "1", models[False], 1, *settings)
    assert one["rows"][-1]["train/policy_tokens"]
    assert any(math.isfinite(row.get("kl") or math.nan) for row in one["rows"])
    assert_same(trained(tmp_path / "2", models[False], 2, *settings), one)


@pytest.mark.slow
def test_two_processes_combine_rewards_as_one(tmp_path: Path, models: dict[bool, Path]) -> None:
    """Over the whole step, which two updates and two processes then deal out; and a run that
    resumes goes on with the same."""
    settings = (
        "data.batch_size=5", "reweighting={method: uniform, advantages: gd2po}",
        "training.updates_per_rollout=2", "checkpoint.every=3", "checkpoint.keep=5",
    )  # fmt: skip
    one = trained(tmp_path / "1", models[True], 1, *settings)
    assert any(row["grad_norm"] for row in one["rows"][1:])
    two = trained(tmp_path / "2", models[True], 2, *settings)
    assert_same(two, one)
    shutil.rmtree(tmp_path / "2" / "run" / "checkpoints" / "step-000005")
    given = (str(tmp_path / "2" / "full.yaml"), '{"resume": true}')
    run_ranks(TRAIN, 2, tmp_path / "2", *given, timeout=400)
    for ours, wanted in zip(read_metrics(tmp_path / "2" / "run"), two["rows"], strict=True):
        assert without_times(ours) == without_times(wanted)


@pytest.mark.slow
def test_two_processes_train_adapters_as_one(tmp_path: Path, models: dict[bool, Path]) -> None:
    """The reference is the same shards without adapters."""
    settings = (
        "data.batch_size=5", "checkpoint.every=0", "model.lora.rank=4",
        "optimizer.learning_rate=1e-2", "reweighting.balance=gradient", *WITH_REFERENCE,
    )  # fmt: skip
    one = trained(tmp_path / "1", models[True], 1, *settings)
    assert all(".lora_" in name for name in one["weights"])
    assert one["rows"][-1]["kl"] > 1e-6
    assert_same(trained(tmp_path / "2", models[True], 2, *settings), one, rounding=1e-4)


@pytest.mark.slow
@pytest.mark.variant
def test_adapters_go_on_with_another_number_of_processes(
    tmp_path: Path, models: dict[bool, Path]
) -> None:
    settings = ("checkpoint.every=3", "model.lora.rank=4", "optimizer.learning_rate=1e-2")
    whole = trained(tmp_path / "2", models[True], 2, *settings)
    for processes in (1, 2):
        folder = tmp_path / f"on {processes}"
        shutil.copytree(tmp_path / "2" / "run", folder / "run")
        shutil.rmtree(folder / "run" / "checkpoints" / "step-000005")
        config = tiny_config(folder, models[True], "training.steps=5", *settings)
        if processes == 1:
            trainer = Trainer(config, resume=True)
            trainer.train()
            trainer.close()
        else:
            save_config(config, folder / "full.yaml")
            given = (str(folder / "full.yaml"), '{"resume": true}')
            run_ranks(TRAIN, processes, folder, *given, timeout=400)
        assert [row["step"] for row in read_metrics(folder / "run")] == list(range(6))
        last = list_checkpoints(folder / "run" / "checkpoints")[-1]
        assert last.name == "step-000005"
        for name, tensor in load_file(last / "adapter_model.safetensors").items():
            wanted = whole["weights"][name]
            if processes == 2:
                assert torch.equal(tensor, wanted), name
            else:
                assert (tensor - wanted).norm() < 1e-5 * wanted.norm(), name


@pytest.mark.slow
def test_two_processes_draw_the_same_refills(tmp_path: Path, models: dict[bool, Path]) -> None:
    """From shares that follow the weights, and with prompts that come back. And they go on with
    those of an unbroken run, after a checkpoint that one process wrote too."""
    settings = (
        "data.sources.0.rewards={even: 'tests.tiny_rewards:even_only'}", "data.batch_size=7",
        "rollout.dynamic_sampling={max_refills: 3}", "checkpoint.every=2", "checkpoint.keep=5",
        "data.mixing=adaptive", "data.review={rewards: [even], after: 1, threshold: 0.9}",
        "training.updates_per_rollout=2", "loss.rollout_is_cap=2.0", "logging.rollouts_per_step=99",
    )  # fmt: skip
    one = trained(tmp_path / "1", models[True], 1, *settings)
    two = trained(tmp_path / "2", models[True], 2, *settings)
    assert_same(two, one)
    assert sum(row.get("groups/refilled") or 0 for row in one["rows"]) > 3
    assert sum(row.get("review/sums") or 0 for row in one["rows"]) > 0
    assert len({row.get("mixing/words") for row in one["rows"]}) > 2
    assert all(row["importance/effective_sample_size"] for row in one["rows"][1:])
    unbroken = samples_of(tmp_path / "1")
    assert samples_of(tmp_path / "2") == unbroken
    for step in ("5", "4"):
        shutil.rmtree(tmp_path / "2" / "run" / "checkpoints" / f"step-00000{step}")
    given = (str(tmp_path / "2" / "full.yaml"), '{"resume": true}')
    run_ranks(TRAIN, 2, tmp_path / "2", *given, timeout=400)
    for ours, wanted in zip(read_metrics(tmp_path / "2" / "run"), two["rows"], strict=True):
        assert without_times(ours) == without_times(wanted)
    assert samples_of(tmp_path / "2") == unbroken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "replicas"),
    [
        (True, 2),
        *(pytest.param(*c, marks=pytest.mark.variant) for c in ((True, 1), (False, 1), (False, 2))),
    ],
)
def test_four_processes_train_as_one(
    tmp_path: Path, models: dict[bool, Path], tied: bool, replicas: int
) -> None:
    """With 3 rows, one process has no prompt; with replicas, two meshes of two."""
    settings = ("data.batch_size=3", *SEVERAL_PASSES)
    one = trained(tmp_path / "1", models[tied], 1, *settings)
    four = trained(tmp_path / "4", models[tied], 4, *settings, f"distributed.replicas={replicas}")
    assert_same(four, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixing",
    ["{sums: 1, words: 0}", pytest.param("{sums: 0, words: 1}", marks=pytest.mark.variant)],
)
def test_processes_without_one_kind_of_rows(
    tmp_path: Path, models: dict[bool, Path], mixing: str
) -> None:
    settings = (f"data.mixing={mixing}", "data.batch_size=3")
    one = trained(tmp_path / "1", models[True], 1, *settings)
    assert_same(trained(tmp_path / "2", models[True], 2, *settings), one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trained_tower",
    [pytest.param(False, marks=pytest.mark.variant), True],
    ids=["frozen tower", "trained tower"],
)
def test_two_processes_train_on_images_as_one(tmp_path: Path, trained_tower: bool) -> None:
    """Rows of no image, one, or two; a reference for the KL term; weights synced into the engine's
    own model, whose log-probs would show it."""
    model = save_tiny_vision_model(tmp_path / "model")
    settings = (
        f"model.train_vision={str(trained_tower).lower()}", "data.batch_size=5",
        "data.max_prompt_tokens=200", "data.max_supervised_tokens=250", "training.max_tokens=300",
        "model.gradient_checkpointing=selective", "checkpoint.every=0",
        *WITH_REFERENCE,
    )  # fmt: skip
    one = trained(tmp_path / "1", model, 1, *settings, make_config=vision_config)
    assert all(row["rollout/logprob_diff_max"] < 1e-4 for row in one["rows"] if "loss/ntp" in row)
    two = trained(tmp_path / "2", model, 2, *settings, make_config=vision_config)
    assert_same(two, one, ("DTensor",) if trained_tower else ("DTensor", "Parameter"))


@pytest.mark.slow
def test_what_processes_tell_each_other(tmp_path: Path, models: dict[bool, Path]) -> None:
    save_config(tiny_config(tmp_path, models[True]), tmp_path / "full.yaml")
    for rank, found in enumerate(run_ranks(WORLD, 2, tmp_path, str(tmp_path / "full.yaml"))):
        assert found["gathered"] == [
            [[], {"rank": 0, "word": ""}],
            [[0, 1, 2], {"rank": 1, "word": "é"}],
        ]
        there = "RankError: rank {}: no such thing"
        assert found["failed"] == ("UserError: no such thing" if rank else there.format(1))
        assert found["failed_main"] == (there.format(0) if rank else "UserError: no such thing")
        assert found["failed_together"] == found["failed"]
        said = "UserError: " if rank == 0 else "RankError: rank 0: "
        assert found["failed_alike"] == said + "wrong everywhere"
        assert found["together"] == rank
        assert found["one_by_host"] == [rank, "by rank 0"]
        assert found["failed_by_host"] == found["failed_main"]
        assert found["main"] == "from rank 0"
        assert found["any"] == [True, False]
        assert found["sums"] == [2.0, 1.0]
        assert found["largest"] == [1.0]


def test_a_process_alone_tells_itself() -> None:
    tensors = {"a": torch.ones(2)}
    assert ALONE.gather(tensors, "note") == [(tensors, "note")]
    assert ALONE.together(lambda: "here") == ALONE.one_by_host(lambda: "here") == "here"
    assert ALONE.on_main(lambda: "here") == "here"
    assert ALONE.any(True)


def test_replicas_that_do_not_divide_the_processes(
    tmp_path: Path, models: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = tiny_config(tmp_path, models[True], "distributed.replicas=3")
    with pytest.raises(ConfigError, match="replicas is 3, which does not divide the 4 processes"):
        start_world(config)


def test_servers_have_processes_of_their_own(
    tmp_path: Path, models: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("rollout.engine=vllm_server", "rollout.tensor_parallel_size=2")
    world = start_world(tiny_config(tmp_path, models[True], *settings))
    assert world.size == 1
    with pytest.raises(ConfigError, match="size is 2, which does not divide the 1 process"):
        start_world(tiny_config(tmp_path, models[True], *settings[1:], "rollout.engine=vllm"))


@pytest.mark.parametrize(
    ("urls", "listens"),
    [
        ("[]", "servers that a run starts listen at an address of loopback"),
        ("[http://10.0.0.7:8000,http://127.0.0.1:8000]", "http://127.0.0.1:8000 is an address"),
        ("[http://10.0.0.7:8000]", None),
    ],
)
def test_servers_that_other_hosts_do_not_reach_are_refused(
    urls: str,
    listens: str | None,
    tmp_path: Path,
    models: dict[bool, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = ("rollout.engine=vllm_server", f"rollout.server.urls={urls}")
    config = tiny_config(tmp_path, models[True], *settings)
    distributed.check_servers(config.rollout, 4, 4)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    message = listens or "cannot join the others"
    with pytest.raises(ConfigError, match=message) as caught:
        start_world(config)
    assert ("recap-fast serve CONFIG --host" in str(caught.value)) == (listens is not None)


def test_a_process_without_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError, match="has 2 GPUs, .* process 3 on it: .*per-node 2 at most"
    ) as e:
        distributed._own_gpu()
    assert not cli._is_said_elsewhere(e.value), "the processes before it have theirs"
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ConfigError) as e:
        distributed._own_gpu()
    assert cli._is_said_elsewhere(e.value)


def test_processes_that_cannot_meet(
    tmp_path: Path, models: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, models[True], "distributed.timeout=5")
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"at localhost:\?: .*MASTER_PORT.*; start all with"):
        start_world(config)
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=rf"process 0 of 2 .* at localhost:{port}: "):
            start_world(config)
