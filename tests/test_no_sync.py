"""The guard against host syncs catches what it claims to catch, and lets the rest through; a whole
training step passes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.nn.utils import get_total_norm

from recap_fast.config import ReweightingConfig, save_config
from recap_fast.model.policy import Policy
from recap_fast.report.metrics import read_metrics
from recap_fast.reweighting.balance import GradientBalance
from recap_fast.trainer import Trainer, _build_reweighter
from recap_fast.training.optimization import PolicyOptimizer
from recap_fast.training.packing import PackedUpdate
from recap_fast.training.rollout_source import sampling_of
from recap_fast.types import RewardTable
from tests.no_sync import ForbidHostSync, HostSyncError
from tests.processes import run_ranks
from tests.tiny import save_tiny_model, tiny_config, tiny_llama

RANKS = Path(__file__).with_name("no_sync_ranks.py")
VALUES = torch.tensor([3.0, 1.0, 2.0])
MASK = VALUES > 1.5
SYNCING: dict[str, Callable[[], object]] = {
    "item": lambda: VALUES.sum().item(),
    "bool": lambda: bool(MASK.any()),
    "float": lambda: float(VALUES[0]),
    "branch": lambda: 1 if VALUES.sum() > 0 else 0,
    "slice bound": lambda: VALUES[: MASK.sum()],
    "range": lambda: range(MASK.sum()),
    "tolist": lambda: VALUES.tolist(),
    "numpy": lambda: VALUES.numpy(),
    "asarray": lambda: np.asarray(VALUES),
    "cpu": lambda: VALUES.cpu(),
    "equal": lambda: torch.equal(VALUES, VALUES),
    "allclose": lambda: torch.allclose(VALUES, VALUES),
    "nonzero": lambda: torch.nonzero(VALUES),
    "where with one argument": lambda: torch.where(MASK),
    "masked_select": lambda: torch.masked_select(VALUES, MASK),
    "bool index": lambda: VALUES[MASK],
    "bool index, written": lambda: VALUES.clone().__setitem__(MASK, VALUES[:2]),
    "unique": lambda: torch.unique(VALUES),
    "bincount": lambda: torch.bincount(VALUES.long()),
    "repeat_interleave": lambda: torch.repeat_interleave(VALUES, VALUES.long()),
    "to another device": lambda: VALUES.to("meta"),
    "copy_ to another device": lambda: torch.empty(3, device="meta").copy_(VALUES),
    "repr": lambda: repr(VALUES),
    "new_tensor": lambda: VALUES.new_tensor([1.0]),
    "numbers to the device": lambda: torch.tensor([1.0], device="cpu"),
    "numbers to the device by another name": lambda: torch.as_tensor([1.0], device="cpu"),
}


@pytest.mark.parametrize("call", SYNCING.values(), ids=SYNCING.keys())
def test_syncs_are_caught(call: Callable[[], object]) -> None:
    with ForbidHostSync(), pytest.raises(HostSyncError):
        call()


def test_a_sync_in_the_backward_pass_is_caught() -> None:
    x = VALUES.clone().requires_grad_()
    y = x * 2
    y.register_hook(lambda gradient: gradient * gradient.sum().item())
    with ForbidHostSync(), pytest.raises(HostSyncError):
        y.sum().backward()


def test_device_work_passes_and_the_context_ends() -> None:
    weight = VALUES.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], fused=True)
    with ForbidHostSync():
        chosen = VALUES[torch.tensor([2, 0])]
        (weight * chosen.sum()).where(MASK, 0.0).logsumexp(0).backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        torch.repeat_interleave(VALUES, torch.tensor([1, 1, 2]), output_size=4)
        VALUES.to(torch.bfloat16)
    assert weight.tolist() != VALUES.tolist()


BLOCKING_UPLOADS: dict[str, Callable[[], object]] = {
    "to": lambda: VALUES.to("meta"),
    "copy_": lambda: torch.empty(3, device="meta").copy_(VALUES),
    "new_tensor": lambda: torch.empty(3, device="meta").new_tensor([1, 2]),
    "tensor": lambda: torch.tensor([1, 2], device="meta"),
}


@pytest.mark.parametrize("call", BLOCKING_UPLOADS.values(), ids=BLOCKING_UPLOADS.keys())
def test_uploads_that_wait_are_caught(call: Callable[[], object]) -> None:
    with ForbidHostSync("meta"), pytest.raises(HostSyncError, match="and waits"):
        call()


def test_asynchronous_uploads_pass() -> None:
    with ForbidHostSync("meta"):
        VALUES.to("meta", non_blocking=True)
        torch.empty(3, device="meta").copy_(VALUES, non_blocking=True)
        torch.tensor([1, 2])


class Step:
    """A trainer with a step's rows: rewarded and supervised, dealt over two updates."""

    def __init__(self, folder: Any) -> None:
        model = save_tiny_model(folder / "model")
        config = tiny_config(folder, model, "training.updates_per_rollout=2")
        self.trainer = Trainer(config)
        rows = self.trainer.stream.next_step()
        rollouts = self.trainer.engine.generate(rows.prompts, sampling_of(config, 0))
        random = np.random.default_rng(0).normal(size=(len(rollouts), 3))
        self.rewards = RewardTable(random.astype(np.float32))
        self.rewards.values[:, 2] = np.nan
        advantages = self.trainer._advantages(rollouts, self.rewards.values)
        self.updates: list[PackedUpdate] = self.trainer._pack(rows.supervised, rollouts, advantages)
        assert all(update.batches for update in self.updates)

    def on(
        self, device: torch.device, method: str, measure_every: int = 0, **parameters: Any
    ) -> Trainer:
        """The trainer with a method's reweighter, and everything of it on a device."""
        trainer = self.trainer
        names = [objective.name for objective in trainer.config.objectives]
        weights = {"weights": dict.fromkeys(names, 1.0)} if method == "static" else {}
        settings = ReweightingConfig(
            method=method,  # type: ignore[arg-type]
            parameters=weights | parameters,
            measure_gradients_every=measure_every,
        )
        config = trainer.config = trainer.config.model_copy(update={"reweighting": settings})
        trainer.reweighter = _build_reweighter(config, device)
        trainer.balance = GradientBalance(len(names), device)
        supervised = [objective.kind == "loss" for objective in config.objectives]
        trainer._is_supervised = torch.tensor(supervised, device=device)
        trainer._losses = torch.full((3,), torch.nan, device=device)
        policy = Policy(tiny_llama(vocab=100).to(device), torch.float32)
        trainer.optimizer = PolicyOptimizer(policy, None, config)
        return trainer


