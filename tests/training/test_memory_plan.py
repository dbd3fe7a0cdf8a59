"""The plan's numbers against arithmetic by hand, what would fit, and the check before a start."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from typer.testing import CliRunner

from recap_fast.cli import app
from recap_fast.config import RolloutConfig, TrainConfig, load_config
from recap_fast.model.checkpointing import LayerModes
from recap_fast.model.shapes import load_shapes, shapes_of_config
from recap_fast.rollout.vllm import device_arguments
from recap_fast.training import memory_check
from recap_fast.training.distributed import ALONE, World
from recap_fast.training.host_memory import available_memory, pinned_bytes
from recap_fast.training.memory_check import MemoryPlanError, check_memory, take_skipped_step
from recap_fast.training.memory_model import adapter_parameters, moment_bytes
from recap_fast.training.memory_needs import Planner
from recap_fast.training.memory_plan import GIB, MemoryPlan, find_remedies, plan_memory
from recap_fast.training.optimization import PolicyOptimizer
from tests.tiny import tiny_config, tiny_policy

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PAPER = EXAMPLES / "recap-qwen2.5-vl-7b-hybrid.yaml"
SMALL = EXAMPLES / "recap-qwen2.5-vl-3b-rlvr.yaml"

REFERENCE = ["model.reference=initial", "loss.kl_coef=0.1"]


def _plan(config: TrainConfig, gpus: int, gib: float = 80) -> MemoryPlan:
    return plan_memory(config, load_shapes(config.model.path), gpus, int(gib * GIB))


def _gib(plan: MemoryPlan) -> dict[str, float]:
    return {part.name: part.bytes / GIB for part in plan.parts}


def test_the_arithmetic_of_one_gpu() -> None:
    """16 bytes a parameter are 46 GiB for 3B and 113.5 for 7B; tower 1.25, engine weights 15.4."""
    parts = _gib(_plan(load_config(SMALL), 1))
    trained = parts["masters"] + parts["gradients"] + parts["optimizer state"]
    assert trained == pytest.approx(46.0, rel=0.005)
    assert parts["frozen tower"] == pytest.approx(1.25, rel=0.01)
    config = load_config(PAPER)
    parts = _gib(_plan(config, 1))
    trained = parts["masters"] + parts["gradients"] + parts["optimizer state"]
    assert trained == pytest.approx(113.5, rel=0.005)
    assert parts["engine weights"] == pytest.approx(15.4, rel=0.01)
    # 16 rows of 4 rollouts of 4096 tokens at 57,344 bytes, spread over 8 GPUs.
    assert _plan(config, 8).kv_cache == 2 * 4 * 4096 * 57_344


def test_the_papers_run_fits_eight_gpus_and_not_one() -> None:
    config = load_config(PAPER)
    assert _plan(config, 8).fits
    assert not _plan(config, 1).fits
    assert not _plan(config, 1, 140).fits


def test_what_is_sharded_shrinks_and_replicas_do_not_shard() -> None:
    config = load_config(PAPER)
    one, eight = _gib(_plan(config, 1)), _gib(_plan(config, 8))
    copies = _gib(_plan(load_config(PAPER, ["distributed.replicas=2"]), 8))
    for name in ("masters", "gradients", "optimizer state"):
        assert eight[name] == pytest.approx(one[name] / 8, rel=1e-6)
        assert copies[name] == pytest.approx(one[name] / 4, rel=1e-6)
    for name in ("frozen tower", "engine weights"):
        assert eight[name] == one[name]


def test_a_trained_tower_is_sharded_and_a_reference_costs() -> None:
    shapes = load_shapes("Qwen/Qwen2.5-VL-7B-Instruct")
    plan = _plan(load_config(PAPER, ["model.train_vision=true"]), 8)
    parts = _gib(plan)
    assert "frozen tower" not in parts
    assert parts["masters"] == pytest.approx(4 * shapes.parameters / 8 / GIB, rel=1e-6)
    assert "reference model" in _gib(
        _plan(load_config(PAPER, ["model.reference=initial", "loss.kl_coef=0.1"]), 8)
    )


def test_checkpointing_is_what_the_activations_follow() -> None:
    plans = {
        mode: _plan(load_config(PAPER, [f"model.gradient_checkpointing={mode}"]), 8)
        for mode in ("none", "selective", "full")
    }
    activations = plans["full"].activations
    assert activations["full"] < activations["selective"] < activations["none"]
    for mode, plan in plans.items():
        assert plan.activations == activations
        assert plan.checkpointing == LayerModes.uniform(mode, 28)  # type: ignore[arg-type]
    for more, less in pairwise(("none", "selective", "full")):
        difference = plans[more].total - plans[less].total
        assert difference == pytest.approx(activations[more] - activations[less], rel=0.1)


def test_auto_checkpoints_no_more_layers_than_it_must() -> None:
    """Less memory, more of it; and the one before, which computes less again, would not fit."""
    config = load_config(PAPER, ["model.gradient_checkpointing=auto"])
    shapes = load_shapes(config.model.path)
    choices = LayerModes.by_cost(shapes.layers)
    found = []
    for gib in (200, 110, 95, 80, 60, 20):
        plan = _plan(config, 8, gib)
        place = choices.index(plan.checkpointing)
        found.append(place)
        assert plan.total <= plan.usable or place == len(choices) - 1
        if place:
            fewer = Planner(config, shapes, 8).plan(int(gib * GIB), choices[place - 1])
            assert fewer.total > fewer.usable
            assert fewer.total > plan.total or plan.total > plan.usable
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == len(choices) - 1
    assert len(set(found)) == len(found)


def test_adapters_leave_the_base_narrow_and_count_as_peft_makes_them() -> None:
    config = load_config(PAPER, ["model.lora.rank=8", *REFERENCE])
    plan = _plan(config, 2)
    parts = _gib(plan)
    shapes = load_shapes(config.model.path)
    masters = next(part for part in plan.parts if part.name == "masters")
    assert masters.note == "float32, 1/2 of 20.19 million parameters"
    assert parts["frozen base"] == pytest.approx(2 * shapes.text_parameters / 2 / GIB, rel=1e-6)
    assert "reference model" not in parts  # the base is
    assert parts["masters"] < 0.05
    policy = tiny_policy()
    adapted = get_peft_model(policy.model, PeftLora(r=4, target_modules="all-linear"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    tiny = shapes_of_config(policy.model.config)
    assert adapter_parameters(tiny, 4, "all-linear", trains_tower=False) == trained


def test_what_would_fit_fits_and_is_said_as_settings() -> None:
    overrides = ["model.gradient_checkpointing=false"]
    config = load_config(PAPER, overrides)
    shapes = load_shapes(config.model.path)
    assert not _plan(config, 8).fits
    found = find_remedies(config, shapes, 8, 80 * GIB)
    assert found[0].settings == ("model.gradient_checkpointing=auto",)
    for remedy in found:
        changed = load_config(PAPER, [*overrides, *remedy.settings])
        assert _plan(changed, remedy.plan.world_size) == remedy.plan
        assert remedy.plan.fits
    alone = find_remedies(load_config(PAPER), shapes, 1, 80 * GIB)
    assert alone[0].plan.world_size == 1
    assert ("model.offload=true",) in [remedy.settings for remedy in alone]
    alone = [remedy for remedy in alone if remedy.plan.world_size > 1]
    assert [remedy.plan.world_size for remedy in alone] == sorted(
        (remedy.plan.world_size for remedy in alone), reverse=True
    )
    fewest = alone[-1].plan.world_size
    assert fewest > 1
    assert not _plan(load_config(PAPER), fewest // 2).fits


def test_an_engine_that_has_no_room_in_its_share_is_named() -> None:
    plan = _plan(load_config(PAPER, ["rollout.gpu_memory_utilization=0.1"]), 8)
    assert not plan.fits
    assert plan.total <= plan.usable
    assert "rollout.gpu_memory_utilization = 0.1" in plan.problem
    whole, half = _plan(load_config(PAPER), 1), _plan(load_config(PAPER), 1, 55)
    assert half.kv_cache < whole.kv_cache  # cut down to the share


def test_an_engine_of_several_processes_is_spread() -> None:
    """A fourth of weights and cache, of which each engine has four times the rollouts."""
    one = _plan(load_config(PAPER), 8)
    four = _plan(load_config(PAPER, ["rollout.tensor_parallel_size=4"]), 8)
    assert _gib(four)["engine weights"] == pytest.approx(_gib(one)["engine weights"] / 4)
    assert four.kv_cache == one.kv_cache
    # Qwen2.5-VL-7B has four heads of keys and values: of 28, 4 go round, and 7 would too.
    copied = _plan(load_config(PAPER, ["rollout.tensor_parallel_size=7"]), 56)
    assert copied.kv_cache == 2 * 4 * 4096 * 57_344 / 4


def test_an_engine_without_room_is_spread_by_a_remedy() -> None:
    shapes = load_shapes("Qwen/Qwen2.5-VL-32B-Instruct")
    config = load_config(PAPER, ["model.path=Qwen/Qwen2.5-VL-32B-Instruct"])
    assert plan_memory(config, shapes, 64, 80 * GIB).problem
    settings = [remedy.settings for remedy in find_remedies(config, shapes, 64, 80 * GIB)]
    assert settings[0] == ("rollout.tensor_parallel_size=4",)


def test_a_sleeping_engine_makes_room_for_the_training_pass() -> None:
    awake = _plan(load_config(PAPER), 8)
    asleep = _plan(load_config(PAPER, ["rollout.sleep=true"]), 8)
    engine = (_gib(awake)["engine weights"] + _gib(awake)["engine KV cache"]) * GIB
    less = awake.stage_total("training pass") - asleep.stage_total("training pass")
    assert less == pytest.approx(engine)
    assert asleep.kv_cache == awake.kv_cache
    for stage in ("rollouts", "weight sync", "load"):
        assert asleep.stage_total(stage) == awake.stage_total(stage)
    config = load_config(SMALL)
    shapes = load_shapes(config.model.path)
    memory = int(plan_memory(config, shapes, 1, 80 * GIB).total / 0.95) - GIB
    settings = [remedy.settings for remedy in find_remedies(config, shapes, 1, memory)]
    assert ("rollout.sleep=true",) in settings


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--gpus", "8", "--gpu-memory", "80"], 0, "fits: "),
        (["--gpus", "1"], 1, "Would fit: "),
    ],
)
def test_dry_run(arguments: list[str], status: int, said: str) -> None:
    result = CliRunner().invoke(app, ["train", str(PAPER), "--dry-run", *arguments])
    assert result.exit_code == status
    assert said in result.output
    for part in (
        "masters", "gradients", "optimizer", "working copies", "KV cache", "load", "host memory",
    ):  # fmt: skip
        assert part in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--set", "model.path=nobody/none"], "config.json"),
        (["--dry-run", "--set", "model.device=cpu"], "model.device is cpu"),
        (["--dry-run", "--set", "distributed.replicas=2"], "does not divide the 1 GPUs"),
        (
            ["--dry-run", "--gpus", "4", "--set", "rollout.tensor_parallel_size=3"],
            "rollout.tensor_parallel_size is 3, which does not divide the 4 GPUs of --gpus",
        ),
        (
            ["--dry-run", "--gpus", "8", "--set", "rollout.tensor_parallel_size=8"],
            "does not divide the model's 28 attention heads",
        ),
        (
            [
                "--dry-run",
                "--set",
                "model.lora.rank=8",
                "--set",
                "model.lora.target_modules=[q_proj, foo_proj]",
            ],
            "no linear layer is called 'foo_proj'; there are q_proj, k_proj",
        ),
        (["--dry-run", "--gpu-memory", "inf"], "--gpu-memory: wanted GiB of each GPU, got inf"),
        (["--gpus", "8"], "add it"),
    ],
)
def test_dry_runs_that_cannot_be(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["train", str(PAPER), *arguments])
    assert isinstance(result.exception, Exception)
    assert message in str(result.exception)  # `main` prints it and exits 2
    assert "\n" not in str(result.exception)


def test_a_dry_run_under_torchrun_is_printed_by_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", str(PAPER), "--dry-run", "--gpus", "8"]
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        assert ("masters" in result.output) == prints


def test_optimizer_state_takes_what_its_setting_says(tmp_path: Path) -> None:
    """Per parameter 8, 4 and 2 bytes with a scale for 256; as what a step makes."""
    plans = {
        state: _gib(_plan(load_config(PAPER, [f"optimizer.state={state}"]), 1))["optimizer state"]
        for state in ("float32", "bfloat16", "8bit")
    }
    assert plans["bfloat16"] == pytest.approx(plans["float32"] / 2)
    assert plans["8bit"] == pytest.approx(plans["float32"] * (2 + 8 / 256) / 8)
    for state in plans:
        config = tiny_config(tmp_path, tmp_path, f"optimizer.state={state}")
        optimizer = PolicyOptimizer(tiny_policy(tied=False), None, config)
        take_skipped_step(optimizer.optimizer)
        made = [(n, t) for n, t in optimizer.named_state() if t.ndim > 1]
        count = sum(t.numel() for n, t in made if n.startswith("exp_avg_sq/"))
        if state != "8bit":  # a tiny model's rows are shorter than a block
            found = sum(t.numel() * t.element_size() for _, t in made)
            assert found == moment_bytes(state) * count


def test_what_is_offloaded_is_the_hosts() -> None:
    plain = load_config(PAPER, REFERENCE)
    config = load_config(PAPER, ["model.offload=true", "optimizer.state=bfloat16", *REFERENCE])
    shapes = load_shapes(config.model.path)
    before, after = _plan(plain, 8), _plan(config, 8)
    gone = {"masters", "gradients", "optimizer state"}
    assert gone <= _gib(before).keys()
    assert not gone & _gib(after).keys()
    assert _gib(after)["reference model"] < _gib(before)["reference model"]
    host = {part.name: part.bytes for part in after.host}
    own = shapes.text_parameters / 8
    assert 4 * own <= host["masters"] <= 2 * 4 * own  # pinned blocks are powers of two
    assert host["optimizer state"] == pytest.approx(4 * own)
    assert host["checkpoint"] == pytest.approx(8 * own)
    assert {part.name for part in before.host} == {"checkpoint", "process"}
    assert before.host[0].bytes == pytest.approx(12 * own)
    assert after.total < before.total - 3 * GIB
    assert after.stage_total("load") < before.stage_total("load")


def test_pinned_memory_comes_in_powers_of_two() -> None:
    shapes = load_shapes("Qwen/Qwen2.5-7B-Instruct")
    matrices = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 2 * 152064 * 3584
    wanted = 28 * (2 * 2**26 + 2 * 2**23 + 3 * 2**29) + 2 * 2**32
    assert pinned_bytes(shapes, matrices, 4, 1) == wanted
    assert pinned_bytes(shapes, 1000, 4, 1) == pytest.approx(4000 / 0.693, rel=0.01)


def test_what_the_host_has(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemAvailable:    80 kB\n")
    assert available_memory(meminfo, tmp_path) == 80 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(meminfo, tmp_path) == 80 * 1024
    (tmp_path / "memory.max").write_text("50000\n")
    (tmp_path / "memory.stat").write_text("anon 20000\nfile 15000\n")
    assert available_memory(meminfo, tmp_path) == 30000
    assert available_memory(tmp_path / "none", tmp_path) is None


def _on_cuda(free: int, monkeypatch: pytest.MonkeyPatch, host: int | None = None) -> World:
    monkeypatch.setattr(memory_check, "available_memory", lambda: host)
    monkeypatch.setattr(memory_check.torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    return World(0, 1, torch.device("cuda", 0), None)


def test_a_start_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(PAPER)
    with pytest.raises(MemoryPlanError, match=r"needs 1\d\d\.\d\d GiB .* Would fit: .* GPUs"):
        check_memory(config, config.model.path, _on_cuda(79 * GIB, monkeypatch))
    small = load_config(SMALL)
    cache = check_memory(small, small.model.path, _on_cuda(79 * GIB, monkeypatch))
    assert cache == _plan(small, 1)
    with pytest.raises(MemoryPlanError, match="of 61.00 GiB"):  # another program has the rest
        check_memory(small, small.model.path, _on_cuda(60 * GIB, monkeypatch))


def test_a_start_is_refused_for_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(SMALL, ["model.offload=true"])
    need = _plan(config, 1).host_total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_memory(config, config.model.path, _on_cuda(79 * GIB, monkeypatch, 2 * need))
    world = _on_cuda(79 * GIB, monkeypatch, 2 * need - 2)
    with pytest.raises(MemoryPlanError, match=r"masters .* a host has .* leave model.offload out"):
        check_memory(config, config.model.path, world)


def test_a_cpu_is_not_planned_for() -> None:
    config = load_config(PAPER)
    assert check_memory(config, config.model.path, ALONE) is None


def test_the_engine_is_told_the_size_of_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device, config = torch.device("cuda", 0), RolloutConfig(gpu_memory_utilization=0.4)
    by_need: Any = device_arguments(config, device, 8 * GIB)
    assert by_need == {"kv_cache_memory_bytes": 8 * GIB, "gpu_memory_utilization": 0.1}
    assert device_arguments(config, device, None) == {"gpu_memory_utilization": 0.4}


def test_reserved_state_changes_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path)
    policies = [tiny_policy(), tiny_policy()]
    plain, reserved = (PolicyOptimizer(policy, None, config).optimizer for policy in policies)
    take_skipped_step(reserved)
    state = next(iter(reserved.state.values()))
    assert len(reserved.state) == len(list(policies[1].model.parameters()))
    assert state["step"] == 0
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    for optimizer, policy in zip((plain, reserved), policies, strict=True):
        vars(optimizer).update(grad_scale=torch.ones(()), found_inf=torch.zeros(()))
        for index, parameter in enumerate(policy.model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
        optimizer.step()
    for one, other in zip(*(policy.model.parameters() for policy in policies), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def _remedies(*overrides: str, gpus: int, gpu_memory: int = 80) -> list[str]:
    config = load_config(PAPER, overrides)
    shapes = load_shapes(config.model.path)
    found = find_remedies(config, shapes, gpus, gpu_memory * GIB)
    assert all(remedy.plan.fits for remedy in found)
    return [remedy.describe(gpus) for remedy in found]


def test_fewer_replicas_are_the_first_remedy() -> None:
    assert _remedies("distributed.replicas=8", gpus=8)[0].startswith("--set distributed.replicas=1")


def test_a_remedy_says_what_it_wants_of_the_host() -> None:
    (offloaded,) = (r for r in _remedies(gpus=1) if "offload" in r)
    assert re.search(r"offload=true \(\d+\.\d GiB, and 2\d\d\.\d of the host's", offloaded)


def test_remedies_name_nothing_that_is_not_needed() -> None:
    large = "model.path=Qwen/Qwen2.5-VL-72B-Instruct"
    shapes = load_shapes("Qwen/Qwen2.5-VL-72B-Instruct")
    config = load_config(PAPER, [large])
    for remedy in find_remedies(config, shapes, 64, 80 * GIB):
        for setting in remedy.settings if len(remedy.settings) > 1 else ():
            rest = [one for one in remedy.settings if one != setting]
            without = load_config(PAPER, [large, *rest])
            assert not plan_memory(without, shapes, remedy.plan.world_size, 80 * GIB).fits, setting