METHODS = get_args(ReweightingConfig.model_fields["method"].annotation)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Step]:
    step = Step(tmp_path_factory.mktemp("step"))
    yield step
    step.trainer.close()


@pytest.mark.parametrize("method", ["recap", "saw"])
def test_a_step_of_two_updates_never_waits(step: Step, method: str) -> None:
    """From the first upload to the end of the optimizer step, reweighing included."""
    trainer = step.on(torch.device("cpu"), method)
    before = [parameter.clone() for parameter in trainer.optimizer.parameters]
    with ForbidHostSync():
        stats = trainer._learn(step.updates, step.rewards, 1e-3)
    assert stats.grad_norm.item() > 0
    assert stats.skipped.item() == 0
    after = trainer.optimizer.parameters
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if method == "saw":  # the one that reads the samples' deviations
        values = step.rewards.values[:, :2]
        spread = values.std(0, ddof=1) / np.abs(values.mean(0))
        assert trainer.reweighter.priorities[:2].tolist() == pytest.approx(spread, rel=1e-5)


def test_a_step_with_retention_and_measured_gradients_never_waits(step: Step) -> None:
    trainer = step.on(torch.device("cpu"), "recap", measure_every=1, retention=1.0, window=4)
    for _ in range(5):  # takes part from the fourth on
        with ForbidHostSync():
            stats = trainer._learn(step.updates, step.rewards, 1e-3)
    assert stats.parameter_norms is not None
    assert stats.parameter_norms.shape == (3,)
    assert trainer.reweighter.retentions.shape == (3,)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_copied_and_waited_for(
    step: Step, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for every method, with the device's tensors on "meta": each copy between it and the
    host then shows."""
    meta = torch.device("meta")
    # What torch does not offer there: autocast, fused norms and AdamW's fused kernel.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda x, **_: get_total_norm(x))
    trainer = step.on(meta, method)
    monkeypatch.setattr(trainer.optimizer.optimizer, "step", lambda: None)
    with ForbidHostSync(meta):
        stats = trainer._learn(step.updates, step.rewards, 1e-3)
    assert stats.grad_norm.device == meta
    assert all(p.grad is not None or p.device == meta for p in trainer.optimizer.parameters)


@pytest.mark.slow
def test_steps_of_two_processes_never_wait(tmp_path: Path) -> None:
    """FSDP's collectives, the sums over processes and recomputed layers included, in two updates a
    step of several passes each."""
    model = save_tiny_model(tmp_path / "model", tied=False)
    config = tiny_config(
        tmp_path, model, "training.steps=1", "training.updates_per_rollout=2",
        "training.max_tokens=600", "model.reference=initial", "loss.kl_coef=0.1",
        "model.gradient_checkpointing=selective", "checkpoint.every=0", "evaluation.before=false",
        "evaluation.after=false",
    )  # fmt: skip
    save_config(config, tmp_path / "full.yaml")
    for rank in run_ranks(RANKS, 2, tmp_path, str(tmp_path / "full.yaml")):
        assert rank["guarded"] == 2
        assert rank["kind"] == "DTensor"
        assert not rank["syncing"].pop("nothing")
        assert len(rank["syncing"]) == 3
        assert all(rank["syncing"].values())
    rows = read_metrics(tmp_path / "run")
    assert [row["grad_norm"] > 0 for row in rows] == [True]


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_no_method_waits_on_cuda(step: Step, method: str) -> None:
    trainer = step.on(torch.device("cuda"), method)
    trainer._learn(step.updates, step.rewards, 1e-3)  # lazy initialisation
    torch.cuda.synchronize()
    with ForbidHostSync("cuda"):
        stats = trainer._learn(step.updates, step.rewards, 1e-3)
    assert stats.grad_norm.item() > 0
